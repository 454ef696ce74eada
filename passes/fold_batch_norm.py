"""BatchNormalization after Conv or Gemm becomes part of its weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.fold import fold_output_affine
from onnxq.model import Model, constant, graphs, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.batch_norm import affine_of, in_training_mode
from onnxq.passes.edit import Names, consumers, is_graph_output, remove_node


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold a BatchNormalization into the Conv or Gemm before it.

    Given:   Conv|Gemm(W, b) -> BatchNormalization(γ, β, μ, σ², ε)
    Result:  Conv|Gemm with W' = W · γ/√(σ²+ε), b' = (b − μ) · γ/√(σ²+ε) + β
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        names = Names(model)
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op == "BatchNormalization"]:
                reason = self._reason(model, graph, node)
                if reason:
                    skipped[node.name] = reason
                    continue
                self._rewrite(graph, node, names)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)

    def _reason(self, model: Model, graph: gs.Graph, norm: gs.Node) -> str | None:
        x = norm.inputs[0]
        before = x.inputs[0] if x.inputs else None
        if before is None or before.op not in ("Conv", "Gemm"):
            return f"follows {before.op if before is not None else 'an input'}, not Conv or Gemm"
        if not any(before is other for other in graph.nodes):
            return f"{before.op} {before.name!r} is in an outer graph"
        if len(consumers(x)) > 1 or is_graph_output(model, x):
            return f"the output of {before.op} {before.name!r} is also read elsewhere"
        if in_training_mode(norm):
            return "is in training mode"
        if not all(is_constant(t) for t in norm.inputs[1:]):
            return "its parameters are not constant"
        parameters = [t for t in before.inputs[1:] if t.name]
        if not all(is_constant(t) for t in parameters):
            return f"weight or bias of {before.op} {before.name!r} is not constant"
        if before.op == "Gemm":
            if before.attrs.get("alpha", 1.0) != 1.0 or before.attrs.get("beta", 1.0) != 1.0:
                return f"Gemm {before.name!r} has alpha or beta other than 1"
            if len(parameters) > 1 and parameters[1].shape not in _bias_shapes(before):
                return f"Gemm {before.name!r} has a C that is not one value per output channel"
        if any(np.dtype(values(t).dtype) != np.float32 for t in (*parameters, *norm.inputs[1:])):
            return "its or its predecessor's parameters are not float32"
        try:
            affine_of(norm)
        except ValueError as error:
            return str(error)
        return None

    def _rewrite(self, graph: gs.Graph, norm: gs.Node, names: Names) -> None:
        target = norm.inputs[0].inputs[0]
        weight = target.inputs[1]
        bias = target.inputs[2] if len(target.inputs) > 2 and target.inputs[2].name else None
        factor, offset = affine_of(norm)
        new_weight, new_bias = fold_output_affine(
            values(weight),
            None if bias is None else values(bias).reshape(-1),
            factor,
            offset,
            axis=_output_axis(target),
        )
        target.inputs[1] = _successor(weight, new_weight, names, weight.name)
        folded_bias = _successor(bias, new_bias, names, f"{target.name}/bias")
        if len(target.inputs) > 2:
            target.inputs[2] = folded_bias
        else:
            target.inputs.append(folded_bias)
        y = norm.outputs[0]
        remove_node(graph, norm)
        target.outputs[0] = y


def _output_axis(node: gs.Node) -> int:
    return 1 if node.op == "Gemm" and not node.attrs.get("transB", 0) else 0


def _bias_shapes(gemm: gs.Node) -> tuple[tuple[int, ...], ...]:
    out = gemm.inputs[1].shape[_output_axis(gemm)]
    return (out,), (1, out)


def _successor(old: Any, array: Any, names: Names, wanted: str) -> Any:
    """A constant that takes the old one's name, unless other nodes still read the old one."""
    if old is not None and len(old.outputs) == 1:
        return constant(old.name, array)
    return constant(names.tensor(f"{wanted}/folded" if old is not None else wanted), array)
