"""Sums and sequences of linear maps over one tensor become one Conv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from onnxq.model import Model, constant, get_metadata, graphs, is_constant
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Builder, Names, consumers, is_graph_output, remove_node
from onnxq.passes.linear_nodes import LINEAR, is_onnx, node_map, per_channel, variable_input

_JOINS = ("Add", "Sub", "Sum")
# Nodes that are reported when they stay: the others are ordinary parts of a model.
_REPORTED = ("BatchNormalization", "Pad")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu")
_SAME_CHANNELS = frozenset((*_ACTIVATIONS, "BatchNormalization", "Identity", "Neg", "AveragePool"))
_SAME_RANK = _SAME_CHANNELS | {"Pad", "MaxPool"}
# Sums nested deeper are folded in several rounds, so that Python's stack is never the limit.
_DEEPEST = 64


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

    @property
    def weights(self) -> int:
        """Number of values in the kernels as they are."""
        return sum(int(np.prod(conv.inputs[1].shape)) for conv in self.convs)


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
        if id(node) in gone or id(node) in reader.barren or not _linear(node):
            continue
        try:
            found = reader.best(node)
        except _NoCandidate:
            continue
        except Unfoldable as reason:
            if reader.is_candidate(node):
                skipped[node.name] = str(reason)
            continue
        if len(found.nodes) < 2 or not found.convs:
            continue
        done.append(_rewrite(model, graph, node, found, names))
        gone |= set(found.nodes)
    return done


def _linear(node: gs.Node) -> bool:
    return (node.op in LINEAR or node.op in _JOINS) and is_onnx(node)


def _check_worth(found: _Expression) -> None:
    """A Conv that is larger than what it replaces is no gain; one beyond float32 is wrong.

    Raises:
        Unfoldable: it is one of these.
    """
    m = found.map
    if m.kernel is None or not found.convs:
        return
    before = found.weights
    if m.parameters > before:
        raise Unfoldable(f"one Conv would have {m.parameters} weights instead of {before}")
    largest = np.finfo(np.float32).max
    if not (np.all(np.abs(m.kernel) <= largest) and np.all(np.abs(m.bias) <= largest)):
        raise Unfoldable("the folded weights would exceed float32")


class _Reader:
    """Reads tensors of one graph as linear expressions."""

    def __init__(self, model: Model, graph: gs.Graph) -> None:
        self._outputs = {id(t) for _, any_graph in graphs(model) for t in any_graph.outputs}
        self._own = {id(node) for node in graph.nodes}
        self._memo: dict[int, _Expression] = {}
        self._frugal = False
        self._failed: dict[int, Unfoldable] = {}  # node -> why it went no deeper
        self.barren: set[int] = set()  # nodes of expressions without a Conv

    def best(self, node: gs.Node) -> _Expression:
        """The deepest expression of a node's output that is worth a Conv.

        First as deep as it goes, since a kernel that is too large on its own may fit beside a
        larger branch; then cutting wherever the weights would grow.

        Raises:
            Unfoldable: there is none; says why.
        """
        reason: Unfoldable | None = None
        for frugal in (False, True):
            self._memo, self._frugal, self._failed = {}, frugal, {}
            try:
                found = self._end(node, 0)
                _check_worth(found)
            except _NoCandidate:
                raise
            except Unfoldable as why:
                reason = reason or why
                continue
            if len(found.nodes) > 1 and found.convs:
                return found
            if not found.convs:
                self.barren |= set(found.nodes) - set(self._failed)
            reason = reason or self._failed.get(id(node))
        if reason is None:
            raise _NoCandidate(f"{node.op} {node.name!r} stands alone")
        raise reason

    def is_candidate(self, node: gs.Node) -> bool:
        """Whether a reader of the report would ask why this node stays."""
        before = [t.inputs[0] for t in node.inputs if t.inputs and id(t.inputs[0]) in self._own]
        after = [n for t in node.outputs for n in consumers(t) if id(n) in self._own]
        near = [n for n in (*before, *after) if _linear(n)]
        if node.op in _REPORTED or _is_join(node):
            return True
        return bool(near) and any(n.op == "Conv" or _is_join(n) for n in (node, *near))

    def _end(self, node: gs.Node, depth: int) -> _Expression:
        if _is_join(node):
            return self._join(node, depth)
        return self._unary(node, depth)

    def _why_source(self, tensor: Any) -> str | None:
        """Why a tensor that a linear node computes is read as it is, if it is."""
        if len(consumers(tensor)) > 1:
            return f"{tensor.name!r} is also read elsewhere"
        if id(tensor) in self._outputs:
            return f"{tensor.name!r} is an output of the graph"
        return None

    def _tensor(self, tensor: Any, depth: int) -> _Expression:
        if id(tensor) not in self._memo:
            self._memo[id(tensor)] = self._read(tensor, depth)
        return self._memo[id(tensor)]

    def _read(self, tensor: Any, depth: int) -> _Expression:
        chain: list[tuple[Any, gs.Node]] = []  # a loop, as a chain may be longer than the stack
        start = tensor
        while id(start) not in self._memo:
            producer = self._linear_producer(start)
            if producer is None or self._why_source(start):
                break
            if _is_join(producer):
                if depth < _DEEPEST:
                    self._memo[id(start)] = self._or_alone(self._join, start, producer, depth + 1)
                break
            chain.append((start, producer))
            x = variable_input(producer)
            if x is None:
                break
            start = x
        for link, producer in reversed(chain):
            self._memo[id(link)] = self._or_alone(self._unary, link, producer, depth)
        return self._memo.get(id(tensor)) or _Expression(tensor, affine(1.0, 0.0))

    @staticmethod
    def _or_alone(
        read: Callable[[gs.Node, int], _Expression], tensor: Any, node: gs.Node, depth: int
    ) -> _Expression:
        try:
            return read(node, depth)
        except Unfoldable:
            return _Expression(tensor, affine(1.0, 0.0))

    def _linear_producer(self, tensor: Any) -> gs.Node | None:
        producer = tensor.inputs[0] if tensor.inputs else None
        own = producer is not None and id(producer) in self._own and _linear(producer)
        return producer if own else None

    def _unary(self, node: gs.Node, depth: int) -> _Expression:
        x = variable_input(node)
        if x is None or (node.inputs[0] is not x and node.op not in ("Add", "Mul", "Sub", "Div")):
            if node.op in ("Mul", "Div"):
                raise _NoCandidate(f"{node.op} {node.name!r} combines two tensors")
            raise Unfoldable(f"the parameters of {node.op} {node.name!r} are not constant")
        inner = self._tensor(x, depth)
        if inner.nodes:
            try:
                whole = _combine(inner, node)
                if self._frugal:
                    _check_worth(whole)
            except Unfoldable as why:
                self._failed[id(node)] = why
            else:
                return whole
        elif node.op != "Conv" and self._linear_producer(x) is not None:
            why_source = self._why_source(x)
            if why_source:
                self._failed[id(node)] = Unfoldable(why_source)
        return _combine(_Expression(x, affine(1.0, 0.0)), node)

    def _join(self, node: gs.Node, depth: int) -> _Expression:
        tensors = [t for t in node.inputs if t.name and not is_constant(t)]
        if not tensors or node.attrs:  # attributes: the broadcast rules before opset 7
            raise _NoCandidate("adds constants, or by rules of old")
        parts = [self._tensor(t, depth) for t in tensors]
        source = parts[0].source
        if any(part.source is not source for part in parts):
            self._explain_sources(tensors, parts)
            raise _NoCandidate("adds branches of different tensors")
        total = parts[0].map
        nodes = {id(node): node, **parts[0].nodes}
        for part in parts[1:]:
            total = add(total, negate(part.map) if node.op == "Sub" else part.map)
            nodes |= part.nodes
        whole = _Expression(source, total, nodes)
        for addend in node.inputs:
            if is_constant(addend):  # of a Sum
                offset = affine(1.0, per_channel(node, addend, _rank(whole, node)))
                whole = _Expression(source, _checked_sequence(whole, offset), nodes)
        if self._frugal:
            _check_worth(whole)
        return whole

    def _explain_sources(self, tensors: list[Any], parts: list[_Expression]) -> None:
        """Branches of one tensor, cut by a reader in their middle, deserve a reason.

        Raises:
            Unfoldable: a branch would start at the same tensor, were it not read elsewhere.
        """
        starts = {id(part.source) for part in parts}
        for tensor, part in zip(tensors, parts, strict=True):
            producer = self._linear_producer(tensor)
            why = self._why_source(tensor)
            if part.nodes or producer is None or not why:
                continue
            deeper = variable_input(producer)
            if deeper is not None and id(deeper) in starts - {id(tensor)}:
                raise Unfoldable(why)


def _is_join(node: gs.Node) -> bool:
    """Whether a node sums tensors: an Add of one tensor and a constant does not."""
    return node.op == "Sum" or (node.op in _JOINS and variable_input(node) is None)


def _combine(inner: _Expression, node: gs.Node) -> _Expression:
    """The expression of a node with one variable input, whose own expression is given."""
    channels = channels_out(inner.map) or _channels(inner.source)
    own = node_map(node, _rank(inner, node), channels)
    if node.op == "BatchNormalization" or own.kernel is not None:
        combined = sequence(inner.map, own)  # these do not broadcast
    else:
        combined = _checked_sequence(inner, own)
    return _Expression(inner.source, combined, {**inner.nodes, id(node): node})


def _checked_sequence(inner: _Expression, own: LinearMap) -> LinearMap:
    """A constant of [channels] makes several channels of one, so their number must be known."""
    if channels_out(own) is not None:
        known = channels_out(inner.map) or _channels(inner.source)
        if known is None:
            raise Unfoldable(f"the channels of {inner.source.name!r} are not known")
        if known != channels_out(own):
            raise Unfoldable(f"a constant makes {channels_out(own)} channels of {known}")
    return sequence(inner.map, own)


def _rank(inner: _Expression, node: gs.Node) -> int | None:
    """Rank of the tensors of an expression."""
    if node.op == "Conv":
        return len(node.inputs[1].shape)
    if inner.convs:
        return len(inner.convs[0].inputs[1].shape)
    for tensor in _like(inner.source, _SAME_RANK):
        if getattr(tensor, "shape", None) is not None:
            return len(tensor.shape)
        for conv in (*tensor.inputs[:1], *_convs_of(tensor)):
            if _has_weight(conv):
                return len(conv.inputs[1].shape)
    return None


def _channels(tensor: Any) -> int | None:
    """Channels of a tensor, from a declared shape or from a Conv beside it."""
    for like in _like(tensor, _SAME_CHANNELS):
        shape = getattr(like, "shape", None)
        if shape is not None and len(shape) > 1 and isinstance(shape[1], int) and shape[1] > 0:
            return int(shape[1])
        for conv in like.inputs[:1]:
            if _has_weight(conv):
                return int(conv.inputs[1].shape[0])
        for conv in _convs_of(like):
            return int(conv.inputs[1].shape[1] * conv.attrs.get("group", 1))
    return None


def _like(tensor: Any, through: frozenset[str]) -> Iterator[Any]:
    """A tensor and those that it comes from by way of some operators with one variable input."""
    for _ in range(_DEEPEST):
        yield tensor
        producer = tensor.inputs[0] if tensor.inputs else None
        before = None if producer is None or producer.op not in through else producer
        if before is None or not is_onnx(before) or variable_input(before) is None:
            return
        tensor = variable_input(before)


def _has_weight(node: gs.Node) -> bool:
    """Whether a node is a Conv with a constant weight."""
    return node.op == "Conv" and is_onnx(node) and is_constant(node.inputs[1])


def _convs_of(tensor: Any) -> list[gs.Node]:
    """The Convs with constant weights that read a tensor."""
    return [node for node in consumers(tensor) if _has_weight(node) and node.inputs[0] is tensor]


def _rewrite(model: Model, graph: gs.Graph, end: gs.Node, found: _Expression, names: Names) -> str:
    """Put one Conv in place of the expression; it takes the name of the largest Conv in it."""
    main = max(found.convs, key=lambda conv: int(np.prod(conv.inputs[1].shape)))
    m = found.map
    assert m.kernel is not None
    weight = constant(_weight_name(model, main, m.kernel.shape, names), m.kernel.astype(np.float32))
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
        metadata=get_metadata(main),
    )
    return str(main.name)


def _weight_name(model: Model, main: gs.Node, shape: tuple[int, ...], names: Names) -> str:
    """The old weight's name where nothing else reads it.

    A weight of another shape gets another name: some exporters declare the shapes of weights.
    """
    old = main.inputs[1]
    free = len(old.outputs) == 1 and not is_graph_output(model, old)
    if free and tuple(old.shape) == tuple(shape):
        return str(old.name)
    return names.tensor(f"{old.name}/folded")
