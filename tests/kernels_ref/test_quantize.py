import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import (
    PerAxis,
    PerBlock,
    PerTensor,
    absmax_scale,
    affine_params,
    dequantize,
    half_range,
    qrange,
    quantize,
)

BITS = st.integers(2, 8)
GRANULARITY = st.sampled_from([PerTensor(), PerAxis(0), PerAxis(1), PerBlock(1, 3), PerBlock(0, 4)])
DTYPE = st.sampled_from([np.float32, np.float64])


@st.composite
def matrices(draw):
    dtype = draw(DTYPE)
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=7))
    width = 32 if dtype is np.float32 else 64
    x = draw(hnp.arrays(dtype, shape, elements=st.floats(-1, 1, width=width)))
    return np.ldexp(x, draw(st.integers(-40, 40))).astype(dtype)


def fake(x, bits, granularity, scale=None):
    scale = absmax_scale(x, bits, granularity) if scale is None else scale
    q = quantize(x, scale, bits=bits, granularity=granularity)
    return dequantize(q, scale, granularity=granularity)


def test_ranges():
    assert [half_range(b) for b in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]
    assert qrange(4) == (-8, 7)
    assert qrange(4, narrow=True) == (-7, 7)
    assert qrange(8, signed=False) == (0, 255)


@settings(deadline=None, max_examples=150)
@given(matrices(), BITS, GRANULARITY)
def test_absmax_quantization_stays_in_range_within_half_a_scale(x, bits, granularity):
    scale = absmax_scale(x, bits, granularity)
    q = quantize(x, scale, bits=bits, granularity=granularity, narrow=True)
    assert q.dtype == np.int8
    assert scale.dtype == x.dtype
    assert np.abs(q.astype(int)).max() <= half_range(bits)
    back = dequantize(q, scale, granularity=granularity)
    assert back.dtype == x.dtype
    one = np.ones(x.shape, x.dtype)
    step = dequantize(one.astype(np.int8), scale, granularity=granularity)
    # x / s, s * q and the difference each round once, by at most eps / 2 of absmax.
    slack = 2 * np.finfo(x.dtype).eps * np.abs(x).max()
    assert np.all(np.abs(back.astype(np.float64) - x) <= step / 2 + slack)


@settings(deadline=None, max_examples=80)
@given(matrices(), BITS, GRANULARITY)
def test_fake_quantization_is_idempotent(x, bits, granularity):
    scale = absmax_scale(x, bits, granularity)
    once = fake(x, bits, granularity, scale)
    np.testing.assert_array_equal(fake(once, bits, granularity, scale), once)


@settings(deadline=None, max_examples=80)
@given(
    hnp.arrays(np.float32, 20, elements=st.floats(-2, 2, width=32)),
    BITS,
    st.floats(0.0078125, 1, width=32),
)
def test_fake_quantization_is_monotone(x, bits, scale):
    x.sort()
    assert np.all(np.diff(fake(x, bits, PerTensor(), np.float32(scale))) >= 0)


@settings(deadline=None, max_examples=80)
@given(matrices(), BITS, GRANULARITY, st.integers(-20, 20))
def test_fake_quantization_is_equivariant_to_powers_of_two(x, bits, granularity, power):
    x[np.abs(x) < 1e-20] = 0  # below, scaling itself would round
    scaled = np.ldexp(x, power)
    expected = np.ldexp(fake(x, bits, granularity), power)
    np.testing.assert_array_equal(fake(scaled, bits, granularity), expected)


def test_rounds_half_to_even_and_saturates_infinity():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, np.inf, -np.inf, 1e30], dtype=np.float32)
    q = quantize(x, np.float32(1), bits=4, granularity=PerTensor())
    np.testing.assert_array_equal(q, [0, 2, 2, 0, -2, 7, -8, 7])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [2, 8])
def test_extreme_magnitudes_give_usable_scales(dtype, bits):
    info = np.finfo(dtype)
    peak = np.array([0, info.smallest_subnormal, info.tiny, info.max], dtype=dtype)
    x = np.stack([peak, -peak / 2], axis=1)
    scale = absmax_scale(x, bits, PerAxis(0))
    assert scale[0] == 1
    assert np.all(scale >= info.tiny)
    assert np.all(np.isfinite(scale))
    q = quantize(x, scale, bits=bits, granularity=PerAxis(0))
    np.testing.assert_array_equal(q[0], [0, 0])
    assert q[3, 0] == half_range(bits)
    assert np.all(np.isfinite(dequantize(q, scale, granularity=PerAxis(0))))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_largest_float_never_dequantizes_to_infinity(bits):
    x = np.array([np.finfo(np.float32).max])
    assert np.all(np.isfinite(fake(x, bits, PerTensor())))


@settings(deadline=None, max_examples=100)
@given(matrices(), BITS, GRANULARITY, st.booleans())
def test_affine_keeps_zero_exact_and_errs_by_a_scale_at_most(x, bits, granularity, signed):
    scale, zero_point = affine_params(x, bits, granularity, signed=signed)
    assert zero_point.dtype == (np.int8 if signed else np.uint8)
    options = {"granularity": granularity}
    q = quantize(x, scale, zero_point, bits=bits, signed=signed, **options)
    assert q.dtype == zero_point.dtype
    qmin, qmax = qrange(bits, signed=signed)
    assert q.min() >= qmin
    assert q.max() <= qmax
    back = dequantize(q, scale, zero_point, **options)
    assert np.all(back[x == 0] == 0)
    step = dequantize(np.ones(x.shape, np.int8), scale, **options)
    # Half a scale from rounding x, half from rounding the zero point; then float rounding.
    slack = 4 * np.finfo(x.dtype).eps * np.abs(x).max()
    assert np.all(np.abs(back.astype(np.float64) - x) <= step + slack)


def test_affine_of_a_huge_range_is_finite():
    peak = np.finfo(np.float32).max
    scale, zero_point = affine_params(np.array([-peak, peak]), 8, PerTensor())
    assert np.isfinite(scale)
    assert zero_point in (127, 128)


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-8, 8, width=16)))
def test_affine_is_dynamic_quantize_linear(x):
    names = ["y", "s", "z"]
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], names)
    kinds = [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8]
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None])],
        [onnx.helper.make_tensor_value_info(n, k, None) for n, k in zip(names, kinds, strict=True)],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    _, want_scale, want_zero = session.run(None, {"x": x})
    scale, zero_point = affine_params(x, 8, PerTensor())
    assert scale == want_scale
    assert zero_point == want_zero


def test_zero_point_may_be_a_number_or_an_array():
    x = np.array([[0.0, 1.0], [2.0, 3.0]])
    scale = np.array([1.0, 0.5])
    options = {"bits": 8, "granularity": PerAxis(0), "signed": False}
    q = quantize(x, scale, np.array([3, 5], np.uint8), **options)
    np.testing.assert_array_equal(q, [[3, 4], [9, 11]])
    back = dequantize(q, scale, np.array([3, 5], np.uint8), granularity=PerAxis(0))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(quantize(x, scale, 7, **options), [[7, 8], [11, 13]])
    np.testing.assert_array_equal(
        dequantize(np.array([[7, 8], [11, 13]]), scale, 7, granularity=PerAxis(0)), x
    )


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        half_range(bits)
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        qrange(bits)


def test_narrow_unsigned_is_refused():
    with pytest.raises(ValueError, match="narrow"):
        qrange(8, signed=False, narrow=True)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_are_not_positive_are_refused(scale):
    with pytest.raises(ValueError, match="positive"):
        quantize(np.ones(3), np.float64(scale), bits=8, granularity=PerTensor())


def test_scales_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="scale holds NaN or infinity"):
        quantize(np.ones(3), np.float64(np.nan), bits=8, granularity=PerTensor())


def test_nan_is_refused():
    with pytest.raises(ValueError, match="x holds NaN"):
        quantize(np.array([1, np.nan]), np.float64(1), bits=8, granularity=PerTensor())


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="x is float16"):
        quantize(np.ones(3, np.float16), np.float32(1), bits=8, granularity=PerTensor())
    with pytest.raises(ValueError, match="q is float64"):
        dequantize(np.ones(3), np.float32(1), granularity=PerTensor())
    with pytest.raises(ValueError, match="scale is int64"):
        dequantize(np.ones(3, np.int8), np.array(1), granularity=PerTensor())


def test_params_of_another_shape_are_refused():
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match="shape"):
        quantize(x, np.ones(3), bits=8, granularity=PerAxis(0))
    with pytest.raises(ValueError, match="shape"):
        quantize(x, np.ones(2), np.zeros(3, np.int8), bits=8, granularity=PerAxis(0))
    with pytest.raises(ValueError, match="shape"):
        dequantize(np.ones((2, 3), np.int8), np.ones(3), granularity=PerAxis(0))
