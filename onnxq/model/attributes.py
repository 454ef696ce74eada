"""Attributes of a node: those of the file where untouched, else made from gs's value."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto
from onnx.helper import make_attribute
from onnx_graphsurgeon.ir.graph import Graph
from onnx_graphsurgeon.ir.node import Node
from onnx_graphsurgeon.ir.tensor import Constant
from onnx_graphsurgeon.util.misc import convert_to_onnx_attr_type

from onnxq.errors import ModelError
from onnxq.model.dtypes import DATA_TYPE
from onnxq.model.protos import copy_fields, set_text
from onnxq.model.stash import AttributeStash, Holder, NodeStash


class Writer(Protocol):
    """What attributes need of the exporter."""

    def graph(self, graph: Any, out: GraphProto) -> None:
        """Write a body."""

    def tensor(self, out: TensorProto, name: str, holder: Holder) -> None:
        """Write a tensor."""


def write_attributes(node: Any, stash: NodeStash | None, out: NodeProto, writer: Writer) -> None:
    """Write all attributes of a gs node, in the order of the file, then the new ones.

    Attributes of kinds that gs does not read stay as long as the node's operator does.

    Raises:
        ModelError: a value cannot be an ONNX attribute.

    """
    done: set[str] = set()
    for known in stash.attributes if stash else ():
        name = known.proto.name
        if name in node.attrs:
            done.add(name)
            _write(out.attribute.add(), name, node.attrs[name], known, writer)
        elif known.hidden and stash is not None and (node.op, node.domain) == stash.op:
            out.attribute.add().CopyFrom(known.proto)
    for name, value in node.attrs.items():
        if name not in done:
            _write(out.attribute.add(), name, value, None, writer)


def _write(
    out: AttributeProto, name: str, value: Any, known: AttributeStash | None, writer: Writer
) -> None:
    nested = isinstance(value, (Graph, Constant))
    if known is not None and not nested and known.untouched(value):
        out.CopyFrom(known.proto)
        return
    if known is not None and nested and type(value) is type(known.value):
        copy_fields(known.proto, out, skip=("g", "t"))
    if isinstance(value, Graph):
        out.name, out.type = name, AttributeProto.GRAPH
        writer.graph(value, out.g)
    elif isinstance(value, Constant):
        out.name, out.type = name, AttributeProto.TENSOR
        writer.tensor(out.t, value.name, value._values)
    elif isinstance(value, Node.AttributeRef):
        out.name, out.ref_attr_name = name, value.name
        out.type = convert_to_onnx_attr_type(value.type)
    else:
        out.CopyFrom(_plain(name, value))
    if known is not None:
        set_text(out, "doc_string", known.proto.doc_string)


def _plain(name: str, value: Any) -> AttributeProto:
    if isinstance(value, (type, np.dtype)):  # gs lets `to=np.float32` stand for the element type
        value = DATA_TYPE.get(np.dtype(value), value)
    elif isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    try:
        if isinstance(value, (list, tuple)) and not value:
            return make_attribute(name, value, attr_type=AttributeProto.INTS)
        return make_attribute(name, value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"attribute {name!r}: {type(value).__name__} {value!r} cannot be an ONNX attribute"
        ) from error
