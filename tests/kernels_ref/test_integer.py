from functools import cache
from itertools import product

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxq.kernels_ref import conv, conv_integer, matmul_integer

TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "float32": TensorProto.FLOAT}


@cache
def session(op, in_types, out_type, attributes):
    names = [f"i{i}" for i in range(len(in_types))]
    node = helper.make_node(
        op, names, ["y"], **{k: list(v) if isinstance(v, tuple) else v for k, v in attributes}
    )
    inputs = [
        helper.make_tensor_value_info(name, TYPES[t], None)
        for name, t in zip(names, in_types, strict=True)
    ]
    output = helper.make_tensor_value_info("y", out_type, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(op, *inputs, out_type=TensorProto.INT32, **attributes):
    arrays = [np.asarray(value) for value in inputs]
    types = tuple(array.dtype.name for array in arrays)
    attributes = tuple(sorted(attributes.items()))
    feeds = {f"i{i}": array for i, array in enumerate(arrays)}
    return session(op, types, out_type, attributes).run(None, feeds)[0]


def bytes_of(rng, shape, dtype, small=False):
    """Random bytes; `small` ones keep the saturating u8*s8 pair products of AVX2 below 2**15."""
    info = np.iinfo(dtype)
    low, high = (max(info.min, -60), min(info.max, 60)) if small else (info.min, info.max)
    return rng.integers(low, high, size=shape, endpoint=True, dtype=dtype)


@st.composite
def conv_cases(draw):
    rank = draw(st.integers(1, 3))
    side = st.integers(1, 3)
    kernel = tuple(draw(side) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(2 * rank))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    space = tuple(
        max(1, span - pads[i] - pads[i + rank]) + draw(st.integers(0, 4))
        for i, span in enumerate(spans)
    )
    group = draw(st.integers(1, 3))
    attributes = {
        "pads": pads,
        "strides": tuple(draw(side) for _ in range(rank)),
        "dilations": dilations,
        "group": group,
    }
    x_shape = (draw(st.integers(1, 2)), group * draw(side), *space)
    w_shape = (group * draw(side), x_shape[1] // group, *kernel)
    return x_shape, w_shape, attributes, draw(st.integers(0, 10**6))


@settings(deadline=None, max_examples=100)
@given(conv_cases(), st.sampled_from([np.uint8, np.int8]), st.integers(0, 255))
def test_conv_integer_is_that_of_onnxruntime(case, w_dtype, x_zero_point):
    x_shape, w_shape, attributes, seed = case
    rng = np.random.default_rng(seed)
    x = bytes_of(rng, x_shape, np.uint8)
    w = bytes_of(rng, w_shape, w_dtype, small=w_dtype is np.int8)
    x_zp = np.array(x_zero_point, np.uint8)
    w_zp = np.array(rng.integers(0, 50), w_dtype)
    got = conv_integer(x, w, x_zp, w_zp, **attributes)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, run("ConvInteger", x, w, x_zp, w_zp, **attributes))


@settings(deadline=None, max_examples=60)
@given(conv_cases(), st.booleans())
def test_float_conv_is_that_of_onnxruntime(case, with_bias):
    x_shape, w_shape, attributes, seed = case
    rng = np.random.default_rng(seed)
    # Small whole numbers: every sum is exact in float32, in any order.
    x, w = (rng.integers(-9, 9, size=s).astype(np.float32) for s in (x_shape, w_shape))
    inputs = [x, w]
    if with_bias:
        inputs.append(rng.integers(-9, 9, size=w_shape[0]).astype(np.float32))
    got = conv(*inputs, **attributes)
    assert got.dtype == np.float32
    want = run("Conv", *inputs, out_type=TensorProto.FLOAT, **attributes)
    np.testing.assert_array_equal(got, want)


def slow_conv(x, w, *, pads, strides, dilations, group):
    """The definition of Conv, an output at a time, for two space axes."""
    padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    out = [(padded.shape[2 + i] - spans[i]) // strides[i] + 1 for i in range(2)]
    y = np.zeros((len(x), len(w), *out), dtype=object)
    per_in, per_out = w.shape[1], len(w) // group
    for n, m, i, j in np.ndindex(y.shape):
        for c, p, q in product(*map(range, w.shape[1:])):
            channel = m // per_out * per_in + c
            row, col = i * strides[0] + p * dilations[0], j * strides[1] + q * dilations[1]
            y[n, m, i, j] += int(padded[n, channel, row, col]) * int(w[m, c, p, q])
    return y


def test_conv_integer_takes_a_zero_point_per_output_channel():
    rng = np.random.default_rng(0)
    x, w = bytes_of(rng, (2, 4, 6, 5), np.int8), bytes_of(rng, (6, 2, 3, 2), np.uint8)
    w_zp = rng.integers(0, 255, size=6, dtype=np.uint8)
    attributes = {"pads": (1, 0, 2, 1), "strides": (2, 1), "dilations": (1, 2), "group": 2}
    got = conv_integer(x, w, -7, w_zp, **attributes)
    centered = w.astype(int) - w_zp.reshape(-1, 1, 1, 1)
    want = slow_conv(x.astype(int) + 7, centered, **attributes)
    np.testing.assert_array_equal(got, want.astype(np.int64))


def test_padding_is_the_zero_point_and_not_zero():
    x, w = np.full((1, 1, 3), 5, np.uint8), np.ones((1, 1, 3), np.int8)
    np.testing.assert_array_equal(conv_integer(x, w, 5, pads=[1, 1]), np.zeros((1, 1, 3)))
    np.testing.assert_array_equal(conv_integer(x, w, 0, pads=[1, 1]), [[[10, 15, 10]]])


def test_float64_accumulation_keeps_what_float32_loses():
    x = np.array([[[1.0, 2.0**-30]]], dtype=np.float32)
    w = np.ones((1, 1, 2), dtype=np.float32)
    assert conv(x, w)[0, 0, 0] == 1
    exact = conv(x, w, dtype=np.float64)
    assert exact.dtype == np.float64
    assert exact[0, 0, 0] == 1 + 2.0**-30


@st.composite
def matmul_shapes(draw):
    m, k, n = (draw(st.integers(1, 6)) for _ in range(3))
    lead = draw(st.sampled_from([((), ()), ((3,), (3,)), ((2, 3), (3,)), ((2, 1), (1, 3))]))
    return (*lead[0], m, k), (*lead[1], k, n), draw(st.integers(0, 10**6))


@settings(deadline=None, max_examples=80)
@given(matmul_shapes(), st.sampled_from([np.uint8, np.int8]), st.booleans())
def test_matmul_integer_is_that_of_onnxruntime(case, b_dtype, per_column):
    a_shape, b_shape, seed = case
    rng = np.random.default_rng(seed)
    a = bytes_of(rng, a_shape, np.uint8)
    b = bytes_of(rng, b_shape, b_dtype, small=b_dtype is np.int8)
    a_zp = bytes_of(rng, (), np.uint8)
    # onnxruntime takes a 1-D zero point for a matrix only, and [..., 1, N] for a batch.
    columns = b_shape[-1:] if len(b_shape) == 2 else (*b_shape[:-2], 1, b_shape[-1])
    b_zp = bytes_of(rng, columns if per_column else (), b_dtype)
    got = matmul_integer(a, b, a_zp, b_zp)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, run("MatMulInteger", a, b, a_zp, b_zp))


def test_matmul_integer_takes_zero_points_per_row_and_batch():
    rng = np.random.default_rng(1)
    a, b = bytes_of(rng, (2, 3, 4), np.int8), bytes_of(rng, (2, 4, 5), np.int8)
    per_row = rng.integers(-128, 127, size=3, dtype=np.int8)
    want = (a.astype(int) - per_row[:, np.newaxis]) @ b.astype(int)
    np.testing.assert_array_equal(matmul_integer(a, b, per_row), want)
    a_zp = rng.integers(-128, 127, size=(2, 3, 1), dtype=np.int8)
    b_zp = rng.integers(-128, 127, size=(2, 1, 5), dtype=np.int8)
    want = (a.astype(int) - a_zp) @ (b.astype(int) - b_zp)
    np.testing.assert_array_equal(matmul_integer(a, b, a_zp, b_zp), want)


def test_matmul_integer_of_vectors_is_that_of_numpy():
    a, b = np.array([1, 2, 3], np.int8), np.array([4, 5, 6], np.int8)
    assert matmul_integer(a, b, 1, 2) == 0 * 2 + 1 * 3 + 2 * 4
    np.testing.assert_array_equal(matmul_integer(a, b[:, np.newaxis]), [32])
    np.testing.assert_array_equal(matmul_integer(a[np.newaxis], b), [32])


def test_sums_beyond_32_bits_wrap_as_in_onnxruntime():
    a, b = np.full((1, 40_000), 255, np.uint8), np.full((40_000, 1), 255, np.uint8)
    zero = np.array(0, np.uint8)
    got = matmul_integer(a, b)
    assert got == 40_000 * 255 * 255 - 2**32
    np.testing.assert_array_equal(got, run("MatMulInteger", a, b, zero, zero))


X, W = np.ones((1, 4, 5, 5), np.uint8), np.ones((6, 2, 3, 3), np.int8)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (X, W[:, :, 0], {}, "with the same 1 to 3 space axes"),
        (X[..., 0, 0], W[..., 0, 0], {}, "1 to 3 space axes"),
        (X, W, {}, "group 1 does not fit"),
        (X, W[:5], {"group": 2}, "group 2 does not fit"),
        (X, W, {"group": 0}, "group 0 does not fit"),
        (X, W, {"group": 2, "pads": [1, 1]}, r"pads is \[1, 1\]; give 4 whole numbers >= 0"),
        (X, W, {"group": 2, "pads": [-1, 0, 0, 0]}, "pads is"),
        (X, W, {"group": 2, "strides": [0, 1]}, "strides is .* give 2 whole numbers >= 1"),
        (X, W, {"group": 2, "dilations": [1]}, "dilations is"),
        (X, W, {"group": 2, "dilations": [3, 3]}, r"kernel covers \(7, 7\).*only \(5, 5\)"),
    ],
)
def test_geometry_that_does_not_fit_is_refused(x, w, options, message):
    with pytest.raises(ValueError, match=message):
        conv_integer(x, w, **options)
    with pytest.raises(ValueError, match=message):
        conv(x.astype(np.float32), w.astype(np.float32), **options)


def test_integer_kernels_refuse_other_dtypes_and_empty_tensors():
    with pytest.raises(ValueError, match="x is int32; integer kernels take int8 or uint8"):
        conv_integer(X.astype(np.int32), W, group=2)
    with pytest.raises(ValueError, match="b is float32"):
        matmul_integer(X[0, 0], X[0, 0].astype(np.float32))
    with pytest.raises(ValueError, match="no elements"):
        conv_integer(X[:0], W, group=2)


def test_zero_points_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="x_zero_point has shape"):
        conv_integer(X, W, np.zeros(4, np.uint8), group=2)
    with pytest.raises(ValueError, match=r"w_zero_point has shape .* shape \(6,\)"):
        conv_integer(X, W, 0, np.zeros(4, np.int8), group=2)
    a, b = np.ones((3, 4), np.uint8), np.ones((4, 5), np.uint8)
    with pytest.raises(ValueError, match="a_zero_point has shape"):
        matmul_integer(a, b, np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="b_zero_point has shape"):
        matmul_integer(a, b, 0, np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="does not spread over a"):
        matmul_integer(a, b, np.zeros((2, 3, 1), np.uint8))
    with pytest.raises(ValueError, match="does not spread over b"):
        matmul_integer(a, b, 0, np.zeros((3, 1), np.uint8))


def test_matmul_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="K of a and b must agree"):
        matmul_integer(np.ones((2, 3), np.uint8), np.ones((2, 3), np.uint8))
    with pytest.raises(ValueError, match="K of a and b must agree"):
        matmul_integer(np.uint8(3), np.ones((2, 3), np.uint8))


def test_float_conv_refuses_other_dtypes_and_biases():
    x, w = X.astype(np.float32), W.astype(np.float32)
    with pytest.raises(ValueError, match="x is uint8"):
        conv(X, w, group=2)
    with pytest.raises(ValueError, match="w is int8"):
        conv(x, W, group=2)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), but w has 6 outputs"):
        conv(x, w, np.ones(4, np.float32), group=2)
