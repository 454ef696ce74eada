"""Inputs, outputs and value_info of a graph: as in the file where untouched, else made anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from onnx import GraphProto, TypeProto, ValueInfoProto
from onnx.helper import make_sequence_type_proto, make_tensor_type_proto
from onnx_graphsurgeon.ir.tensor import Constant

from onnxq.errors import ModelError
from onnxq.model.dtypes import DATA_TYPE
from onnxq.model.protos import copy_fields, set_text
from onnxq.model.stash import GraphStash, ValueStash


def write_values(
    graph: Any, stash: GraphStash, out: GraphProto, live: Collection[str], kept: Collection[str]
) -> None:
    """Fill in `out.input`, `out.output` and `out.value_info`.

    `live` are the names that the graph still uses, `kept` the initializers that stay inputs.

    Raises:
        ModelError: a new value has a type that ONNX does not have.

    """
    _inputs(graph, stash, out, kept)
    by_id = {id(value.tensor): value for value in stash.outputs if value.tensor is not None}
    outer = {value.proto.name: value for value in stash.outputs if value.tensor is None}
    for tensor in graph.outputs:
        known = by_id.get(id(tensor)) or outer.get(tensor.name)
        _write(out.output.add(), tensor, known)
    _infos(graph, stash, out, live)


def _inputs(graph: Any, stash: GraphStash, out: GraphProto, kept: Collection[str]) -> None:
    waiting = {id(tensor): tensor for tensor in graph.inputs}
    for value in stash.inputs:
        tensor = waiting.pop(id(value.tensor), None)
        if tensor is not None:
            _write(out.input.add(), tensor, value)
        elif value.proto.name in kept:
            out.input.add().CopyFrom(value.proto)
    for tensor in waiting.values():
        _write(out.input.add(), tensor, None)


def _infos(graph: Any, stash: GraphStash, out: GraphProto, live: Collection[str]) -> None:
    used = _by_id([*graph.inputs, *graph.outputs])
    for node in graph.nodes:
        used.update(_by_id(node.inputs))
        used.update(_by_id(node.outputs))
    initializers = {tensor.name for tensor in out.initializer}
    initializers |= {sparse.values.name for sparse in out.sparse_initializer}
    done = set(_by_id([*graph.inputs, *graph.outputs]))
    for value in stash.values:
        tensor = value.tensor
        if tensor is None:  # it described nothing, an unused initializer or an outer tensor
            if (value.proto.name in live) == (value.proto.name in stash.names):
                out.value_info.add().CopyFrom(value.proto)
        elif id(tensor) in used or tensor.name in initializers:
            done.add(id(tensor))
            if id(tensor) not in used and _contradicts(value.proto, out):
                continue  # a new initializer took the name, with another type or shape
            if value.untouched():
                out.value_info.add().CopyFrom(value.proto)
            elif not isinstance(tensor, Constant) and tensor.dtype is not None:
                _write(out.value_info.add(), tensor, value)
    for node in graph.nodes:
        for tensor in node.outputs:
            known = isinstance(tensor, Constant) or tensor.dtype is None
            if tensor.name and not known and id(tensor) not in done:
                done.add(id(tensor))
                _write(out.value_info.add(), tensor, None)


def _contradicts(known: ValueInfoProto, out: GraphProto) -> bool:
    """Whether the initializer of that name has another type or shape than is declared."""
    kind = known.type.tensor_type
    declared = [dim.dim_value for dim in kind.shape.dim]
    return any(
        tensor.name == known.name
        and (tensor.data_type != kind.elem_type or list(tensor.dims) != declared)
        for tensor in out.initializer
    )


def _by_id(tensors: Iterable[Any]) -> dict[int, Any]:
    return {id(tensor): tensor for tensor in tensors}


def _write(out: ValueInfoProto, tensor: Any, known: ValueStash | None) -> None:
    if known is not None and (known.tensor is None or known.untouched()):
        out.CopyFrom(known.proto)
        return
    if known is not None:
        copy_fields(known.proto, out, skip=("type",))
    set_text(out, "name", tensor.name)
    new = _type(tensor)
    if new is not None:
        out.type.CopyFrom(new)


def _type(tensor: Any) -> TypeProto | None:
    dtype = tensor.dtype
    if dtype is None:
        return None
    if isinstance(dtype, TypeProto):
        raise ModelError(
            f"value {tensor.name!r}: onnxq cannot write a changed {tensor.type}: leave its name, "
            "type and shape as they are"
        )
    code = dtype if isinstance(dtype, int) else DATA_TYPE.get(np.dtype(dtype))
    if code is None and np.dtype(dtype).kind in "OUS":
        code = 8  # TensorProto.STRING
    if code is None:
        raise ModelError(f"value {tensor.name!r}: ONNX has no element type for numpy's {dtype}")
    shape = None if tensor.shape is None else [_dim(dim) for dim in tensor.shape]
    plain: TypeProto = make_tensor_type_proto(code, shape)
    kind = "tensor_type" if isinstance(tensor, Constant) else tensor.type
    if kind == "sequence_type":
        return make_sequence_type_proto(plain)
    return plain


def _dim(dim: Any) -> int | str | None:
    if dim is None or isinstance(dim, str):
        return dim or None
    return int(dim) if int(dim) >= 0 else None
