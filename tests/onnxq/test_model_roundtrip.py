"""Load and save without a pass lose nothing."""

from __future__ import annotations

import os
from pathlib import Path

import kitchen_sink
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx import helper as oh
from onnx import numpy_helper as nh

from onnxq.model import graphs, is_constant, load, save, to_proto, values

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("ONNXQ_REAL", ROOT.parent / "shared" / "real"))


def test_the_kitchen_sink_sets_every_field() -> None:
    assert kitchen_sink.unset_fields(kitchen_sink.build()) <= set(kitchen_sink.LEFT_OUT)


def test_the_comparison_sees_a_difference() -> None:
    one, other = kitchen_sink.build(), kitchen_sink.build()
    other.graph.node[4].attribute[0].g.node[0].doc_string = "changed"
    del other.metadata_props[:]
    found = kitchen_sink.differences(one, other)
    assert found[0].startswith("model.graph.node[4].attribute[0].g.node[0].doc_string: ")
    assert found[1] == "model.metadata_props: lost"


def test_kitchen_sink_in_memory() -> None:
    source = kitchen_sink.build()
    assert kitchen_sink.differences(source, to_proto(load(source))) == []


def test_kitchen_sink_through_files(tmp_path: Path) -> None:
    source = kitchen_sink.build()
    onnx.checker.check_model(source)
    onnx.save(source, tmp_path / "in.onnx")
    save(load(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert kitchen_sink.differences(source, onnx.load(tmp_path / "out.onnx")) == []


def test_kitchen_sink_with_external_data(tmp_path: Path) -> None:
    source = kitchen_sink.build()
    save(load(source), tmp_path / "ext.onnx", external=True)
    assert (tmp_path / "ext.onnx.data").stat().st_size > 2400
    save(load(tmp_path / "ext.onnx"), tmp_path / "back.onnx")
    back = onnx.load(tmp_path / "back.onnx")
    for tensor in (*source.graph.initializer, *back.graph.initializer):
        assert not tensor.external_data
    assert kitchen_sink.differences(source, back) == []


def test_the_given_model_is_not_modified() -> None:
    source = kitchen_sink.build()
    before = source.SerializeToString(deterministic=True)
    model = load(source)
    model.graph.name = "other"
    model.graph.nodes[2].name = "other"
    model.graph.import_domains.append(oh.make_opsetid("more", 1))
    to_proto(model)
    assert source.SerializeToString(deterministic=True) == before


def test_loading_twice_gives_the_same() -> None:
    source = kitchen_sink.build()
    model = load(source)
    assert kitchen_sink.differences(to_proto(model), to_proto(model)) == []
    assert kitchen_sink.differences(to_proto(model), to_proto(load(to_proto(model)))) == []


@pytest.mark.parametrize("name", sorted(TensorProto.DataType.keys()))
def test_every_element_type(name: str) -> None:
    code = TensorProto.DataType.Value(name)
    if name in ("UNDEFINED", "STRING", "FLOAT8E4M3FNUZ"):
        pytest.skip("has its own test")
    data = np.random.default_rng(0).integers(0, 2, 48, np.uint8).tobytes()
    bits = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8, "COMPLEX64": 64, "COMPLEX128": 128}
    bits |= {"BFLOAT16": 16, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
    width = bits.get(name) or (8 if "FLOAT8" in name else int(name.lstrip("UINTFLOA")))
    count = 48 * 8 // width
    tensor = TensorProto(name="w", data_type=code, dims=[count], raw_data=data)
    out = oh.make_tensor_value_info("y", code, [count])
    node = oh.make_node("Mystery", ["w"], ["y"], domain="custom")
    imports = [oh.make_opsetid("", 21), oh.make_opsetid("custom", 1)]
    source = oh.make_model(oh.make_graph([node], "g", [], [out], [tensor]), opset_imports=imports)
    model = load(source)
    assert kitchen_sink.differences(source, to_proto(model)) == []
    got, expected = values(model.graph.nodes[0].inputs[0]), nh.to_array(tensor)
    assert got.shape == expected.shape
    if expected.dtype != oh.tensor_dtype_to_np_dtype(
        code
    ):  # before onnx 1.19: the bits, as integers
        assert got.tobytes() == data
        return
    np.testing.assert_array_equal(got.astype(np.complex128), expected.astype(np.complex128))
    assert kitchen_sink.differences(source, to_proto(model)) == []  # reading changes nothing


def test_typed_fields_are_read_as_onnx_reads_them() -> None:
    f8, bf = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
    cases = {
        TensorProto.FLOAT16: np.array([1.5, -2.0], np.float16),
        TensorProto.BFLOAT16: np.array([1.5, -2.0], bf),
        TensorProto.FLOAT8E4M3FN: np.array([1.5, -2.0], f8),
        TensorProto.INT8: np.array([-7, 3], np.int8),
        TensorProto.UINT32: np.array([7, 2**31], np.uint32),
        TensorProto.BOOL: np.array([True, False]),
        TensorProto.COMPLEX64: np.array([1 + 2j, 3], np.complex64),
    }
    for code, array in cases.items():
        tensor = oh.make_tensor("w", code, [2], array)
        model = load(_identity(tensor, code))
        np.testing.assert_array_equal(values(model.graph.nodes[0].inputs[0]), array)
    packed = oh.make_tensor("w", TensorProto.INT4, [3], np.array([-8, 7, -1]))
    model = load(_identity(packed, TensorProto.INT4))
    assert values(model.graph.nodes[0].inputs[0]).tolist() == [-8, 7, -1]


def _identity(tensor: TensorProto, code: int) -> onnx.ModelProto:
    out = oh.make_tensor_value_info("y", code, list(tensor.dims))
    graph = oh.make_graph([oh.make_node("Identity", ["w"], ["y"])], "g", [], [out], [tensor])
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)])


def test_sparse_initializer_is_kept_and_read() -> None:
    source = kitchen_sink.build()
    model = load(source)
    sparse = model.graph.nodes[-1].inputs[-1]
    assert is_constant(sparse)
    assert values(sparse).tolist() == [[0, 1, 0], [0, 2, 0]]


def test_paths_of_bodies() -> None:
    model = load(kitchen_sink.build())
    assert [path for path, _ in graphs(model)] == [
        "",
        "choose/else_branch",
        "choose/then_branch",
        "everything/g",
    ]


FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
agraph (float[N] x) => (float[N] y) {
  [call] t = f.foo <alpha = 2.0> (x)
  [last] y = Relu (t)
}
<domain: "f", opset_import: ["" : 18, "f" : 1, "other" : 4]>
foo <alpha> (a) => (b) {
  c = Constant <value_float: float = @alpha> ()
  d = f.bar (a)
  e = Mul (d, c)
  b = other.Op (e)
}
<domain: "f", opset_import: ["" : 18]>
bar (a) => (b) { b = Neg (a) }
"""


def test_functions_are_inlined_also_when_nested() -> None:
    source = kitchen_sink.parse_model(FUNCTIONS)
    source.graph.node[1].doc_string = "kept"
    result = to_proto(load(source))
    assert [node.op_type for node in result.graph.node] == ["Constant", "Neg", "Mul", "Op", "Relu"]
    assert not result.functions
    assert result.graph.node[-1].doc_string == "kept"
    assert [(e.domain, e.version) for e in result.opset_import] == [
        ("", 18),
        ("f", 1),
        ("other", 4),
    ]
    assert len(source.functions) == 2


def test_functions_beside_weights_and_bodies() -> None:
    source = kitchen_sink.parse_model(FUNCTIONS.replace("other.Op", "Abs"))
    weight = nh.from_array(np.arange(1000, dtype=np.float32), "w")
    source.graph.initializer.append(weight)
    source.graph.node[1].CopyFrom(oh.make_node("Add", ["t", "w"], ["y"]))
    model = load(source)
    assert values(model.graph.nodes[-1].inputs[1])[999] == 999
    feed = {"x": np.ones(1000, np.float32)}
    ours = ort.InferenceSession(to_proto(model).SerializeToString()).run(None, feed)[0]
    theirs = ort.InferenceSession(source.SerializeToString()).run(None, feed)[0]
    np.testing.assert_array_equal(ours, theirs)


def test_unsorted_nodes_are_sorted() -> None:
    source = kitchen_sink.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        agraph (float[N] x, bool c) => (float[N] y, float[N] q) {
          q = If (c) <then_branch = t () => (float[N] a) { a = Neg (late) },
                      else_branch = e () => (float[N] b) { b = Abs (late) }>
          y = Relu (mid)
          late = Exp (mid)
          mid = Neg (x)
        }"""
    )
    result = to_proto(load(source))
    assert [node.op_type for node in result.graph.node] == ["Neg", "Relu", "Exp", "If"]
    onnx.checker.check_model(result)


def test_old_ir_keeps_its_initializer_inputs() -> None:
    source = kitchen_sink.parse_model(
        """<ir_version: 3, opset_import: ["" : 9]>
        agraph (float[2] w, float[2] x, float[2] v) => (float[2] y)
        <float[2] w = {1, 2}, float[2] v = {3, 4}> { t = Add (x, w)  y = Add (t, v) }"""
    )
    model = load(source)
    assert model.overridable == {"w", "v"}
    assert model.ir_version == 3
    assert kitchen_sink.differences(source, to_proto(model)) == []


def test_models_from_before_opsets() -> None:
    source = kitchen_sink.parse_model(
        """<ir_version: 8, opset_import: ["" : 1]>
        agraph (float[2] x) => (float[2] y) { y = Neg (x) }"""
    )
    source.ir_version = 2
    del source.opset_import[:]
    model = load(source)
    assert model.opset == 1
    assert kitchen_sink.differences(source, to_proto(model)) == []


def test_gs_is_silent_only_inside(capfd: pytest.CaptureFixture[str]) -> None:
    from onnx_graphsurgeon.logger import G_LOGGER

    before = G_LOGGER.severity
    to_proto(load(kitchen_sink.build()))
    assert G_LOGGER.severity == before
    assert "[W]" not in capfd.readouterr().out


def _real_models() -> list[Path]:
    return sorted((REAL / "models").glob("*.onnx")) if REAL.is_dir() else []


@pytest.mark.parametrize("path", _real_models() or [None], ids=lambda path: path and path.stem)
def test_real_models(path: Path | None, tmp_path: Path) -> None:
    if path is None:
        pytest.skip(f"no models in {REAL}/models (set ONNXQ_REAL)")
    model = load(path)
    save(model, tmp_path / "out.onnx")
    source = onnx.load(path)
    assert kitchen_sink.differences(source, onnx.load(tmp_path / "out.onnx")) == []
