"""Static integer compute of one node: its integers bit for bit, its outputs within their bounds."""

import numpy as np
import onnx
import pytest
from calibrating import static
from expanding import basis_nodes, from_rows, gamma, node, of_type, optimized, series_of
from geometry import Case, convs, gemms, matmuls
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from small import conv_model, model, ops, run, weights

from onnxq.errors import ConfigError
from onnxq.kernels_ref import activation_params, conv_integer, matmul_integer, quantize
from onnxq.kernels_ref.granularity import PerTensor
from onnxq.passes.fit_pairs import pairs_fit
from onnxq.plan import Plan

SETTINGS = settings(deadline=None, max_examples=60)

OPTIONS = st.sampled_from(
    [
        {"bits": 8},
        {"bits": 7},
        {"bits": 4},
        {"bits": 2},
        {"bits": 4, "terms": 2, "series": "digit"},
        {"bits": 2, "terms": 3, "series": "digit"},
        {"bits": 7, "target": "cpu-arm"},  # 8 would saturate where the test runs on x86
    ]
)


def initializer(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def integers(case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(The summed integer weight, its scale per row), as kernels_ref makes them."""
    entry = plan["op"]
    terms = series_of(entry, plan, case.weight, out_last=case.out_last).terms
    last = len(terms) - 1
    rows = sum(t.q.astype(np.int64) << t.bits * (last - i) for i, t in enumerate(terms))
    assert np.abs(rows).max() <= 128
    scale = np.broadcast_to(np.float32(terms[last].scale), (len(rows),))
    return from_rows(rows.astype(np.int8), case.weight.shape, out_last=case.out_last), scale


def check(case: Case, options: dict) -> None:
    """Real values from exact integers; what the runtime gives is within its roundings of them."""
    after, plan = static(case.proto, [{"x": case.x}], **options)
    if plan["op"].activations == "none":  # batched weights
        assert case.weight.ndim == 3 and case.out_last
        return
    signed = options.get("target") == "cpu-arm"
    (basis,) = basis_nodes(after, "op")
    scale, zero = activation_params(*plan.ranges[operand(after)], signed=signed)
    q = quantize(case.operand, scale, zero, bits=8, granularity=PerTensor(), signed=signed)
    weight, w_scale = integers(case, plan)
    product = (conv_integer if "group" in case.attrs else matmul_integer)(
        q, np.ascontiguousarray(weight), np.asarray(zero, q.dtype), 0, **case.attrs
    ).astype(np.float64)
    size = np.abs(q.astype(np.int64) - zero).max(initial=0) * np.abs(weight.astype(int)).max()
    steps = channels(case, np.float64(scale * w_scale), product.ndim)
    magnitude = float(size * case.products) * steps + 0 * product
    if case.bias is not None:
        held = basis.op_type != "MatMul"  # as int32; else it is added in float
        rounded = np.rint(case.bias / steps) * steps if held else case.bias
        product, magnitude = product * steps + rounded, magnitude + np.abs(case.bias)
    else:
        product = product * steps
    # One rounding per product and sum in float, and four in scales and conversions.
    bound = gamma(case.products + 6) * magnitude
    if "y" in plan.ranges:
        s, z = activation_params(*plan.ranges["y"], signed=signed)
        low, high = (-128, 127) if signed else (0, 255)
        product = np.clip(product, (low - z) * np.float64(s), (high - z) * np.float64(s))
        bound = bound + (0.5 + gamma(4) * 256) * np.float64(s)
    for optimize in (True, False):
        (y,) = run(after, {"x": case.x}, optimize=optimize)
        assert y.shape == product.shape
        assert (np.abs(y - product) <= bound).all()


def operand(after: onnx.ModelProto) -> str:
    """The name of what the node reads: x, after Relu, or transposed."""
    (basis,) = basis_nodes(after, "op")
    return basis.input[0].removesuffix("/dequantized")


def channels(case: Case, scale: np.ndarray, rank: int) -> np.ndarray:
    if "group" in case.attrs:
        return scale.reshape(-1, *(1 for _ in range(rank - 2)))
    return scale


@given(convs(), OPTIONS)
@SETTINGS
def test_conv(case: Case, options: dict) -> None:
    check(case, options)


@given(convs(depthwise=True), OPTIONS)
@settings(deadline=None, max_examples=20)
def test_depthwise_alone_stays_float(case: Case, options: dict) -> None:
    _, plan = static(case.proto, [{"x": case.x}], **options)
    assert plan["op"].activations == "none"
    assert "depthwise" in (plan["op"].note or "")


@given(matmuls(), OPTIONS)
@SETTINGS
def test_matmul(case: Case, options: dict) -> None:
    check(case, options)


def test_bits_are_stored_packed() -> None:
    x = weights(1, 3, 8, 8)
    for bits, terms, packed in ((4, 1, 1), (4, 2, 2), (8, 1, 0)):
        after, _ = static(conv_model(), [{"x": x}], bits=bits, terms=terms, series="digit")
        assert len(of_type(after, onnx.TensorProto.INT4, onnx.TensorProto.UINT4)) == packed
        kernels = ops(optimized(after))
        assert kernels.count("QLinearConv") == 1 and "Conv" not in kernels
        assert "Cast" not in kernels and "Relu" not in kernels


@pytest.mark.parametrize("target", ["cpu-vnni", "cpu-avx2", "cpu-arm"])
def test_types_are_those_of_the_target(target: str) -> None:
    options = {"target": target, "avoid_saturation": False}
    after, _ = static(conv_model(), [{"x": weights(1, 3, 8, 8)}], bits=8, **options)
    weight = "uint8" if target == "cpu-avx2" else "int8"
    activation = "int8" if target == "cpu-arm" else "uint8"
    assert initializer(after, "w/term0/q").dtype == weight
    assert initializer(after, node(after, "x/quantized").input[2]).dtype == activation


def test_a_huge_bias_and_a_dead_channel() -> None:
    """Biases of 2^40 and more steps, and one beside weights that are all zero."""
    w = weights(4, 3, 3, 3)
    w[1] *= 1e-12
    w[2] = 0
    b = np.float32([0.5, 3.0, 0.7, -1.0])
    proto = conv_model()
    for name, array in (("w", w), ("b", b)):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    x = weights(1, 3, 8, 8, seed=3)
    after, plan = static(proto, [{"x": x}], bits=8)
    (y,) = run(after, {"x": x})
    step = activation_params(*plan.ranges["y"])[0]
    for channel in (1, 2):  # nothing but the bias
        assert np.abs(y[:, channel] - b[channel]).max() <= 0.501 * step


def test_a_zero_input() -> None:
    x = np.zeros((1, 3, 8, 8), np.float32)
    after, plan = static(conv_model(), [{"x": x}])
    assert plan.ranges["x"] == (0.0, 1.0)
    (want,), (got,) = run(conv_model(), {"x": x}), run(after, {"x": x})
    assert np.abs(got - want).max() <= 0.51 * activation_params(*plan.ranges["y"])[0]


def test_terms_in_parallel_write_float() -> None:
    x = weights(1, 3, 8, 8)
    after, plan = static(conv_model(), [{"x": x}], bits=4, terms=2, layout="parallel")
    assert list(plan.ranges) == ["x"]
    assert ops(after).count("ConvInteger") == 2 and "DynamicQuantizeLinear" not in ops(after)
    (want,), (got,) = run(conv_model(), {"x": x}), run(after, {"x": x})
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)


def test_two_nodes_share_a_weight() -> None:
    proto = model(
        """g (float[1,3,8,8] x) => (float[1,3,8,8] y) {
            [first] a = Conv <pads = [1,1,1,1]> (x, w, b)
            [second] y = Conv <pads = [1,1,1,1]> (a, w, b)
        }""",
        {"w": weights(3, 3, 3, 3), "b": weights(3, seed=1)},
    )
    after, _ = static(proto, [{"x": weights(1, 3, 8, 8)}], bits=4)
    assert len(of_type(after, onnx.TensorProto.INT4)) == 1
    assert ops(optimized(after)).count("QLinearConv") == 2


def test_a_plan_without_the_range_is_refused() -> None:
    _, plan = static(conv_model(), [{"x": weights(1, 3, 8, 8)}])
    del plan.ranges["x"]
    with pytest.raises(ConfigError, match="no range for tensor 'x'"):
        static(conv_model(), [], plan)


@given(gemms(), OPTIONS)
@SETTINGS
def test_gemm(case: Case, options: dict) -> None:
    """Whatever C is: on integers, and as near to the float model as both operands' steps allow."""
    after, plan = static(case.proto, [{"x": case.x}], **options)
    kernels = ops(optimized(after))
    assert {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul"} & set(kernels)
    check_rounding(case, after, plan)


def check_rounding(case: Case, after: onnx.ModelProto, plan: Plan) -> None:
    scale, _ = activation_params(*plan.ranges[operand(after)])
    weight, w_scale = integers(case, plan)
    used = weight.astype(np.float64) * w_scale
    exact = case.operand.astype(np.float64) @ used
    # Half a step of x (a whole one where the zero point was rounded) per weight, half one of bias.
    bound = np.abs(used).sum(axis=0) * scale + 0.5 * scale * w_scale
    for name, (low, high) in plan.ranges.items():  # of the product, where that is quantized too
        if name not in (operand(after), "x", "y"):
            exact = np.clip(exact, low, high)  # the range is that of the float weights
            bound = bound + activation_params(low, high)[0]
    exact = exact + (0 if case.bias is None else case.bias)
    size = np.abs(case.operand).astype(np.float64) @ np.abs(used) + np.abs(exact)
    for optimize in (True, False):
        (y,) = run(after, {"x": case.x}, optimize=optimize)
        assert (np.abs(y - exact) <= bound + gamma(case.products + 6) * size).all()


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_eight_bits_that_cannot_saturate_are_int8(op: str) -> None:
    """The worst case of x86 without VNNI: the largest activations, weights of one sign."""
    if op == "Conv":
        proto, x = conv_model(), np.full((1, 3, 8, 8), 3, np.float32)
        w = np.abs(weights(4, 3, 3, 3))
    else:
        text = "g (float[3,16] x) => (float[3,4] y) { [conv] y = MatMul (x, w) }"
        w, x = np.abs(weights(16, 4)), np.full((3, 16), 3, np.float32)
        proto = model(text, {"w": w})
    tensor = next(t for t in proto.graph.initializer if t.name == "w")
    tensor.CopyFrom(numpy_helper.from_array(w, "w"))
    wide, _ = static(proto, [{"x": x}], bits=8, avoid_saturation=False)
    fast, plan = static(proto, [{"x": x}], bits=8)
    assert initializer(wide, "w/term0/q").dtype == np.uint8
    assert initializer(fast, "w/term0/q").dtype == np.int8
    (plain,), (fused,) = (run(fast, {"x": x}, optimize=o) for o in (False, True))
    step = activation_params(*plan.ranges["y"])[0] if "y" in plan.ranges else np.float32(0)
    assert np.abs(plain - fused).max() <= 1.001 * step + 1e-5 * np.abs(plain).max()


def test_pairs_fit() -> None:
    assert pairs_fit(np.array([[127, 1, -128, 1, 64, 64, -64, -64, 100]]), 1)
    assert not pairs_fit(np.array([[0, 100, 29]]), 1)
    assert not pairs_fit(np.array([[0, -100, -29]]), 1)
    # neighbours among the channels of one place, as in a layout with channels last
    assert not pairs_fit(np.array([[100, 0, 29, 0]]), 2)
    assert pairs_fit(np.array([[100, 0, -29, 0]]), 2)
