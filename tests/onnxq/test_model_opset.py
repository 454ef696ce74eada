"""Raising the opset: the same numbers, and nothing else lost."""

from __future__ import annotations

from pathlib import Path

import kitchen_sink
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, parser
from onnx import helper as oh
from onnx import numpy_helper as nh

from onnxq.errors import ModelError
from onnxq.model import (
    constant,
    get_metadata,
    load,
    raise_opset,
    save,
    set_metadata,
    to_proto,
    values,
)

ort.set_default_logger_severity(3)


def _run(proto: ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs: list[np.ndarray] = ort.InferenceSession(proto.SerializeToString(), options).run(
        None, feed
    )
    return outputs


OPSET_9 = """
<ir_version: 4, opset_import: ["com.microsoft" : 1, "" : 9]>
agraph (float[1, 2, 4, 4] x) => (float[1, 3, 8, 8] y, float[N, M] flat, float[A, B, C] back)
<float[4] scales = {1.0, 1.0, 2.0, 2.0}, float[2] g = {1, 2}, float[2] b = {0, 1}> {
  [up] u = Upsample <mode = "linear"> (x, scales)
  [un] e = Unsqueeze <axes = [0]> (u)
  [sq] s = Squeeze <axes = [0]> (e)
  [bn] n = BatchNormalization (s, g, b, b, g)
  [cl] c = Clip <min = 0.0, max = 6.0> (n)
  [pd] p = Pad <mode = "constant", pads = [0, 0, 0, 0, 0, 1, 0, 0], value = 0.5> (c)
  [sp] k, l = Split <axis = 1, split = [1, 2]> (p)
  [ge] q = com.microsoft.Gelu (k)
  [ad] y = Add (p, q)
  [sm] m = Softmax <axis = 1> (y)
  [dr] d = Dropout <ratio = 0.3> (m)
  [fl] flat = Flatten <axis = 2> (d)
  [rd] r = ReduceSum <axes = [1], keepdims = 0> (d)
  [sl] t = Slice <axes = [1, 2], starts = [1, 0], ends = [4, 5]> (r)
  [tk] back, i = TopK <axis = -1, k = 3> (t)
}
"""


@pytest.mark.parametrize("version", [10, 11, 13, 17, 18, 21])
def test_same_numbers(version: int, tmp_path: Path) -> None:
    source = kitchen_sink.parse_model(OPSET_9)
    model = load(source)
    raised = raise_opset(model, version)
    result = to_proto(raised)
    save(raised, tmp_path / "out.onnx")
    feed = {"x": np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)}
    for got, expected in zip(_run(result, feed), _run(source, feed), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert [(e.domain, e.version) for e in result.opset_import] == [
        ("com.microsoft", 1),
        ("", version),
    ]
    assert raised.opset == version
    assert raised.ir_version == max(4, oh.OP_SET_ID_VERSION_MAP["ai.onnx", version])
    assert model.opset == 9
    assert kitchen_sink.differences(source, to_proto(model)) == []


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_samples_where_it_did(mode: str, scale: float) -> None:
    source = kitchen_sink.parse_model(
        f"""<ir_version: 5, opset_import: ["" : 10]>
        agraph (float[1, 1, 5, 5] x) => (float[1, 1, A, B] y)
        <float[4] s = {{1.0, 1.0, {scale}, {scale}}}> {{ y = Resize <mode = "{mode}"> (x, s) }}"""
    )
    feed = {"x": np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)}
    result = to_proto(raise_opset(load(source), 13))
    np.testing.assert_allclose(_run(result, feed)[0], _run(source, feed)[0], atol=1e-5)


def test_names_and_texts_stay() -> None:
    source = kitchen_sink.parse_model(OPSET_9)
    for node in source.graph.node:
        node.doc_string = f"doc of {node.name}"
        node.metadata_props.add(key="name", value=node.name)
    source.metadata_props.add(key="k", value="v")
    value = source.graph.value_info.add()
    value.CopyFrom(oh.make_tensor_value_info("u", TensorProto.FLOAT, [1, 2, 8, 8]))
    value.doc_string = "upsampled"
    source.graph.quantization_annotation.add(tensor_name="u")
    result = to_proto(raise_opset(load(source), 21))
    named = {node.name: node for node in result.graph.node if node.name}
    assert list(named) == [node.name for node in source.graph.node]
    for node in named.values():
        assert node.doc_string == f"doc of {node.name}"
        assert [entry.value for entry in node.metadata_props] == [node.name]
    assert named["up"].op_type == "Resize"
    assert named["ge"].domain == "com.microsoft"
    assert list(result.graph.value_info) == [value]
    assert result.graph.quantization_annotation == source.graph.quantization_annotation
    assert result.metadata_props == source.metadata_props
    assert result.graph.input == source.graph.input
    assert result.graph.output == source.graph.output
    originals = {name for node in source.graph.node for name in node.output}
    added = {name for node in result.graph.node for name in node.output} - originals
    assert added
    assert all("/" in name for name in added)


def test_the_kitchen_sink_changes_nothing_but_its_versions() -> None:
    source = kitchen_sink.build()
    newest = min(23, onnx.defs.onnx_opset_version())
    raised = to_proto(raise_opset(load(source), newest))
    expected = ModelProto.FromString(source.SerializeToString())
    next(e for e in expected.opset_import if not e.domain).version = newest
    expected.ir_version = max(expected.ir_version, oh.OP_SET_ID_VERSION_MAP["ai.onnx", newest])
    assert kitchen_sink.differences(expected, raised) == []


def test_what_passes_did_survives() -> None:
    model = load(kitchen_sink.parse_model(OPSET_9))
    set_metadata(model.graph.nodes[3], {"onnxq.pass": "test"})
    big = np.random.default_rng(0).normal(size=(1, 2, 8, 30)).astype(np.float32)
    model.graph.nodes[-1].inputs.append(constant("big", big))
    model.graph.nodes[-1].inputs.append(
        constant("packed", np.arange(-8, 8, dtype=np.int8), data_type=TensorProto.INT4)
    )
    model.graph.nodes[-1].op, model.graph.nodes[-1].domain = "Odd", "custom"
    raised = raise_opset(model, 21)
    odd = raised.graph.nodes[-1]
    assert values(odd.inputs[-2]).base is big or np.shares_memory(values(odd.inputs[-2]), big)
    assert values(odd.inputs[-1]).tolist() == list(range(-8, 8))
    (bn,) = [node for node in raised.graph.nodes if node.name == "bn"]
    assert get_metadata(bn) == {"onnxq.pass": "test"}


def test_no_op_and_never_down() -> None:
    model = load(kitchen_sink.parse_model(OPSET_9))
    assert raise_opset(model, 9) is model
    assert raise_opset(model, 8) is model


def test_weights_in_external_files_stay_there(tmp_path: Path) -> None:
    source = kitchen_sink.parse_model(
        """<ir_version: 6, opset_import: ["" : 11]>
        agraph (float[1, 900] x) => (float[1, 1, 900] y) {
          s = Add (x, w)  y = Unsqueeze <axes = [0]> (s)
        }"""
    )
    source.graph.initializer.append(nh.from_array(np.arange(900, dtype=np.float32), "w"))
    onnx.save(source, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
    raised = raise_opset(load(tmp_path / "m.onnx"), 21)
    got = values(raised.graph.nodes[0].inputs[1])
    assert isinstance(got, np.memmap)
    feed = {"x": np.ones((1, 900), np.float32)}
    assert _run(to_proto(raised), feed)[0][0, 0, 899] == 900
    assert raised.path == tmp_path / "m.onnx"
    assert raised.source.data_files == {tmp_path / "w.bin"}


def test_bodies_are_converted_too() -> None:
    source = kitchen_sink.parse_model(
        """<ir_version: 6, opset_import: ["" : 11]>
        agraph (bool c, float[2, 3] x) => (float[A, B, C] y) {
          [if] y = If (c) <
            then_branch = t () => (float[A, B, C] a) { [deep] a = Unsqueeze <axes = [0]> (x) },
            else_branch = e () => (float[A, B, C] b) { z = Neg (x) b = Unsqueeze <axes = [2]> (z) }>
        }"""
    )
    result = to_proto(raise_opset(load(source), 18))
    onnx.checker.check_model(result)
    for flag in (True, False):
        feed = {"c": np.array(flag), "x": np.ones((2, 3), np.float32)}
        np.testing.assert_array_equal(_run(result, feed)[0], _run(source, feed)[0])
    branch = next(a.g for a in result.graph.node[0].attribute if a.name == "then_branch")
    assert [node.name for node in branch.node] == ["", "deep"]


def test_overridable_inputs_stay_and_frozen_ones_stay_frozen() -> None:
    source = kitchen_sink.parse_model(
        """<ir_version: 3, opset_import: ["" : 8]>
        agraph (float[2] x, float[2] w, float[2] v) => (float[1, 2] y)
        <float[2] w = {1, 2}, float[2] v = {3, 4}>
        { t = Add (x, w) s = Mul (t, v) y = Unsqueeze <axes = [0]> (s) }"""
    )
    model = load(source)
    model.overridable.discard("v")
    raised = raise_opset(model, 13)
    assert raised.overridable == {"w"}
    assert [value.name for value in to_proto(raised).graph.input] == ["x", "w"]


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        ("y = GroupNormalization <num_groups = 1> (x, w, w)", 18),
        ("y = Add <broadcast = 1, axis = 0> (x, w)", 6),
        ("y = ATenOrWhatever (x)", 13),
    ],
)
def test_operators_that_cannot_be_converted(node: str, opset: int) -> None:
    source = kitchen_sink.parse_model(
        f"""<ir_version: 7, opset_import: ["" : {opset}]>
        agraph (float[2, 3, 4] x) => (float[2, 3, 4] y) <float[1] w = {{1.0}}> {{ [bad] {node} }}"""
    )
    op = source.graph.node[0].op_type
    with pytest.raises(ModelError, match=rf"node 'bad' \({op}\)") as caught:
        raise_opset(load(source), 21)
    assert "\n" not in str(caught.value)


def test_scan_of_opset_8_is_refused() -> None:
    body = parser.parse_graph("b (float[2] t, float[2] i) => (float[2] o) { o = Add (t, i) }")
    node = oh.make_node("Scan", ["", "s", "x"], ["y"], name="scan", body=body, num_scan_inputs=1)
    ins = [oh.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "sx"]
    out = oh.make_tensor_value_info("y", TensorProto.FLOAT, None)
    source = oh.make_model(
        oh.make_graph([node], "g", ins, [out]), opset_imports=[oh.make_opsetid("", 8)], ir_version=4
    )
    with pytest.raises(ModelError, match="cannot convert Scan from opset 8 to 13"):
        raise_opset(load(source), 13)


def test_an_opset_that_onnx_does_not_know() -> None:
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(ModelError, match=f"opset {newest + 1} is unknown .* upgrade onnx"):
        raise_opset(load(kitchen_sink.parse_model(OPSET_9)), newest + 1)
