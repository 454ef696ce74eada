"""Computing a tensor that depends on constants alone, in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper
from onnx_graphsurgeon.ir.tensor import Constant, LazyValues

from onnxq.errors import ModelError
from onnxq.model.dtypes import Array
from onnxq.model.stored import to_tensor
from onnxq.model.types import Model

_FATAL_ONLY = 4


def evaluate(model: Model, nodes: Sequence[Any], output: Any) -> Array:
    """The values of `output`, which `nodes`, in graph order, compute from constants.

    Args:
        model: the model that the nodes belong to; its opset decides what they mean.
        nodes: nodes with plain attributes (numbers, strings, lists), reading constants and each
            other.
        output: an output of the last one.

    Raises:
        ModelError: onnxruntime cannot compute it, or cannot hand over its element type.

    """
    graph = GraphProto(name="constants")
    seen: set[str] = set()
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, Constant) and tensor.name not in seen:
                seen.add(tensor.name)
                graph.initializer.append(_tensor(tensor))
        names = [t.name for t in node.inputs], [t.name for t in node.outputs]
        graph.node.append(helper.make_node(node.op, *names, **plain_attributes(node)))
    graph.output.append(ValueInfoProto(name=output.name))
    proto = ModelProto(ir_version=max(model.ir_version, 4), graph=graph)
    proto.opset_import.append(helper.make_opsetid("", model.opset))
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        result: Array = session.run(None, {})[0]
    except Exception as error:  # onnxruntime raises many unrelated types
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"constant {output.name!r} cannot be computed: {reason}") from None
    return result


def plain_attributes(node: Any) -> dict[str, Any]:
    """A node's attributes as onnx.helper takes them (gs has its own tensors and dtypes)."""
    attributes = {
        name: _tensor(value) if isinstance(value, Constant) else value
        for name, value in node.attrs.items()
    }
    if "to" in attributes:
        attributes["to"] = element_type(attributes["to"])
    return attributes


def _tensor(constant: Any) -> TensorProto:
    held = constant._values
    return to_tensor(constant.name, held.load() if isinstance(held, LazyValues) else held)


def element_type(kind: Any) -> int:
    """`onnx.TensorProto` element type of what gs calls a dtype: a numpy dtype, or the number."""
    return kind if isinstance(kind, int) else int(helper.np_dtype_to_tensor_dtype(kind))
