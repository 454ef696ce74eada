"""What must hold before gs sees a model: one producer per name, nothing dangling, no cycle.

gs itself accepts all of this in silence and then works on something else than the file says.
"""

from __future__ import annotations

from collections.abc import Set

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from onnxq.errors import ModelError
from onnxq.model.external import is_external
from onnxq.model.order import sort_nodes
from onnxq.model.protos import bodies, dense_tensors, label, other_tensors

_MOST_AXES = 32  # of numpy 1; numpy 2 holds 64


def check_structure(proto: ModelProto, where: str) -> None:
    """Check the whole model; nodes that are not in topological order are sorted in place.

    Raises:
        ModelError: names the node and the tensor.

    """
    _check_opset(proto, where)
    _check_tensors(proto, where)
    _check_graph(proto.graph, where, frozenset())


def _check_opset(proto: ModelProto, where: str) -> None:
    declared = any(entry.domain in ("", "ai.onnx") for entry in proto.opset_import)
    if declared or proto.ir_version < 3:  # before IR 3 the opset was 1 without saying so
        return
    for index, node in enumerate(proto.graph.node):
        if node.domain in ("", "ai.onnx"):
            raise ModelError(
                f"{where}: {label(node, index)} is a standard operator, but the model imports no "
                "opset for the default domain: add it to opset_import"
            )


def _check_tensors(proto: ModelProto, where: str) -> None:
    for tensor in dense_tensors(proto.graph):
        if tensor.data_type == getattr(TensorProto, "FLOAT8E4M3FNUZ", None):
            raise ModelError(
                f"{where}: tensor {tensor.name!r} has type FLOAT8E4M3FNUZ, which "
                "onnx-graphsurgeon turns into FLOAT8E4M3FN (every value doubled): store it as "
                "FLOAT8E4M3FN or FLOAT16"
            )
        if len(tensor.dims) > _MOST_AXES:
            raise ModelError(
                f"{where}: tensor {tensor.name!r} has {len(tensor.dims)} dimensions, more than the "
                f"{_MOST_AXES} that numpy can hold"
            )
    rare = list(other_tensors(proto.graph))
    for info in proto.training_info:
        for graph in (info.initialization, info.algorithm):
            rare += [*dense_tensors(graph), *other_tensors(graph)]
    for tensor in rare:
        if is_external(tensor):
            raise ModelError(
                f"{where}: tensor {tensor.name!r} is part of a sparse tensor, a list of tensors or "
                "training information and lies in an external file, which is not supported: "
                "embed it (onnx.load and onnx.save do)"
            )


def _check_graph(graph: GraphProto, where: str, outer: Set[str]) -> None:
    defined = _definitions(graph, where, outer)
    visible = outer | set(defined)
    for index, node in enumerate(graph.node):
        for name in node.input:
            if name and name not in visible:
                raise ModelError(
                    f"{where}: {label(node, index)} reads {name!r}, which nothing produces: "
                    "repair the model or export it again"
                )
        _check_attributes(node, index, where)
    for value in graph.output:
        if value.name not in visible:
            raise ModelError(
                f"{where}: graph output {value.name!r} is produced by nothing: "
                "repair the model or export it again"
            )
    sort_nodes(graph, where)
    before = outer | (set(defined) - {name for node in graph.node for name in node.output})
    for index, node in enumerate(graph.node):
        for attribute, body in bodies(node):
            inside = f"{where}: {label(node, index)}, {attribute}"
            _check_graph(body, inside, before)
        before |= {name for name in node.output if name}


def _definitions(graph: GraphProto, where: str, outer: Set[str]) -> dict[str, str]:
    """Each name the graph defines and what defines it."""
    defined: dict[str, str] = {}

    def define(name: str, what: str) -> None:
        if name in defined:
            raise ModelError(
                f"{where}: {name!r} is defined twice, by {defined[name]} and by {what}: "
                "give each tensor its own name"
            )
        if name in outer:
            raise ModelError(
                f"{where}: {what} defines {name!r}, which the outer graph already defines: "
                "give each tensor its own name"
            )
        defined[name] = what

    inputs = [value.name for value in graph.input]
    for name in inputs:
        define(name, "a graph input")
    initialized = [(t.name, "initializer") for t in graph.initializer]
    initialized += [(s.values.name, "sparse initializer") for s in graph.sparse_initializer]
    seen: set[str] = set()
    for name, what in initialized:
        if name in seen:
            raise ModelError(
                f"{where}: two initializers are named {name!r}: give each its own name"
            )
        seen.add(name)
        if name not in inputs:  # an initializer may be the default of a graph input
            define(name, f"an {what}" if what == "initializer" else f"a {what}")
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name:
                define(name, label(node, index))
    return defined


def _check_attributes(node: NodeProto, index: int, where: str) -> None:
    seen: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in seen:
            raise ModelError(
                f"{where}: {label(node, index)} has two attributes {attribute.name!r}: "
                "repair the model or export it again"
            )
        seen.add(attribute.name)
        if attribute.type == AttributeProto.UNDEFINED:
            raise ModelError(
                f"{where}: {label(node, index)} has the attribute {attribute.name!r} without a "
                "type: export the model again with IR version 2 or newer"
            )
