"""What is multiplied and added after a MatMul becomes part of its weight and of one bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.fold import batch_norm_affine, fold_output_affine
from onnxq.model import Model, constant, graphs, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Builder, Names, consumers, is_graph_output, remove_node

Array = npt.NDArray[Any]

_AFFINE = ("Add", "Sub", "Mul", "Div", "BatchNormalization")


@dataclass(frozen=True)
class FoldAffineIntoMatMul:
    """Fold per-output-channel constants after a MatMul into its weight and one bias.

    Given:   MatMul(x, W) -> Add(b) -> Mul(s) | Sub | Div | BatchNormalization …, each constant
    Result:  MatMul(x, W·s) -> Add(b·s …)
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        names = Names(model)
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op == "MatMul"]:
                chain, reason = _chain(model, graph, node)
                if chain and reason:
                    skipped[chain[-1].name] = reason
                if not any(n.op != "Add" for n in chain) and len(chain) < 2:
                    continue  # a bare MatMul, or MatMul + Add, is the form wanted
                _rewrite(graph, node, chain, names)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)


def _chain(model: Model, graph: gs.Graph, matmul: gs.Node) -> tuple[list[gs.Node], str | None]:
    """The affine nodes after a MatMul, in order, and what stopped the search."""
    weight = matmul.inputs[1]
    if not is_constant(weight) or values(weight).dtype != np.float32 or len(weight.shape) != 2:
        return [], None
    chain: list[gs.Node] = []
    tensor = matmul.outputs[0]
    while True:
        readers = consumers(tensor)
        if len(readers) != 1 or readers[0].op not in _AFFINE or is_graph_output(model, tensor):
            return chain, None
        node = readers[0]
        if not any(node is other for other in graph.nodes):
            return chain, None
        try:
            _affine(node, tensor, int(weight.shape[1]))
        except ValueError as error:
            return chain, str(error)
        chain.append(node)
        tensor = node.outputs[0]


def _affine(node: gs.Node, x: Any, out: int) -> tuple[Array, Array]:
    """(factor, offset), float64 [out], of one node.

    Raises:
        ValueError: it is not an affine per output channel with constant parameters.
    """
    if node.op == "BatchNormalization":
        return _batch_norm(node, x)
    others = [t for t in node.inputs if t is not x]
    if len(others) != 1 or not is_constant(others[0]):
        raise ValueError(f"the operand of {node.op} {node.name!r} is not constant")
    array = values(others[0])
    rank = len(x.shape) if x.shape is not None else 1
    fits = array.ndim <= max(rank, 1) and all(d == 1 for d in array.shape[:-1])
    if array.dtype != np.float32 or not fits or array.size not in (1, out):
        raise ValueError(f"the operand of {node.op} {node.name!r} is not per output channel")
    value = np.broadcast_to(array.reshape(-1).astype(np.float64), (out,))
    one, zero = np.ones(out), np.zeros(out)
    constant_left = node.inputs[0] is not x
    if node.op == "Add":
        return one, value
    if node.op == "Mul":
        return value, zero
    if node.op == "Sub":
        return (-one, value) if constant_left else (one, -value)
    if constant_left or not np.all(value):
        raise ValueError(f"Div {node.name!r} divides by a tensor or by zero")
    return 1.0 / value, zero


def _batch_norm(node: gs.Node, x: Any) -> tuple[Array, Array]:
    if x.shape is None or len(x.shape) != 2:
        raise ValueError(
            f"BatchNormalization {node.name!r} after MatMul: its channels are not known to be the "
            "last axis (the tensor is not declared as [batch, channels])"
        )
    if node.attrs.get("training_mode", 0) or len([o for o in node.outputs if o.name]) > 1:
        raise ValueError(f"BatchNormalization {node.name!r} is in training mode")
    if not all(is_constant(t) for t in node.inputs[1:]):
        raise ValueError(f"parameters of BatchNormalization {node.name!r} are not constant")
    gamma, beta, mean, variance = (values(t) for t in node.inputs[1:5])
    return batch_norm_affine(gamma, beta, mean, variance, float(node.attrs.get("epsilon", 1e-5)))


def _rewrite(graph: gs.Graph, matmul: gs.Node, chain: list[gs.Node], names: Names) -> None:
    weight = matmul.inputs[1]
    out = int(weight.shape[1])
    factor, offset = np.ones(out), np.zeros(out)
    tensor = matmul.outputs[0]
    for node in chain:
        scale, shift = _affine(node, tensor, out)
        factor, offset = factor * scale, offset * scale + shift
        tensor = node.outputs[0]
    folded, bias = fold_output_affine(values(weight), None, factor, offset, axis=1)
    if not np.array_equal(factor, np.ones(out)):
        alone = len(weight.outputs) == 1
        name = weight.name if alone else names.tensor(f"{weight.name}/folded")
        matmul.inputs[1] = constant(name, folded)
    output = chain[-1].outputs[0]
    builder = Builder(graph, chain[-1], names, "fold")
    for node in chain:
        remove_node(graph, node)
    builder.back(len(chain) - 1)
    if not np.any(bias):
        matmul.outputs[0] = output
        return
    name = f"{matmul.name}/bias"
    names.free_node(chain[0].name if chain[0].name == name else "")
    builder.add("Add", name, [matmul.outputs[0], builder.constant(name, bias)], output=output)
