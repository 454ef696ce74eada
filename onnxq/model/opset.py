"""Raising the opset of a model, node by node.

onnx's version converter, given a whole model, loses doc strings, metadata and sub-byte types, and
copies all weights. Here it gets one node at a time, with the small constants that node reads, and
only where the operator changed; everything else stays as it is.
"""

from __future__ import annotations

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto
from onnx.helper import OP_SET_ID_VERSION_MAP, make_opsetid

from onnxq.errors import ModelError
from onnxq.model.boundary import build
from onnxq.model.convert import Scope, convert_node
from onnxq.model.export import export
from onnxq.model.protos import bodies, label
from onnxq.model.types import Model

_DEFAULT = ("", "ai.onnx")


def raise_opset(model: Model, version: int) -> Model:
    """A model at opset `version` of the default domain; `model` itself if it is there already.

    Weights are shared with `model`, not copied. Names, doc strings, metadata and nodes of other
    domains stay; nodes that the conversion adds have no name. The IR version rises to the one that
    the opset needs.

    Raises:
        ModelError: the installed onnx does not know the opset, or an operator cannot be converted.

    """
    if version <= model.opset:
        return model
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise ModelError(
            f"opset {version} is unknown to the installed onnx {onnx.__version__} "
            f"(up to {newest}): upgrade onnx"
        )
    skeleton = export(model)
    proto, where = skeleton.proto, str(model.path or "model in memory")
    taken = _all_names(proto.graph)
    step = (model.opset, version)
    _graph(proto.graph, _inferred(proto), where, step, Scope({}, {}, taken))
    _set_opset(proto, version)
    proto.ir_version = max(model.ir_version, _needed_ir(version))
    raised = build(proto, where, model.path, [stub.holder for stub in skeleton.stubs])
    files = model.source.data_files | raised.source.data_files
    raised.source = type(model.source)(proto, model.source.file, files)
    frozen = raised.overridable - model.overridable
    raised.overridable.difference_update(frozen)
    return raised


def _set_opset(proto: ModelProto, version: int) -> None:
    entries = [entry for entry in proto.opset_import if entry.domain in _DEFAULT]
    for entry in entries:
        entry.version = version
    if not entries:
        proto.opset_import.append(make_opsetid("", version))


def _needed_ir(version: int) -> int:
    return int(OP_SET_ID_VERSION_MAP.get(("ai.onnx", version), onnx.IR_VERSION))


def _all_names(graph: GraphProto) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    names |= {tensor.name for tensor in graph.initializer}
    names |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        names |= {*node.input, *node.output}
        for _, body in bodies(node):
            names |= _all_names(body)
    return names


def _inferred(proto: ModelProto) -> GraphProto:
    """The graph with inferred types; the converter needs some. As it is if inference fails."""
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except Exception:  # whatever inference chokes on, conversion may not need it
        return proto.graph


def _types(graph: GraphProto) -> dict[str, TypeProto]:
    known: dict[str, TypeProto] = {}
    for tensor in graph.initializer:
        value = ValueInfoProto()
        value.type.tensor_type.elem_type = tensor.data_type
        for dim in tensor.dims:
            value.type.tensor_type.shape.dim.add().dim_value = dim
        if not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
        known[tensor.name] = value.type
    for info in (*graph.value_info, *graph.input, *graph.output):
        if info.HasField("type"):
            known[info.name] = info.type
    return known


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Small values that a conversion may have to read."""
    small = {t.name: t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _DEFAULT and len(node.output) == 1:
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_location != TensorProto.EXTERNAL:
                    small[node.output[0]] = attribute.t
    return small


def _graph(
    graph: GraphProto, inferred: GraphProto, where: str, step: tuple[int, int], outer: Scope
) -> None:
    scope = outer.inside(_types(inferred), _constants(graph))
    converted: list[NodeProto] = []
    for index, node in enumerate(graph.node):
        typed = inferred.node[index] if index < len(inferred.node) else node
        pairs = zip(bodies(node), bodies(typed), strict=False)
        for (name, body), (_, inner) in pairs:
            _graph(body, inner, f"{where}: {label(node, index)}, {name}", step, scope)
        converted += convert_node(node, f"{where}: {label(node, index)}", step, scope)
    if len(converted) == len(graph.node) and all(
        new is old for new, old in zip(converted, graph.node, strict=True)
    ):
        return
    rebuilt = [NodeProto.FromString(node.SerializeToString()) for node in converted]
    del graph.node[:]
    graph.node.extend(rebuilt)
