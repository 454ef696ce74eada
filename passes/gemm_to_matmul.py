"""Gemm becomes MatMul + Add, the one form that later passes and onnxruntime's fusions know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, constant, get_metadata, graphs, is_constant, set_metadata, values
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Builder, Names


@dataclass(frozen=True)
class GemmToMatMul:
    """Write a Gemm with a constant weight as MatMul and Add, its factors folded in.

    onnxruntime fuses integer and 4-bit weights with MatMul only, and makes a Gemm of MatMul + Add
    again where that is faster.

    Given:   Gemm(A, B, C; alpha, beta, transA, transB)
    Result:  MatMul(A or Transpose(A), alpha·B or alpha·Bᵀ) -> Add(beta·C)
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        worker = _Worker(Names(model))
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op == "Gemm"]:
                reason = _reason(node)
                if reason:
                    skipped[node.name] = reason
                    continue
                worker.rewrite(graph, node)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)


def _reason(node: gs.Node) -> str | None:
    if "onnxq.term" in get_metadata(node):
        return "already quantized by onnxq"
    if not is_constant(node.inputs[1]):
        return f"weight {node.inputs[1].name!r} is not constant"
    dtype = values(node.inputs[1]).dtype
    return None if dtype == np.float32 else f"weight is {dtype.name}, not float32"


@dataclass
class _Worker:
    names: Names
    # (tensor, alpha, transB) -> the constant made of it: Gemms that share a weight go on sharing
    made: dict[tuple[int, float, int], Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # keeps the ids above unique

    def rewrite(self, graph: gs.Graph, node: gs.Node) -> None:
        builder = Builder(graph, node, self.names, "fold")
        alpha = float(node.attrs.get("alpha", 1.0))
        beta = float(node.attrs.get("beta", 1.0))
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if node.attrs.get("transA", 0):
            x = builder.add("Transpose", f"{node.name}/turned", [x], attrs={"perm": [1, 0]})
        if beta != 1.0 and bias is not None:
            bias = self._scaled(builder, node, bias, beta)
        node.inputs = [x, self._weight(weight, alpha, int(node.attrs.get("transB", 0)))]
        node.op = "MatMul"
        node.attrs.clear()
        if bias is None:
            return
        output = node.outputs[0]
        product = builder.variable(f"{node.name}/product")
        node.outputs[0] = product
        builder.skip()
        builder.add("Add", f"{node.name}/bias", [product, bias], output=output)
        set_metadata(node, {"onnxq.pass": "fold"})

    def _weight(self, weight: Any, alpha: float, turned: int) -> Any:
        if alpha == 1.0 and not turned:
            return weight
        key = (id(weight), alpha, turned)
        if key not in self.made:
            array = values(weight).T if turned else values(weight)
            array = np.ascontiguousarray((array * np.float32(alpha)) if alpha != 1.0 else array)
            alone = len(weight.outputs) == 1
            name = weight.name if alone else self.names.tensor(f"{weight.name}/turned")
            self.made[key] = constant(name, array)
            self.kept.append(weight)
        return self.made[key]

    def _scaled(self, builder: Builder, node: gs.Node, bias: Any, beta: float) -> Any:
        if is_constant(bias):
            name = self.names.tensor(f"{node.name}/bias")
            return constant(name, (values(bias) * np.float32(beta)).astype(np.float32))
        factor = builder.scalar(np.float32(beta))
        return builder.add("Mul", f"{node.name}/bias/scaled", [bias, factor])
