"""Sums and sequences of linear maps over one tensor become one Conv."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.linear_map import (
    LinearMap,
    Unfoldable,
    add,
    affine,
    channels_out,
    negate,
    sequence,
)
from onnxq.model import Model, constant, graphs, is_constant
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Builder, Names, consumers, is_graph_output, remove_node
from onnxq.passes.linear_nodes import LINEAR, node_map, variable_input

_JOINS = ("Add", "Sub", "Sum")
# Nodes that are reported when they stay: the others are ordinary parts of a model.
_REPORTED = ("BatchNormalization", "Pad")


class _NoCandidate(Unfoldable):
    """An ordinary part of a model, with nothing to report: a residual Add, say."""


@dataclass(frozen=True, eq=False)
class _Expression:
    """A tensor as a linear map of another one."""

    source: Any
    map: LinearMap
    nodes: dict[int, gs.Node] = field(default_factory=dict)

    @property
    def convs(self) -> list[gs.Node]:
        return [node for node in self.nodes.values() if node.op == "Conv"]


@dataclass(frozen=True)
class FoldLinearBranches:
    """Fold every sub-graph that is a sum or sequence of linear maps of one tensor into one Conv.

    Linear maps are Conv, BatchNormalization, identity, Mul / Div / Add / Sub / Neg per channel,
    AveragePool and Pad with zeros. RepVGG, MobileOne, ACNet, DBB and RepConv blocks are such
    sub-graphs. Kernels are padded to a common size; groups, strides and dilations are kept. What
    would change a border, or need more weights than before, is left alone.

    Given:   x -> Conv -> BatchNormalization ┐
             x -> Conv -> BatchNormalization ┼ Add -> y
             x -> BatchNormalization         ┘
    Result:  x -> Conv -> y, with W = Σ pad(K_b)·γ_b/σ_b and b = Σ (β_b − μ_b·γ_b/σ_b)
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        names = Names(model)
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            while True:  # each round takes nodes away, so it ends
                skipped_here: dict[str, str] = {}
                done = _sweep(model, graph, names, skipped_here)
                rewritten += done
                if not done:
                    skipped |= skipped_here
                    break
        return PassResult(tuple(rewritten), skipped)


def _sweep(model: Model, graph: gs.Graph, names: Names, skipped: dict[str, str]) -> list[str]:
    """Try every linear node as the end of a sub-graph, the last ones first."""
    done: list[str] = []
    gone: set[int] = set()
    reader = _Reader(model, graph)
    for node in reversed(list(graph.nodes)):
        if id(node) in gone or not (node.op in LINEAR or node.op in _JOINS):
            continue
        try:
            found = reader.end(node)
            _check_worth(found)
        except _NoCandidate:
            continue
        except Unfoldable as reason:
            if node.op in _REPORTED or (node.op in _JOINS and variable_input(node) is None):
                skipped[node.name] = str(reason)
            continue
        if len(found.nodes) < 2 or not found.convs:
            continue
        done.append(_rewrite(graph, node, found, names))
        gone |= set(found.nodes)
    return done


def _check_worth(found: _Expression) -> None:
    before = sum(int(np.prod(conv.inputs[1].shape)) for conv in found.convs)
    if found.convs and found.map.parameters > before:
        raise Unfoldable(f"one Conv would have {found.map.parameters} weights instead of {before}")


class _Reader:
    """Reads tensors of one graph as linear expressions."""

    def __init__(self, model: Model, graph: gs.Graph) -> None:
        self._model = model
        self._own = {id(node) for node in graph.nodes}

    def end(self, node: gs.Node) -> _Expression:
        """The expression of a node's output, as deep as it goes."""
        if node.op in _JOINS and variable_input(node) is None:
            return self._join(node)
        return self._unary(node)

    def _tensor(self, tensor: Any) -> _Expression:
        producer = tensor.inputs[0] if tensor.inputs else None
        if (
            producer is None
            or id(producer) not in self._own
            or not (producer.op in LINEAR or producer.op in _JOINS)
            or len(consumers(tensor)) > 1
            or is_graph_output(self._model, tensor)
        ):
            return _Expression(tensor, affine(1.0, 0.0))
        try:
            return self.end(producer)
        except Unfoldable:
            return _Expression(tensor, affine(1.0, 0.0))

    def _unary(self, node: gs.Node) -> _Expression:
        x = variable_input(node)
        if x is None or (node.inputs[0] is not x and node.op not in ("Add", "Mul", "Sub")):
            raise Unfoldable(f"the parameters of {node.op} {node.name!r} are not constant")
        inner = self._tensor(x)
        rank = _rank(inner, node)
        channels = channels_out(inner.map) or _channels(inner.source)
        own = node_map(node, rank, channels)
        try:
            combined = _sequence(inner, own, node)
        except Unfoldable:
            if not inner.nodes:
                raise
            alone = _Expression(x, affine(1.0, 0.0))
            return replace(alone, map=_sequence(alone, own, node), nodes={id(node): node})
        return _Expression(inner.source, combined, {**inner.nodes, id(node): node})

    def _join(self, node: gs.Node) -> _Expression:
        if not all(t.name and not is_constant(t) for t in node.inputs):
            raise _NoCandidate("adds a constant to several tensors")
        parts = [self._tensor(t) for t in node.inputs]
        source = parts[0].source
        if any(part.source is not source for part in parts):
            raise _NoCandidate("adds branches of different tensors")
        total = parts[0].map
        nodes = {id(node): node, **parts[0].nodes}
        for part in parts[1:]:
            total = add(total, negate(part.map) if node.op == "Sub" else part.map)
            nodes |= part.nodes
        return _Expression(source, total, nodes)


def _sequence(inner: _Expression, own: LinearMap, node: gs.Node) -> LinearMap:
    broadcasts = own.kernel is None and channels_out(own) not in (None, 1)
    if broadcasts and not inner.nodes and node.op != "BatchNormalization":
        known = _channels(inner.source)
        if known != channels_out(own):
            raise Unfoldable(f"the channels of {inner.source.name!r} are not known")
    return sequence(inner.map, own)


def _rank(inner: _Expression, node: gs.Node) -> int | None:
    """Rank of the tensors of an expression."""
    for conv in (*inner.convs, node):
        if conv.op == "Conv":
            return len(conv.inputs[1].shape)
    shape = getattr(inner.source, "shape", None)
    if shape is not None:
        return len(shape)
    return next((len(n.inputs[1].shape) for n in inner.source.outputs if n.op == "Conv"), None)


def _channels(tensor: Any) -> int | None:
    """Channels of a tensor, from its declared shape or from a Conv beside it."""
    shape = getattr(tensor, "shape", None)
    if shape is not None and len(shape) > 1 and isinstance(shape[1], int) and shape[1] > 0:
        return int(shape[1])
    if tensor.inputs and tensor.inputs[0].op == "Conv":
        return int(tensor.inputs[0].inputs[1].shape[0])
    for node in tensor.outputs:
        if node.op == "Conv" and is_constant(node.inputs[1]) and node.inputs[0] is tensor:
            return int(node.inputs[1].shape[1] * node.attrs.get("group", 1))
    return None


def _rewrite(graph: gs.Graph, end: gs.Node, found: _Expression, names: Names) -> str:
    """Put one Conv in place of the expression; it takes the name of the largest Conv in it."""
    main = max(found.convs, key=lambda conv: int(np.prod(conv.inputs[1].shape)))
    m = found.map
    assert m.kernel is not None
    weight = constant(_weight_name(main, names), m.kernel.astype(np.float32))
    inputs = [found.source, weight]
    if not m.keeps_zero:
        bias = np.broadcast_to(m.bias, (m.kernel.shape[0],)).astype(np.float32)
        inputs.append(constant(names.tensor(f"{main.name}/bias"), bias))
    builder = Builder(graph, end, names, "fold")
    output = end.outputs[0]
    for node in found.nodes.values():
        remove_node(graph, node)
    builder.back(len(found.nodes) - 1)
    names.free_node(main.name)
    builder.add(
        "Conv",
        main.name,
        inputs,
        attrs={
            "kernel_shape": list(m.kernel.shape[2:]),
            "strides": list(m.strides),
            "dilations": list(m.dilations),
            "pads": [*m.begin, *m.end],
            "group": m.groups,
        },
        output=output,
        metadata={},
    )
    return str(main.name)


def _weight_name(main: gs.Node, names: Names) -> str:
    """The old weight's name where nothing else reads it."""
    old = main.inputs[1]
    return str(old.name) if len(old.outputs) == 1 else names.tensor(f"{old.name}/folded")
