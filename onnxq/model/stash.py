"""What gs does not carry, kept beside its objects: on a node, or on a graph, under `_onnxq`.

A stash belongs to one gs object and goes with it: a node that a pass edits keeps its doc string,
a node that a pass removes takes its own along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
)
from onnx_graphsurgeon.ir.tensor import Constant, SparseValues

from onnxq.model.protos import bodies
from onnxq.model.stored import Stored

Holder = Any  # Stored, gs.SparseValues or a numpy array: what a gs.Constant holds
Resolve = Callable[[TensorProto], Holder]
_KEY = "_onnxq"


@dataclass(frozen=True)
class AttributeStash:
    """One attribute of the file; `value` is gs's object for it, `state` what that was at load."""

    proto: AttributeProto
    hidden: bool  # of a kind that gs does not read
    value: Any
    state: Any

    def untouched(self, value: Any) -> bool:
        """True if gs's value is still the one of the file."""
        if isinstance(self.state, tuple):
            return value is self.value and bool(attribute_state(value) == self.state)
        return value is self.value or (type(value) is type(self.value) and value == self.value)


@dataclass(frozen=True)
class NodeStash:
    """One node of the file."""

    proto: NodeProto
    op: tuple[str, str | None]
    attributes: tuple[AttributeStash, ...]


@dataclass(frozen=True)
class ValueStash:
    """One input, output or value_info of the file; `tensor` is None where gs has no use of it."""

    proto: ValueInfoProto
    tensor: Any
    state: Any

    def untouched(self) -> bool:
        """True if name, type and shape are still those of the file."""
        return bool(value_state(self.tensor) == self.state)


@dataclass(frozen=True)
class InitializerStash:
    """One initializer of the file; `constant` is None if no node reads it."""

    name: str
    constant: Any
    holder: Holder


@dataclass
class GraphStash:
    """One graph of the file."""

    proto: GraphProto
    inputs: list[ValueStash] = field(default_factory=list)
    outputs: list[ValueStash] = field(default_factory=list)
    values: list[ValueStash] = field(default_factory=list)
    initializers: list[InitializerStash] = field(default_factory=list)
    names: frozenset[str] = frozenset()  # every name in the graph at load


def stash_of(item: Any) -> Any:
    """The stash of a gs node or graph, or None (gs graphs log an error on a plain getattr)."""
    return vars(item).get(_KEY)


def value_state(tensor: Any) -> Any:
    """What a pass can change about a value."""
    if isinstance(tensor, Constant):
        return (tensor.name, "constant", tuple(tensor.shape), str(tensor.dtype))
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return (tensor.name, tensor.dtype, shape, tensor.type)


def attribute_state(value: Any) -> Any:
    """What a pass can change inside an attribute's value; None where identity says it all."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Constant):
        return (id(value._values),)
    return None


class _Level:
    """Names of one graph while it is paired with its proto, inside those of its outer graphs."""

    def __init__(self, proto: GraphProto, outer: _Level | None) -> None:
        self.outer = outer
        self.tensors: dict[str, Any] = {}
        self.declared = {value.name for value in proto.input}
        self.declared |= {tensor.name for tensor in proto.initializer}
        self.declared |= {sparse.values.name for sparse in proto.sparse_initializer}
        self.declared |= {name for node in proto.node for name in node.output}

    def add(self, tensor: Any) -> None:
        level: _Level | None = self
        while tensor.name and level is not None:
            if tensor.name in level.declared:
                level.tensors.setdefault(tensor.name, tensor)
                return
            level = level.outer


class Attacher:
    """Walks a gs graph beside the proto it was made from, and leaves the stashes."""

    def __init__(self, resolve: Resolve, overridable: Collection[str]) -> None:
        self.resolve = resolve
        self.overridable = overridable

    def graph(self, graph: Any, proto: GraphProto, outer: _Level | None = None) -> None:
        """Stash what `graph` and everything inside it lost."""
        level = _Level(proto, outer)
        for tensor in (*graph.inputs, *graph.outputs):
            if tensor.name in level.declared:  # a body may give out an outer tensor by its name
                level.add(tensor)
        for node, source in zip(graph.nodes, proto.node, strict=True):
            for tensor in (*node.inputs, *node.outputs):
                level.add(tensor)
            self._node(node, source, level)
        stash = GraphStash(proto)
        self._initializers(stash, level, self.overridable if outer is None else None)
        stash.inputs = _values(proto.input, level.tensors)
        stash.outputs = _values(proto.output, level.tensors)
        stash.values = _values(proto.value_info, level.tensors)
        stash.names = frozenset(level.tensors) | level.declared
        setattr(graph, _KEY, stash)

    def _node(self, node: Any, proto: NodeProto, level: _Level) -> None:
        for name, body in bodies(proto):
            inner = node.attrs.get(name)
            if hasattr(inner, "nodes"):
                self.graph(inner, body, level)
        stashed = []
        for attribute in proto.attribute:
            hidden = attribute.name not in node.attrs
            value = node.attrs.get(attribute.name)
            if isinstance(value, Constant):
                value._values = self.resolve(attribute.t)
            stashed.append(AttributeStash(attribute, hidden, value, attribute_state(value)))
        setattr(node, _KEY, NodeStash(proto, (node.op, node.domain), tuple(stashed)))
        node.metadata = {entry.key: entry.value for entry in proto.metadata_props}

    def _initializers(
        self, stash: GraphStash, level: _Level, overridable: Collection[str] | None
    ) -> None:
        inputs = frozenset(value.name for value in stash.proto.input)
        names = inputs if overridable is None else overridable
        for tensor in stash.proto.initializer:
            holder = self.resolve(tensor)
            if tensor.name in inputs and isinstance(holder, Stored):
                holder.overridable = (names, tensor.name)
            constant = level.tensors.get(tensor.name)
            if constant is not None:
                constant._values = holder
            stash.initializers.append(InitializerStash(tensor.name, constant, holder))
        for sparse in stash.proto.sparse_initializer:
            name = sparse.values.name
            values = SparseValues(sparse)
            if name in inputs:
                values.overridable = (names, name)
            constant = level.tensors.get(name)
            if constant is not None:
                constant._values = values
            stash.initializers.append(InitializerStash(name, constant, values))


def _values(protos: Iterable[ValueInfoProto], tensors: dict[str, Any]) -> list[ValueStash]:
    stashed = []
    for proto in protos:
        tensor = tensors.get(proto.name)
        state = None if tensor is None else value_state(tensor)
        stashed.append(ValueStash(proto, tensor, state))
    return stashed
