"""Constants: made, packed, read, and told apart from overridable inputs."""

from __future__ import annotations

import kitchen_sink
import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto
from onnx import helper as oh
from onnx import numpy_helper as nh

from onnxq.errors import ModelError
from onnxq.model import constant, is_constant, load, to_proto, values

PACKED = {
    name: TensorProto.DataType.Value(name)
    for name in ("INT4", "UINT4", "INT2", "UINT2")
    if name in TensorProto.DataType.keys()  # noqa: SIM118 an enum wrapper
}


def _exported(tensor: gs.Constant) -> TensorProto:
    model = load(
        kitchen_sink.parse_model(
            '<ir_version: 10, opset_import: ["" : 21, "custom" : 1]>'
            "agraph (float[2] x) => (float[2] y) { y = custom.Use (x) }"
        )
    )
    model.graph.nodes[0].inputs.append(tensor)
    (exported,) = to_proto(model).graph.initializer
    return exported


def _packed(numbers: list[int], bits: int) -> bytes:
    """The specification in plain Python: the first value lies in the lowest bits."""
    whole = sum((value % (1 << bits)) << (bits * i) for i, value in enumerate(numbers))
    return whole.to_bytes(-(-len(numbers) * bits // 8), "little")


def test_onnx_packs_like_the_specification() -> None:
    array = np.arange(-8, 7, dtype=np.int8)
    if "int4" not in str(oh.tensor_dtype_to_np_dtype(TensorProto.INT4)):
        pytest.skip("this onnx has no int4 arrays")
    tensor = nh.from_array(array.astype(ml_dtypes.int4), "w")
    assert tensor.raw_data == _packed(array.tolist(), 4)


def _raw(array: np.ndarray) -> TensorProto:
    codes = {np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16}
    code = codes.get(array.dtype) or oh.np_dtype_to_tensor_dtype(array.dtype)
    return TensorProto(name="w", data_type=code, dims=array.shape, raw_data=array.tobytes())


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 4097])
def test_packing_is_onnx_packing(name: str, count: int) -> None:
    bits, signed = int(name[-1]), name.startswith("INT")
    low = -(1 << (bits - 1)) if signed else 0
    array = np.random.default_rng(0).integers(low, low + (1 << bits), count)
    array = array.astype(np.int8 if signed else np.uint8)
    exotic = np.dtype(getattr(ml_dtypes, name.lower()))
    expected = _packed(array.tolist(), bits)
    for made in (
        constant("w", array, data_type=PACKED[name]),
        constant("w", array.astype(np.int64), data_type=PACKED[name]),
        constant("w", array.astype(exotic)),
        gs.Constant("w", array.astype(exotic)),
    ):
        tensor = _exported(made)
        assert (tensor.data_type, list(tensor.dims)) == (PACKED[name], [count])
        assert tensor.raw_data == expected
        got = values(made)
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(("name", "value"), [("INT4", 8), ("INT4", -9), ("UINT4", 16)])
def test_values_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ModelError, match=f"'w': values {value} .. {value} do not fit in {name}"):
        constant("w", np.array([value]), data_type=PACKED[name])


def test_integer_types_need_integers() -> None:
    with pytest.raises(ModelError, match="INT4 needs an integer array, not float32"):
        constant("w", np.ones(2, np.float32), data_type=TensorProto.INT4)


def test_types_onnx_does_not_have() -> None:
    with pytest.raises(ModelError, match="ONNX has no element type for numpy's"):
        constant("w", np.zeros(2, "datetime64[s]"))
    with pytest.raises(ModelError, match="cannot store values as element type 99"):
        constant("w", np.zeros(2), data_type=99)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.bool_, np.int8, np.float64]
)
def test_plain_arrays(shape: tuple[int, ...], dtype: type) -> None:
    array = np.zeros(shape, dtype)
    tensor = _exported(constant("w", array))
    assert tensor == _raw(array)
    big = constant("w", np.ones((40, 50), dtype))
    assert _exported(big) == _raw(np.ones((40, 50), dtype))


def test_casts() -> None:
    array = np.array([1.5, -2.0], np.float32)
    for code, dtype in ((16, ml_dtypes.bfloat16), (10, np.float16), (11, np.float64)):
        made = constant("w", array, data_type=code)
        assert _exported(made) == _raw(array.astype(dtype))


def test_strided_arrays_and_strings() -> None:
    array = np.arange(2000, dtype=np.float32).reshape(40, 50).T
    assert _exported(constant("w", array)) == nh.from_array(array, "w")
    assert list(_exported(constant("w", np.array(["a", "b"]))).string_data) == [b"a", b"b"]


def test_values_are_read_only_and_leave_no_trace() -> None:
    array = np.arange(3, dtype=np.float32)
    made = constant("w", array)
    got = values(made)
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1
    array[0] = 7
    packed = constant("p", np.array([1, 2], np.int8), data_type=TensorProto.INT4)
    before = packed._values
    values(packed)
    assert packed._values is before


def test_gs_values_keep_the_type_too() -> None:
    packed = constant("p", np.array([1, -2, 3], np.int8), data_type=TensorProto.INT4)
    assert packed.values.dtype == ml_dtypes.int4  # gs caches; the export stays INT4
    assert _exported(packed).data_type == TensorProto.INT4


OVERRIDABLE = """
<ir_version: 8, opset_import: ["" : 18]>
agraph (float[2] first, float[2] w, float[2] x, float[2] idle) => (float[2] y)
<float[2] w = {1, 2}, float[2] v = {3, 4}, float[2] idle = {5, 6}> {
  a = Add (x, w)  b = Add (a, v)  y = Add (b, first)
}
"""


def _inputs(model: object) -> list[str]:
    return [value.name for value in to_proto(model).graph.input]  # type: ignore[arg-type]


def test_is_constant() -> None:
    model = load(kitchen_sink.parse_model(OVERRIDABLE))
    assert model.overridable == {"w", "idle"}
    first, second = model.graph.nodes[:2]
    assert not is_constant(first.inputs[0])
    assert not is_constant(first.inputs[1])
    assert not is_constant(first.inputs[1].copy())
    assert is_constant(second.inputs[1])
    assert is_constant(constant("new", np.ones(2)))
    assert _inputs(model) == ["first", "w", "x", "idle"]


def test_freezing_an_overridable_initializer() -> None:
    model = load(kitchen_sink.parse_model(OVERRIDABLE))
    model.overridable.discard("w")
    assert is_constant(model.graph.nodes[0].inputs[1])
    proto = to_proto(model)
    assert [value.name for value in proto.graph.input] == ["first", "x", "idle"]
    assert [tensor.name for tensor in proto.graph.initializer] == ["w", "v", "idle"]


def test_the_signature_survives_a_removed_consumer() -> None:
    model = load(kitchen_sink.parse_model(OVERRIDABLE))
    first, second = model.graph.nodes[:2]
    second.inputs[0] = first.inputs[0]
    model.graph.cleanup()
    proto = to_proto(model)
    assert [value.name for value in proto.graph.input] == ["first", "w", "x", "idle"]
    assert [tensor.name for tensor in proto.graph.initializer] == ["w", "v", "idle"]


def test_an_old_model_with_a_new_constant_becomes_ir_4() -> None:
    text = """<ir_version: 3, opset_import: ["" : 8]>
    agraph (float[2] w, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
      a = Add (x, w)  y = Add (a, w)
    }"""
    model = load(kitchen_sink.parse_model(text))
    assert to_proto(model).ir_version == 3
    model.graph.nodes[1].inputs[1] = constant("new", np.ones(2, np.float32))
    proto = to_proto(model)
    assert proto.ir_version == 4
    assert [value.name for value in proto.graph.input] == ["w", "x"]


def test_numpy_helper_agrees_on_an_untouched_packed_initializer() -> None:
    tensor = oh.make_tensor("w", TensorProto.UINT4, [5], np.array([1, 15, 0, 7, 8]))
    out = oh.make_tensor_value_info("y", TensorProto.UINT4, [5])
    graph = oh.make_graph([oh.make_node("Identity", ["w"], ["y"])], "g", [], [out], [tensor])
    model = load(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)]))
    assert values(model.graph.nodes[0].inputs[0]).tolist() == [1, 15, 0, 7, 8]
