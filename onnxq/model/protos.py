"""Small helpers over ONNX protobuf messages."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from onnx import AttributeProto, GraphProto, NodeProto, SparseTensorProto, TensorProto


def copy_fields(source: Any, target: Any, skip: Collection[str] = ()) -> None:
    """Copy every set field of a message but those in `skip`; whether a field is set is kept too."""
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def set_text(message: Any, field: str, text: str) -> None:
    """Set a text field only where it differs, so that `unset` and `set to ""` stay apart."""
    if getattr(message, field) != text:
        setattr(message, field, text)


def bodies(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The subgraphs of a node, each with its attribute's name."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def label(node: NodeProto, index: int) -> str:
    """How a message names a node."""
    return (
        f"node {node.name!r} ({node.op_type})" if node.name else f"node #{index} ({node.op_type})"
    )


def dense_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers and single tensor attributes, in subgraphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
        for _, body in bodies(node):
            yield from dense_tensors(body)


def other_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Tensors inside sparse tensors and inside lists of tensors, in subgraphs too."""
    for sparse in graph.sparse_initializer:
        yield from _parts(sparse)
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from _parts(sparse)
        for _, body in bodies(node):
            yield from other_tensors(body)


def _parts(sparse: SparseTensorProto) -> Iterator[TensorProto]:
    yield sparse.values
    yield sparse.indices
