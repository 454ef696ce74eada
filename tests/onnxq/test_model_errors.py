"""Every bad file ends in one line that says what, where, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import kitchen_sink
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from onnx import helper as oh
from onnx import numpy_helper as nh

from onnxq.errors import ModelError
from onnxq.model import load, values

HEADER = '<ir_version: 8, opset_import: ["" : 18, "custom" : 1]>\n'


def _refused(source: object, *parts: str) -> str:
    with pytest.raises(ModelError) as caught:
        load(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def _model(body: str) -> ModelProto:
    return kitchen_sink.parse_model(f"{HEADER}agraph {body}")


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "bad.onnx"
    path.write_bytes(data)
    return path


def test_missing_file(tmp_path: Path) -> None:
    _refused(tmp_path / "no.onnx", "no.onnx does not exist: check the path")


def test_folder(tmp_path: Path) -> None:
    _refused(tmp_path, f"{tmp_path} is a folder")


def test_not_a_path() -> None:
    _refused(3, "not as int")


def test_empty_file(tmp_path: Path) -> None:
    _refused(_file(tmp_path, b""), "bad.onnx is empty")


@pytest.mark.parametrize(
    "data", [b"hello, this is text\n" * 9, b"\x00" * 40, b"PK\x03\x04" + b"x" * 90]
)
def test_other_files(tmp_path: Path, data: bytes) -> None:
    _refused(_file(tmp_path, data), "bad.onnx", "not an ONNX model")


def test_lfs_pointer(tmp_path: Path) -> None:
    data = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    _refused(_file(tmp_path, data), "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    model = _model("(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add (x, w) }")
    model.graph.initializer.append(nh.from_array(np.arange(1000.0), "w2"))
    data = model.SerializeToString()
    _refused(_file(tmp_path, data[: int(len(data) * keep)]), "bad.onnx", "truncated")


def test_a_file_without_graph(tmp_path: Path) -> None:
    data = ModelProto(ir_version=8, producer_name="x").SerializeToString()
    _refused(_file(tmp_path, data), "has no graph")


def test_a_tensor_file(tmp_path: Path) -> None:
    _refused(_file(tmp_path, nh.from_array(np.ones(3)).SerializeToString()), "bad.onnx")


def test_without_ir_version() -> None:
    model = _model("(float[2] x) => (float[2] y) { y = Neg (x) }")
    model.ClearField("ir_version")
    _refused(model, "has no ir_version")


def test_newer_ir_version() -> None:
    model = _model("(float[2] x) => (float[2] y) { y = Neg (x) }")
    model.ir_version = onnx.IR_VERSION + 1
    _refused(model, f"IR version {onnx.IR_VERSION + 1}", "upgrade onnx")


def test_without_opset() -> None:
    model = _model("(float[2] x) => (float[2] y) { [n] y = Neg (x) }")
    del model.opset_import[0]
    _refused(model, "node 'n' (Neg)", "opset_import")


def test_dangling_input() -> None:
    model = _model("(float[2] x) => (float[2] y) { [plus] y = Add (x, gone) }")
    _refused(model, "node 'plus' (Add) reads 'gone', which nothing produces")


def test_dangling_input_in_a_body() -> None:
    model = _model(
        """(bool c, float[2] x) => (float[2] y) {
          [if] y = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                           else_branch = e () => (float[2] b) { b = Neg (gone) }>
        }"""
    )
    _refused(model, "node 'if' (If), else_branch", "node #0 (Neg) reads 'gone'")


def test_a_body_does_not_see_other_bodies() -> None:
    model = _model(
        """(bool c, float[2] x) => (float[2] y) {
          y = If (c) <then_branch = t () => (float[2] a) { a = Neg (x) },
                      else_branch = e () => (float[2] b) { b = Neg (a) }>
        }"""
    )
    _refused(model, "reads 'a'")


def test_output_of_nothing() -> None:
    _refused(_model("(float[2] x) => (float[2] y) { z = Neg (x) }"), "output 'y' is produced by")


def test_two_initializers_of_one_name() -> None:
    model = _model("(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add (x, w) }")
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    _refused(model, "two initializers are named 'w'")


def test_two_producers() -> None:
    model = _model("(float[2] x) => (float[2] y) { [a] y = Neg (x) [b] y = Abs (x) }")
    _refused(model, "'y' is defined twice, by node 'a' (Neg) and by node 'b' (Abs)")


def test_initializer_and_producer() -> None:
    model = _model("(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { w = Neg (x) y = Abs (w) }")
    _refused(model, "'w' is defined twice, by an initializer and by node #0 (Neg)")


def test_a_body_hides_an_outer_name() -> None:
    model = _model(
        """(bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
          z = Neg (w)
          [if] y = If (c) <then_branch = t () => (float[2] a) { a = Neg (z) },
                           else_branch = e () => (float[2] b) { w = Neg (x) b = Abs (w) }>
        }"""
    )
    _refused(model, "else_branch", "defines 'w', which the outer graph already defines")


def test_cycle() -> None:
    model = _model(
        "(float[2] x) => (float[2] y) { [p] a = Add (x, b) [q] b = Neg (a) y = Abs (b) }"
    )
    _refused(model, "cycle", "node 'p' (Add), node 'q' (Neg)")


def test_float8_that_gs_doubles() -> None:
    tensor = TensorProto(
        name="w8", data_type=TensorProto.FLOAT8E4M3FNUZ, dims=[2], raw_data=b"\x01\x02"
    )
    out = oh.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = oh.make_node("Cast", ["w8"], ["y"], to=1)
    graph = oh.make_graph([node], "g", [], [out], [tensor])
    _refused(oh.make_model(graph), "'w8'", "FLOAT8E4M3FNUZ", "doubled")
    constant = oh.make_node("Constant", [], ["w8"], value=tensor)
    _refused(oh.make_model(oh.make_graph([constant, node], "g", [], [out])), "FLOAT8E4M3FNUZ")


def test_attribute_without_type() -> None:
    model = _model("(float[2] x) => (float[2] y) { [n] y = Elu <alpha = 2.0> (x) }")
    model.graph.node[0].attribute[0].ClearField("type")
    _refused(model, "node 'n' (Elu)", "'alpha' without a type")


def test_attribute_twice() -> None:
    model = _model("(float[2] x) => (float[2] y) { [n] y = Elu <alpha = 2.0> (x) }")
    model.graph.node[0].attribute.add().CopyFrom(model.graph.node[0].attribute[0])
    _refused(model, "two attributes 'alpha'")


def test_unknown_element_type() -> None:
    model = _model("(float[2] x) => (float[2] y) { y = Neg (x) }")
    model.graph.input[0].type.tensor_type.elem_type = 99
    _refused(model, "cannot import the model")


def test_function_that_cannot_be_inlined() -> None:
    model = kitchen_sink.parse_model(
        """<ir_version: 8, opset_import: ["" : 18, "f" : 1]>
        agraph (float[2] x) => (float[2] y) { y = f.foo (x) }
        <domain: "f", opset_import: ["" : 18, "f" : 1]> foo (a) => (b) { b = f.foo (a) }"""
    )
    _refused(model, "f.foo", "function")


def test_damaged_data_show_when_they_are_read() -> None:
    model = _model("(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add (x, w) }")
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(TensorProto(name="w", data_type=1, dims=[600], raw_data=b"1234"))
    loaded = load(model)
    expected = re.escape("tensor 'w': 4 bytes of data, but FLOAT of shape [600] needs 2400")
    with pytest.raises(ModelError, match=expected):
        values(loaded.graph.nodes[0].inputs[1])
