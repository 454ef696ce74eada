"""What passes do to the graph reaches the file, and what they leave alone stays."""

from __future__ import annotations

from pathlib import Path

import kitchen_sink
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import AttributeProto, ModelProto, TensorProto
from onnx import helper as oh

from onnxq.errors import ModelError
from onnxq.model import (
    Model,
    constant,
    get_metadata,
    graphs,
    load,
    save,
    set_metadata,
    to_proto,
    values,
)


def _source() -> ModelProto:
    proto = kitchen_sink.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        agraph (float[N, 4] x, bool c) => (float[N, 4] y)
        <float[4] w = {1, 2, 3, 4}, float[4] outer = {1, 1, 1, 1}, float[4] idle = {0, 0, 0, 0}>
        {
          [neg] a = Neg (x)
          [add] b = Add (a, w)
          [elu] e = Elu <alpha = 2.0> (b)
          [if] y = If (c) <then_branch = t () => (float[N, 4] p) { [in] p = Mul (e, outer) },
                           else_branch = f () => (float[N, 4] q) { q = Abs (e) }>
        }"""
    )
    for name in "abe":
        value = oh.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])
        value.doc_string = f"value {name}"
        proto.graph.value_info.append(value)
        proto.graph.quantization_annotation.add(tensor_name=name)
    for node in proto.graph.node:
        node.doc_string = f"node {node.name}"
        node.metadata_props.add(key="who", value=node.name)
    return proto


def _node(model: Model, name: str) -> gs.Node:
    (found,) = [n for _, graph in graphs(model) for n in graph.nodes if n.name == name]
    return found


def _proto_node(proto: ModelProto, name: str) -> onnx.NodeProto:
    (found,) = [node for node in proto.graph.node if node.name == name]
    return found


def test_metadata_of_old_and_new_nodes() -> None:
    model = load(_source())
    assert get_metadata(_node(model, "add")) == {"who": "add"}
    set_metadata(_node(model, "add"), {"onnxq.pass": "fold"}, term="0")
    relu = gs.Node("Relu", "new", inputs=[_node(model, "elu").outputs[0]])
    relu.outputs = [gs.Variable("unused", np.float32, None)]
    relu.metadata = {"onnxq.pass": "expand"}
    model.graph.nodes.append(relu)
    body = next(graph for path, graph in graphs(model) if path.endswith("then_branch"))
    set_metadata(body.nodes[0], {"onnxq.term": "1"})
    proto = to_proto(model)
    pairs = [(e.key, e.value) for e in _proto_node(proto, "add").metadata_props]
    assert pairs == [("who", "add"), ("onnxq.pass", "fold"), ("term", "0")]
    assert _proto_node(proto, "add").doc_string == "node add"
    assert _proto_node(proto, "new").metadata_props[0].value == "expand"
    then = next(a.g for a in _proto_node(proto, "if").attribute if a.name == "then_branch")
    assert then.node[0].metadata_props[0].key == "onnxq.term"
    assert get_metadata(_node(load(proto), "in")) == {"onnxq.term": "1"}
    assert get_metadata(gs.Node("Relu")) == {}


def test_get_metadata_is_a_copy() -> None:
    node = _node(load(_source()), "add")
    get_metadata(node)["x"] = "y"
    assert get_metadata(node) == {"who": "add"}


def test_a_removed_node_takes_its_own_along_and_others_stay() -> None:
    model = load(_source())
    add, neg = _node(model, "add"), _node(model, "neg")
    add.inputs[0] = neg.inputs[0]
    model.graph.cleanup().toposort()
    proto = to_proto(model)
    assert [node.name for node in proto.graph.node] == ["add", "elu", "if"]
    assert [value.doc_string for value in proto.graph.value_info] == ["value b", "value e"]
    assert [q.tensor_name for q in proto.graph.quantization_annotation] == ["b", "e"]
    assert [t.name for t in proto.graph.initializer] == ["w", "outer", "idle"]


def test_reordered_nodes_keep_their_own_texts() -> None:
    model = load(_source())
    extra = gs.Node("Neg", "first", inputs=[model.graph.inputs[0]], outputs=[gs.Variable("z")])
    model.graph.nodes.insert(0, extra)
    proto = to_proto(model)
    for node in proto.graph.node[1:]:
        assert node.doc_string == f"node {node.name}"
    assert proto.graph.node[0].doc_string == ""


def test_a_changed_type_is_written_with_the_old_texts() -> None:
    model = load(_source())
    value = _node(model, "neg").outputs[0]
    value.dtype, value.shape = np.dtype(np.float16), ["M", None, -1]
    (info,) = [v for v in to_proto(model).graph.value_info if v.name == "a"]
    assert info.doc_string == "value a"
    expected = oh.make_tensor_type_proto(TensorProto.FLOAT16, ["M", None, None])
    assert info.type == expected


def test_a_renamed_value() -> None:
    model = load(_source())
    _node(model, "neg").outputs[0].name = "renamed"
    proto = to_proto(model)
    assert proto.graph.node[1].input[0] == "renamed"
    (info,) = [v for v in proto.graph.value_info if v.name == "renamed"]
    assert info.doc_string == "value a"
    assert [q.tensor_name for q in proto.graph.quantization_annotation] == ["b", "e"]


def test_attributes() -> None:
    model = load(_source())
    elu = _node(model, "elu")
    elu.attrs["alpha"] = 3.0
    elu.attrs["to"] = np.float16
    elu.attrs["t"] = constant("inner", np.array([1, 2], np.int8), data_type=TensorProto.INT4)
    elu.attrs["empty"] = []
    elu.attrs["ints"] = np.array([1, 2])
    elu.attrs["f"] = np.float32(0.5)
    proto = to_proto(model)
    got = {a.name: oh.get_attribute_value(a) for a in _proto_node(proto, "elu").attribute}
    assert (got["alpha"], got["to"], got["f"]) == (3.0, TensorProto.FLOAT16, 0.5)
    assert got["t"].raw_data == b"\x21"
    assert list(got["ints"]) == [1, 2]
    assert _proto_node(proto, "elu").attribute[3].type == AttributeProto.INTS
    del elu.attrs["alpha"]
    assert "alpha" not in {a.name for a in _proto_node(to_proto(model), "elu").attribute}


def test_an_attribute_that_is_none() -> None:
    model = load(_source())
    _node(model, "elu").attrs["what"] = object()
    with pytest.raises(
        ModelError, match=r"attribute 'what': object .* cannot be an ONNX attribute"
    ):
        to_proto(model)


def test_a_new_operator_sheds_hidden_attributes() -> None:
    source = _source()
    hidden = source.graph.node[2].attribute.add(name="secret", type=AttributeProto.TYPE_PROTO)
    hidden.tp.tensor_type.elem_type = 1
    model = load(source)
    assert len(_proto_node(to_proto(model), "elu").attribute) == 2
    _node(model, "elu").op = "Relu"
    assert [a.name for a in _proto_node(to_proto(model), "elu").attribute] == ["alpha"]


def test_constants_are_declared_where_all_readers_see_them() -> None:
    model = load(_source())
    bodies = dict(graphs(model))
    then, other = bodies["if/then_branch"], bodies["if/else_branch"]
    then.nodes[0].inputs[1] = constant("only_then", np.full(4, 2, np.float32))
    other.nodes[0].inputs[0] = both = constant("both", np.full(4, 3, np.float32))
    then.nodes[0].inputs[0] = both
    proto = to_proto(model)
    names = {t.name for t in proto.graph.initializer}
    assert {"w", "both", "idle"} == names
    branch = next(a.g for a in _proto_node(proto, "if").attribute if a.name == "then_branch")
    assert [t.name for t in branch.initializer] == ["only_then"]
    onnx.checker.check_model(proto)


def test_an_outer_constant_stays_outside() -> None:
    model = load(_source())
    proto = to_proto(model)
    for attribute in _proto_node(proto, "if").attribute:
        assert not attribute.g.initializer
    assert [t.name for t in proto.graph.initializer] == ["w", "outer", "idle"]


def test_two_constants_of_one_name() -> None:
    model = load(_source())
    _node(model, "neg").inputs[0] = constant("w", np.zeros(4, np.float32))
    with pytest.raises(ModelError, match="2 distinct tensors are named 'w'"):
        to_proto(model)


def test_a_new_constant_may_take_the_name_of_one_that_is_gone(tmp_path: Path) -> None:
    model = load(_source())
    _node(model, "add").inputs[1] = constant("w", np.full(4, 9, np.float32))
    save(model, tmp_path / "m.onnx")
    again = load(tmp_path / "m.onnx")
    assert values(_node(again, "add").inputs[1]).tolist() == [9, 9, 9, 9]


def test_new_domains_are_imported() -> None:
    model = load(_source())
    node = _node(model, "elu")
    node.op, node.domain = "Gelu", "com.microsoft"
    proto = to_proto(model)
    assert [(e.domain, e.version) for e in proto.opset_import] == [("", 21), ("com.microsoft", 1)]


def test_new_inputs_and_outputs(tmp_path: Path) -> None:
    model = load(_source())
    extra = gs.Variable("extra", np.int64, ["K"])
    neg = gs.Node("Neg", inputs=[extra], outputs=[gs.Variable("extra_out", np.int64, ["K"])])
    model.graph.nodes.append(neg)
    model.graph.inputs.append(extra)
    model.graph.outputs.append(neg.outputs[0])
    save(model, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert [v.name for v in proto.graph.input] == ["x", "c", "extra"]
    assert proto.graph.output[1] == oh.make_tensor_value_info("extra_out", TensorProto.INT64, ["K"])


def test_a_value_that_became_constant(tmp_path: Path) -> None:
    model = load(_source())
    value = _node(model, "neg").outputs[0]
    _node(model, "neg").outputs.clear()
    value.to_constant(np.ones((1, 4), np.float32))
    model.graph.cleanup()
    save(model, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert "a" in {t.name for t in proto.graph.initializer}
    assert "a" not in {v.name for v in proto.graph.value_info}
