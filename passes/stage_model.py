"""Some nodes of a model as a model of their own, and what has to be known to cut them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, TypeProto

from onnxq.model import Model
from onnxq.model.export import export
from onnxq.model.types import Source

# What onnxruntime's Python API hands over.
_PORTABLE = frozenset(
    TensorProto.DataType.Value(name)
    for name in (
        *("FLOAT", "DOUBLE", "FLOAT16", "BOOL", "STRING"),
        *("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
    )
)


def reads(node: gs.Node) -> Iterator[Any]:
    """The tensors that a node reads, those that its bodies take from around it included."""
    yield from (tensor for tensor in node.inputs if tensor.name)
    for body in node.attrs.values():
        if isinstance(body, gs.Graph):
            own = {t.name for t in body.inputs} | {t.name for n in body.nodes for t in n.outputs}
            inner = [t for n in body.nodes for t in reads(n)]
            yield from (t for t in (*inner, *body.outputs) if t.name not in own)


def is_portable(kind: TypeProto | None) -> bool:
    """Whether a tensor can leave a session; one of unknown type is told so when it has to."""
    return kind is None or kind.tensor_type.elem_type in _PORTABLE


def tensor_types(model: Model) -> dict[str, TypeProto]:
    """Types of the tensors of the main graph, as far as onnx can infer them without the weights.

    What the file declares stands only where inference knows no shape, since it may be outdated.
    """
    proto = export(model).proto
    declared = {value.name: value.type for value in proto.graph.value_info}
    del proto.graph.value_info[:]
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except Exception:  # inference raises whatever comes; who needs a type says what is missing
        graph = proto.graph
    found = {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}
    vague = {name for name, kind in found.items() if not kind.tensor_type.HasField("shape")}
    return {**found, **{n: t for n, t in declared.items() if n in vague or n not in found}}


def as_model(
    model: Model, nodes: Sequence[gs.Node], inputs: Sequence[Any], outputs: Sequence[Any]
) -> Model:
    """A model of some nodes of another one, which share their constants with it."""
    graph = gs.Graph(
        nodes,
        inputs,
        outputs,
        name=model.graph.name,
        opset=model.graph.opset,
        import_domains=model.graph.import_domains,
        producer_name="onnxq",
        ir_version=model.ir_version,
    )
    source = Source(ModelProto(producer_name="onnxq"), model.source.file, model.source.data_files)
    return Model(graph, None, set(), source)
