"""Shapes of the tensors of a model, as far as they can be inferred."""

from __future__ import annotations

import onnx
from onnx import GraphProto, TypeProto

from onnxq.model import Model
from onnxq.model.export import export

Shape = tuple[int | None, ...]


def tensor_shapes(model: Model) -> dict[str, Shape]:
    """Shapes by tensor name, unknown sizes as None; a tensor of unknown rank is not in it.

    onnx says nothing of a Reshape to sizes that are computed, as exporters write it. Its rank is
    the length of the list of sizes all the same.
    """
    proto = export(model).proto  # without the weights, which inference does not need
    graph = _inferred(proto)
    if _add_reshapes(proto.graph, _types(graph)):
        graph = _inferred(proto)
    return {
        name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in shape.dim)
        for name, kind in _types(graph).items()
        if kind.tensor_type.HasField("shape")
        for shape in [kind.tensor_type.shape]
    }


def _inferred(proto: onnx.ModelProto) -> GraphProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except Exception:  # inference raises whatever comes; what is not known is left alone
        return proto.graph


def _types(graph: GraphProto) -> dict[str, TypeProto]:
    return {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}


def _add_reshapes(graph: GraphProto, types: dict[str, TypeProto]) -> bool:
    """Declare the ranks of Reshapes that have none; whether there were any."""
    lengths = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 1}
    for name, kind in types.items():
        dims = kind.tensor_type.shape.dim
        if len(dims) == 1 and dims[0].HasField("dim_value"):
            lengths[name] = dims[0].dim_value
    added = False
    for node in graph.node:
        if node.op_type != "Reshape" or len(node.input) < 2 or node.input[1] not in lengths:
            continue
        known = types.get(node.output[0], TypeProto()).tensor_type
        elem = known.elem_type or types.get(node.input[0], TypeProto()).tensor_type.elem_type
        if elem and not known.HasField("shape"):
            rank = [None] * lengths[node.input[1]]
            info = onnx.helper.make_tensor_value_info(node.output[0], elem, rank)
            graph.value_info.append(info)
            added = True
    return added
