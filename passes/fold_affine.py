"""What is multiplied and added after a MatMul or ConvTranspose becomes part of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.fold import fold_output_affine
from onnxq.model import Model, constant, get_metadata, graphs, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.batch_norm import affine_of, in_training_mode
from onnxq.passes.edit import Builder, Names, consumers, is_graph_output, remove_node
from onnxq.passes.weights import Weight, find_weight

Array = npt.NDArray[Any]

_AFFINE = ("Add", "Sub", "Mul", "Div", "BatchNormalization")


@dataclass(frozen=True)
class FoldAffine:
    """Fold per-output-channel constants after a MatMul or ConvTranspose into its weight and bias.

    (After a Conv, FoldLinearBranches does it.)

    Given:   MatMul(x, W) | ConvTranspose(x, W, b) -> Add | Sub | Mul | Div | BatchNormalization …,
             each with constants per output channel
    Result:  MatMul(x, W·s) -> Add(b') | ConvTranspose(x, W·s, b')
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        names = Names(model)
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op in ("MatMul", "ConvTranspose")]:
                weight = _weight(model, node)
                if weight is None:
                    continue
                chain, reason = _chain(model, graph, node, weight)
                if reason:
                    skipped[reason[0]] = reason[1]
                wanted_form = node.op == "MatMul" and [n.op for n in chain] == ["Add"]
                if not chain or wanted_form:
                    continue
                _rewrite(graph, node, weight, chain, names)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)


def _weight(model: Model, node: gs.Node) -> Weight | None:
    found = find_weight(model, node)
    if isinstance(found, str) or found.slot != 1 or "onnxq.term" in get_metadata(node):
        return None
    if node.op == "MatMul":
        return found if len(found.shape) == 2 else None
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    return found if bias is None or is_constant(bias) else None


def _chain(
    model: Model, graph: gs.Graph, node: gs.Node, weight: Weight
) -> tuple[list[gs.Node], tuple[str, str] | None]:
    """The affine nodes that follow, in order, and the node that stopped the search and why."""
    channel_axis = 1 if node.op == "ConvTranspose" else -1
    rank = len(weight.shape) if node.op == "ConvTranspose" else None
    chain: list[gs.Node] = []
    tensor = node.outputs[0]
    while True:
        readers = consumers(tensor)
        if len(readers) != 1 or readers[0].op not in _AFFINE or is_graph_output(model, tensor):
            return chain, None
        reader = readers[0]
        others = [t for t in reader.inputs if t is not tensor]
        if not any(reader is other for other in graph.nodes) or not all(map(is_constant, others)):
            return chain, None
        try:
            _affine(reader, tensor, weight.out, channel_axis, rank)
        except ValueError as error:
            return chain, (reader.name, str(error))
        chain.append(reader)
        tensor = reader.outputs[0]


def _affine(
    node: gs.Node, x: Any, out: int, channel_axis: int, rank: int | None
) -> tuple[Array, Array]:
    """(factor, offset), float64 [out], of one node.

    Raises:
        ValueError: it is not an affine per output channel with constant parameters.
    """
    if rank is None and x.shape is not None:
        rank = len(x.shape)
    if node.op == "BatchNormalization":
        return _batch_norm(node, channel_axis, rank)
    others = [t for t in node.inputs if t is not x]
    if len(others) != 1:
        raise ValueError(f"{node.op} {node.name!r} reads the same tensor twice")
    value = _per_channel(node, values(others[0]), out, channel_axis, rank)
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


def _per_channel(
    node: gs.Node, array: Array, out: int, channel_axis: int, rank: int | None
) -> Array:
    """A constant operand as float64 [out]."""
    limit = rank if rank is not None else 1
    after = 0 if channel_axis == -1 else limit - 2  # axes behind the channels
    lined = (1,) * (limit - array.ndim) + array.shape
    place = len(lined) - 1 - after
    fits = array.ndim <= limit and all(d == 1 for i, d in enumerate(lined) if i != place)
    if array.dtype != np.float32 or not fits or array.size not in (1, out):
        raise ValueError(f"the operand of {node.op} {node.name!r} is not per output channel")
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (out,))


def _batch_norm(node: gs.Node, channel_axis: int, rank: int | None) -> tuple[Array, Array]:
    if channel_axis == -1 and rank != 2:
        raise ValueError(
            f"BatchNormalization {node.name!r} after MatMul: its channels are not known to be the "
            "last axis (the tensor is not declared as [batch, channels])"
        )
    if in_training_mode(node):
        raise ValueError(f"BatchNormalization {node.name!r} is in training mode")
    return affine_of(node)


def _rewrite(
    graph: gs.Graph, node: gs.Node, weight: Weight, chain: list[gs.Node], names: Names
) -> None:
    channel_axis = 1 if node.op == "ConvTranspose" else -1
    rank = len(weight.shape) if node.op == "ConvTranspose" else None
    factor, offset = np.ones(weight.out), np.zeros(weight.out)
    tensor = node.outputs[0]
    for link in chain:
        scale, shift = _affine(link, tensor, weight.out, channel_axis, rank)
        factor, offset = factor * scale, offset * scale + shift
        tensor = link.outputs[0]
    old_bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    matrix, bias = fold_output_affine(
        weight.matrix(), None if old_bias is None else values(old_bias), factor, offset, axis=0
    )
    if not np.array_equal(factor, np.ones(weight.out)):
        old = weight.tensor
        name = old.name if len(old.outputs) == 1 else names.tensor(f"{old.name}/folded")
        node.inputs[1] = constant(name, weight.from_matrix(matrix).reshape(weight.shape))
    output = chain[-1].outputs[0]
    builder = Builder(graph, chain[-1], names, "fold")
    for link in chain:
        names.free_node(link.name)
        remove_node(graph, link)
    builder.back(len(chain) - 1)
    if node.op == "ConvTranspose":
        folded = builder.constant(f"{node.name}/bias", bias)
        node.inputs = [*node.inputs[:2], folded]
        node.outputs[0] = output
    elif np.any(bias):
        folded = builder.constant(f"{node.name}/bias", bias)
        builder.add("Add", f"{node.name}/bias", [node.outputs[0], folded], output=output)
    else:
        node.outputs[0] = output
