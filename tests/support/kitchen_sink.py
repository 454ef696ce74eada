"""A model with every field of the ONNX format set, and a comparison that names each difference.

`build()` makes the model; `unset_fields()` proves by reflection that no field is left out but
those in `LEFT_OUT`, so that a field of a newer onnx makes the test fail until it is set here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx import helper as oh
from onnx import numpy_helper as nh

LEFT_OUT = {
    "ModelProto.functions": "inlined at load; has its own tests",
    "TensorProto.segment": "ONNX forbids it in a model",
    "TensorProto.external_data": "needs a data file; has its own tests",
    "AttributeProto.ref_attr_name": "exists only inside functions",
}
_SKIPPED_TYPES = {"FunctionProto", "Segment"}


def build() -> ModelProto:
    """The model. onnx.checker accepts it; onnxruntime could not run it."""
    graph = GraphProto(name="kitchen sink")
    _inputs_outputs(graph)
    _initializers(graph)
    _nodes(graph)
    _values(graph)
    annotation = graph.quantization_annotation.add(tensor_name="f")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    model = oh.make_model(
        graph,
        opset_imports=[
            oh.make_opsetid("ai.onnx.ml", 3),
            oh.make_opsetid("", 21),
            oh.make_opsetid("custom", 7),
            oh.make_opsetid("never.used", 2),
        ],
    )
    model.ir_version = min(onnx.IR_VERSION, 11)
    model.producer_name, model.producer_version = "sink", "0.9"
    model.domain, model.model_version = "org.example", 42
    training = model.training_info.add()
    training.initialization.CopyFrom(_tiny("init"))
    training.algorithm.CopyFrom(_tiny("step"))
    training.initialization_binding.add(key="scale", value="init_out")
    training.update_binding.add(key="scale", value="step_out")
    if "configuration" in model.DESCRIPTOR.fields_by_name:
        model.configuration.add(name="two", num_devices=2, device=["a", "b"])
    _dress(model, [0])
    return model


def parse_model(text: str) -> ModelProto:
    """onnx.parser.parse_model, with `[name]` before a node also where onnx is older than 1.18."""
    names = re.findall(r"(?<!\w)\[(\w+)\]\s+(\w+)", text)
    model = onnx.parser.parse_model(re.sub(r"(?<!\w)\[\w+\](?=\s+\w)", "", text))
    nodes = list(_nodes_of(model.graph))
    for name, output in names:
        node = next(n for n in nodes if n.output[0] == output and not n.name)
        node.name = name
    return model


def _nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes_of(attribute.g)


def _inputs_outputs(graph: GraphProto) -> None:
    graph.input.append(oh.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, None]))
    graph.input.append(oh.make_tensor_value_info("default", TensorProto.FLOAT, [2]))
    graph.input.append(oh.make_tensor_value_info("cond", TensorProto.BOOL, []))
    graph.input.append(oh.make_tensor_sequence_value_info("sequence", TensorProto.FLOAT, ["N", 2]))
    graph.input.append(oh.make_tensor_value_info("unused", TensorProto.INT8, []))
    for name in ("y", "z", "maybe"):
        graph.output.append(oh.make_tensor_value_info(name, TensorProto.FLOAT, ["M"]))


def _initializers(graph: GraphProto) -> None:
    arrays = {
        "default": np.ones(2, np.float32),
        "f": np.arange(600, dtype=np.float32).reshape(2, 300),
        "scale": np.float32(0.5),
        "half": np.ones(3, np.float16),
        "flags": np.array([True, False]),
        "words": np.array(["a", "ü"], object),
        "empty": np.zeros((0, 3), np.float32),
        "unread": np.arange(4, dtype=np.int64),
    }
    for name, array in arrays.items():
        graph.initializer.append(nh.from_array(np.asarray(array), name))
    graph.initializer[3].data_location = TensorProto.DEFAULT  # set, though it says nothing
    typed = {
        "typed_f32": (TensorProto.FLOAT, [1.0, 2.0]),
        "typed_f64": (TensorProto.DOUBLE, [1.0, 2.0]),
        "typed_i32": (TensorProto.INT32, [1, -2]),
        "typed_i64": (TensorProto.INT64, [1, -2]),
        "typed_u64": (TensorProto.UINT64, [1, 2]),
        "typed_c64": (TensorProto.COMPLEX64, [1 + 2j, 2.0]),
    }
    for name, (code, numbers) in typed.items():
        graph.initializer.append(oh.make_tensor(name, code, [2], numbers))
    for name in ("BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "INT2", "UINT2"):
        if name in TensorProto.DataType.keys():  # noqa: SIM118 an enum wrapper, no dict
            code = TensorProto.DataType.Value(name)
            bits = {"BFLOAT16": 16, "FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8}.get(name) or int(name[-1])
            size = (3000 * bits + 7) // 8
            graph.initializer.append(
                TensorProto(name=name, data_type=code, dims=[3000], raw_data=bytes([0x21]) * size)
            )
    sparse = graph.sparse_initializer.add()
    sparse.CopyFrom(_sparse("sparse"))


def _sparse(name: str) -> onnx.SparseTensorProto:
    entries = nh.from_array(np.array([1.0, 2.0], np.float32), name)
    indices = oh.make_tensor(f"{name}_indices", TensorProto.INT64, [2], [1, 4])
    return oh.make_sparse_tensor(entries, indices, [2, 3])


def _tiny(name: str) -> GraphProto:
    node = oh.make_node("Constant", [], [f"{name}_out"], value_float=1.0)
    out = oh.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [])
    return oh.make_graph([node], name, [], [out])


def _nodes(graph: GraphProto) -> None:
    int4 = TensorProto(name="packed", data_type=TensorProto.INT4, dims=[3], raw_data=b"\x21\x03")
    graph.node.extend(
        [
            oh.make_node("Constant", [], ["c4"], name="", value=int4),
            oh.make_node("Constant", [], ["cs"], sparse_value=_sparse("")),
            oh.make_node("Clip", ["x", "", "scale"], ["clipped"], name="clip"),
            oh.make_node("Dropout", ["clipped"], ["y", ""], name="drop"),
            _control_flow(),
            _custom(),
        ]
    )


def _control_flow() -> NodeProto:
    bodies = []
    for branch in ("then", "else"):
        inner = oh.make_node("Add", ["clipped", f"{branch}_w"], [f"{branch}_sum"], name="inner_add")
        # the same local name in both branches is legal
        relu = oh.make_node("Mul", [f"{branch}_sum", "f"], ["branch_out"])
        out = ValueInfoProto(name="branch_out")
        body = oh.make_graph([inner, relu], f"{branch} body", [], [out])
        body.initializer.append(nh.from_array(np.full(400, 2.0, np.float32), f"{branch}_w"))
        body.initializer.append(nh.from_array(np.zeros(1, np.int64), f"{branch}_unread"))
        value = oh.make_tensor_value_info(f"{branch}_sum", TensorProto.FLOAT, ["N"])
        body.value_info.append(value)
        body.quantization_annotation.add(tensor_name=f"{branch}_sum")
        bodies.append(body)
    return oh.make_node(
        "If", ["cond"], ["z"], name="choose", then_branch=bodies[0], else_branch=bodies[1]
    )


def _custom() -> NodeProto:
    node = oh.make_node(
        "Everything",
        [
            "sequence",
            "",
            "c4",
            "cs",
            "half",
            "flags",
            "words",
            "empty",
            "INT4",
            "BFLOAT16",
            "sparse",
        ],
        ["maybe", "", "custom_1"],
        name="everything",
        domain="custom",
        overload="second",
        f=1.5,
        i=-3,
        s="text",
        t=nh.from_array(np.arange(3, dtype=np.float32), "inner name"),
        g=_tiny("attribute_graph"),
        tp=oh.make_tensor_type_proto(TensorProto.FLOAT, ["A", 1]),
        floats=[0.1, float("inf")],
        ints=[1, 2],
        strings=["a", "b"],
        tensors=[nh.from_array(np.ones(2, np.float32), "t0")],
        graphs=[_tiny("attribute_graphs")],
        type_protos=[oh.make_tensor_type_proto(TensorProto.INT8, None)],
        sparse_tensor=_sparse("st"),
        sparse_tensors=[_sparse("sts")],
        nan=float("nan"),
    )
    node.attribute.add(name="binary", type=AttributeProto.STRING, s=b"\xff\x00\xfe")
    node.attribute.add(name="no_ints", type=AttributeProto.INTS)
    if "device_configurations" in node.DESCRIPTOR.fields_by_name:
        device = node.device_configurations.add(configuration_id="two", pipeline_stage=1)
        spec = device.sharding_spec.add(tensor_name="half", device=[0, 1])
        spec.index_to_device_group_map.add(key=1, value=[0, 1])
        axis = spec.sharded_dim.add(axis=0)
        axis.simple_sharding.add(dim_value=4, num_shards=2)
        axis.simple_sharding.add(dim_param="N", num_shards=2)
    return node


def _values(graph: GraphProto) -> None:
    tensor = oh.make_tensor_type_proto(TensorProto.FLOAT, ["N"])
    add = graph.value_info.add
    add().CopyFrom(oh.make_tensor_value_info("clipped", TensorProto.FLOAT, ["N", 2, None]))
    add().CopyFrom(oh.make_tensor_value_info("scale", TensorProto.FLOAT, []))
    add().CopyFrom(oh.make_tensor_value_info("unread", TensorProto.INT64, [4]))
    add().CopyFrom(oh.make_tensor_value_info("nobody", TensorProto.INT64, [4]))
    kinds = ValueInfoProto(name="custom_1")
    kinds.type.map_type.key_type = TensorProto.STRING
    kinds.type.map_type.value_type.sequence_type.elem_type.optional_type.elem_type.CopyFrom(tensor)
    add().CopyFrom(kinds)
    add().CopyFrom(oh.make_sparse_tensor_value_info("cs", TensorProto.FLOAT, [2, 3]))
    opaque = ValueInfoProto(name="opaque, of no tensor")
    opaque.type.opaque_type.domain, opaque.type.opaque_type.name = "custom", "thing"
    add().CopyFrom(opaque)


def _dress(message: Any, count: list[int]) -> None:
    """Doc strings, metadata and denotations wherever the format has room for them."""
    fields = message.DESCRIPTOR.fields_by_name
    for name in ("doc_string", "denotation"):
        if name in fields and not message.HasField(name):
            count[0] += 1
            setattr(message, name, f"{name} {count[0]}")
    if "metadata_props" in fields and message.DESCRIPTOR.name != "FunctionProto":
        count[0] += 1
        message.metadata_props.add(key=f"key {count[0]}", value=f"value {count[0]}")
        message.metadata_props.add(key="shared", value="")
    for _, child in _children(message):
        if child.DESCRIPTOR.name != "StringStringEntryProto":
            _dress(child, count)


def _children(message: Any) -> Iterator[tuple[str, Any]]:
    for field, value in message.ListFields():
        for item in value if hasattr(value, "extend") else [value]:
            if hasattr(item, "ListFields"):
                yield field.name, item


def unset_fields(model: ModelProto) -> set[str]:
    """Fields of the format, as `Message.field`, that no message in `model` sets."""
    seen: set[str] = set()

    def visit(message: Any) -> None:
        for field, _ in message.ListFields():
            seen.add(f"{message.DESCRIPTOR.name}.{field.name}")
        for _, child in _children(message):
            visit(child)

    visit(model)
    return _all_fields(ModelProto.DESCRIPTOR, set()) - seen


def _all_fields(descriptor: Any, visited: set[str]) -> set[str]:
    if descriptor.full_name in visited or descriptor.name in _SKIPPED_TYPES:
        return set()
    visited.add(descriptor.full_name)
    found = set()
    for field in descriptor.fields:
        found.add(f"{descriptor.name}.{field.name}")
        if field.message_type is not None:
            found |= _all_fields(field.message_type, visited)
    return found


def differences(one: Any, other: Any, path: str = "model") -> list[str]:
    """Paths at which two messages differ; whether a field is set counts, NaN equals NaN."""
    if not hasattr(one, "ListFields"):
        if isinstance(one, float) and math.isnan(one) and math.isnan(other):
            return []
        return [] if one == other else [f"{path}: {str(one)[:60]!r} != {str(other)[:60]!r}"]
    found = []
    left = {field.name: value for field, value in one.ListFields()}
    right = {field.name: value for field, value in other.ListFields()}
    for name in sorted(left.keys() | right.keys()):
        here = f"{path}.{name}"
        if name not in right or name not in left:
            found.append(f"{here}: {'lost' if name in left else 'added'}")
        elif not hasattr(left[name], "extend"):
            found += differences(left[name], right[name], here)
        elif len(left[name]) != len(right[name]):
            found.append(f"{here}: {len(left[name])} entries became {len(right[name])}")
        elif left[name] != right[name]:
            for index, pair in enumerate(zip(left[name], right[name], strict=True)):
                found += differences(*pair, f"{here}[{index}]")
    return found
