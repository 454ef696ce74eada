"""Model-local functions are inlined, so that a pass meets only operators."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, inliner

from onnxq.errors import ModelError
from onnxq.model.protos import bodies


def inline_functions(proto: ModelProto, where: str) -> ModelProto:
    """The model without functions; the weights do not pass through the inliner.

    Functions may call functions. Domains that only a function body imports are added to the
    model's imports.

    Raises:
        ModelError: a function cannot be inlined.

    """
    if not proto.functions:
        return proto
    _refuse_recursion(proto, where)
    light = ModelProto()
    light.CopyFrom(proto)
    for tensor in light.graph.initializer:
        bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        tensor.CopyFrom(bare)
    inlined, reason = _inline(light)
    if inlined is None or inlined.functions:
        names = {f"{f.domain}.{f.name}" for f in (inlined or proto).functions}
        raise ModelError(
            f"{where}: cannot inline the function {', '.join(sorted(names))} ({reason}): "
            "inline it with onnx.inliner.inline_local_functions, or export without functions"
        )
    for tensor, source in zip(inlined.graph.initializer, proto.graph.initializer, strict=True):
        tensor.CopyFrom(source)
    _import_domains(proto, inlined)
    return inlined


def _refuse_recursion(proto: ModelProto, where: str) -> None:
    """Onnx 1.17 crashes on a function that calls itself."""
    calls = {(f.domain, f.name): _called(f.node) for f in proto.functions}
    finished: set[tuple[str, str]] = set()
    while True:
        leaves = {key for key, called in calls.items() if not (called & calls.keys()) - finished}
        if leaves <= finished:
            break
        finished |= leaves
    for domain, name in calls.keys() - finished:
        raise ModelError(
            f"{where}: the function {domain}.{name} calls itself, directly or through another "
            "function, which ONNX forbids: export the model without functions"
        )


def _called(nodes: Iterable[NodeProto]) -> set[tuple[str, str]]:
    found = set()
    for node in nodes:
        found.add((node.domain, node.op_type))
        for _, body in bodies(node):
            found |= _called(body.node)
    return found


def _inline(light: ModelProto) -> tuple[ModelProto | None, str]:
    """Without version conversion if that does, else with it."""
    reason = "it imports another opset than the model"
    result: ModelProto | None = None
    for convert in (False, True):
        try:
            result = inliner.inline_local_functions(light, convert)
        except Exception as error:  # the C++ inliner raises several types
            reason = str(error).strip().partition("\n")[0]
            continue
        if not result.functions:
            break
    return result, reason


def _import_domains(source: ModelProto, inlined: ModelProto) -> None:
    known = {entry.domain for entry in inlined.opset_import}
    used = set(_domains(inlined.graph))
    for function in source.functions:
        for entry in function.opset_import:
            if entry.domain in used - known:
                inlined.opset_import.add().CopyFrom(entry)
                known.add(entry.domain)


def _domains(graph: GraphProto) -> set[str]:
    found = {node.domain for node in graph.node}
    for node in graph.node:
        for _, body in bodies(node):
            found |= _domains(body)
    return found
