"""Dynamic integer compute: every integer bit for bit, every float within its rounding bound."""

import numpy as np
import onnx
import pytest
from expanding import (
    basis_nodes,
    expand,
    from_rows,
    gamma,
    node,
    of_type,
    optimized,
    series_of,
    with_outputs,
)
from float_oracle import check_float
from geometry import Case, convs, gemms, integer_options, matmuls
from hypothesis import given, settings
from small import conv_model, model, ops, run, weights

from onnxq.kernels_ref import (
    PerTensor,
    affine_params,
    conv_integer,
    matmul_integer,
    quantize,
)

SETTINGS = settings(deadline=None, max_examples=80)


def check_activation(x: np.ndarray, q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
    """q, scale and zero point are those of kernels_ref, bit for bit."""
    ref_scale, ref_zero = affine_params(x, 8, PerTensor())
    if q.dtype == np.uint8:
        assert (scale, zero) == (ref_scale, ref_zero)
    else:
        check_int8_params(x, scale, zero, ref_scale, ref_zero)
    signed = q.dtype == np.int8
    expected = quantize(x, scale, int(zero), bits=8, granularity=PerTensor(), signed=signed)
    np.testing.assert_array_equal(q, expected)


def check_int8_params(x, scale, zero, ref_scale, ref_zero) -> None:
    if not x.any():
        assert scale > 0 and zero == -128
        return
    # range · fl(1/255) against range / 255: three roundings apart. A range of only one sign is
    # widened by 1e-20 instead of 0, which vanishes in the rounding of these tests' ranges.
    assert abs(scale / ref_scale - 1) <= 3 * 2.0**-23
    rmin = np.minimum(x.min(), np.float32(0))
    assert zero == np.rint(np.float32(-128) - rmin / scale)
    # The uint8 zero point shifted by 128, unless rounding the scale moved it over a tie.
    exact = -float(rmin) / float(ref_scale)
    if abs(exact % 1 - 0.5) > 255 * 4 * 2.0**-23:
        assert int(zero) == int(ref_zero) - 128


def check(case: Case, kind: str, options: dict) -> None:
    """The whole chain of one node, against kernels_ref."""
    after, plan = expand(case.proto, activations="dynamic", **options)
    entry = plan["op"]
    assert entry.activations == "dynamic"
    series = series_of(entry, plan, case.weight, out_last=case.out_last)
    found = basis_nodes(after, "op")
    merged = entry.layout == "merged"
    assert len(found) == (1 if merged else entry.terms)
    total, magnitude = np.float64(0), np.float64(0)
    for basis in found:
        term = onnx_term(basis)
        assert basis.op_type == f"{kind}Integer"
        scale_name = node(after, f"{basis.name}/scale").input[0]
        tensors = [basis.input[0], basis.input[2], basis.output[0], scale_name]
        seen = with_outputs(after, tensors, {"x": case.x})
        q, zero, product, x_scale = (seen[name] for name in tensors)
        wide = entry.bits * len(term) > 7
        assert q.dtype == (np.int8 if kind == "Conv" and not wide else np.uint8)
        check_activation(case.operand, q, x_scale, zero)
        expected = integer_product(case, kind, q, zero, merged_q(case, series, term))
        assert product.dtype == np.int32
        np.testing.assert_array_equal(product, expected)
        scale = channel_scale(case, series.terms[term[-1]].scale, product.ndim)
        part = product.astype(np.float64) * np.float64(x_scale) * scale
        total, magnitude = total + part, magnitude + np.abs(part)
    if case.bias is not None:
        total, magnitude = total + case.bias, magnitude + np.abs(case.bias)
    # Roundings on the way of one term: weight scale times x scale, int32 to float, their product;
    # then at most `terms` additions, the bias included.
    bound = gamma(3 + entry.terms) * magnitude
    for optimize in (True, False):
        (y,) = run(after, {"x": case.x}, optimize=optimize)
        assert y.shape == total.shape
        assert (np.abs(y - total) <= bound).all()


def onnx_term(basis: onnx.NodeProto) -> list[int]:
    (text,) = (e.value for e in basis.metadata_props if e.key == "onnxq.term")
    return [int(i) for i in text.split("+")]


def merged_q(case: Case, series, term: list[int]) -> np.ndarray:
    """The integers of the named terms as one int8 weight."""
    rows = sum(series.terms[i].q.astype(np.int64) << series.terms[i].bits * (term[-1] - i)
               for i in term)  # fmt: skip
    assert np.abs(rows).max() <= 128
    return from_rows(rows.astype(np.int8), case.weight.shape, out_last=case.out_last)


def integer_product(case: Case, kind: str, q, zero, weight) -> np.ndarray:
    if kind == "Conv":
        return conv_integer(q, weight, zero, 0, **case.attrs)
    return matmul_integer(q, np.ascontiguousarray(weight), zero, 0)


def channel_scale(case: Case, scale: np.ndarray, rank: int) -> np.ndarray:
    scale = scale.astype(np.float64)
    if "group" in case.attrs:
        return scale.reshape(-1, *(1 for _ in range(rank - 2)))
    if case.weight.ndim == 3:
        return scale.reshape(case.weight.shape[0], 1, case.weight.shape[2])
    return scale


def check_float_fallback(case: Case, options: dict, note: str) -> None:
    """What dynamic compute does not do is done in float, and the plan says why."""
    after, plan = expand(case.proto, activations="dynamic", **options)
    assert plan["op"].activations == "none"
    assert note in plan["op"].note
    check_float(case, after, plan)


@settings(deadline=None, max_examples=20)
@given(case=convs(ranks=(3,)), options=integer_options())
def test_conv_3d_is_computed_in_float(case, options):
    depthwise = case.attrs["group"] > 1 and case.weight.shape[1] == 1
    check_float_fallback(case, options, "depthwise" if depthwise else "3-D")


@settings(deadline=None, max_examples=20)
@given(case=convs(depthwise=True), options=integer_options())
def test_depthwise_conv_is_computed_in_float(case, options):
    check_float_fallback(case, options, "depthwise")


@SETTINGS
@given(case=convs(), options=integer_options())
def test_conv(case, options):
    check(case, "Conv", options)


@SETTINGS
@given(case=matmuls(), options=integer_options())
def test_matmul(case, options):
    if case.operand.ndim == 1 and case.weight.ndim == 3:
        check_float_fallback(case, options, "vector times batched weight")
    else:
        check(case, "MatMul", options)


@SETTINGS
@given(case=gemms(), options=integer_options())
def test_gemm(case, options):
    check(case, "MatMul", options)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_extreme_values_do_not_saturate(kind, bits):
    """The largest weights times the largest activations, many of them: sums beyond 16 bits.

    On x86 without VNNI, pairs of products are added in 16 bits; the choice of types avoids that.
    """
    k = 64
    weight = np.ones((2, k, 1) if kind == "Conv" else (k, 2), np.float32)
    x = np.concatenate([np.full(k - 1, 1.0), [-1e-3]]).astype(np.float32)
    x = x.reshape((1, k, 1) if kind == "Conv" else (1, k))
    shape = "1,2,1" if kind == "Conv" else "1,2"
    xs = ",".join(map(str, x.shape))
    proto = model(
        f"g (float[{xs}] x) => (float[{shape}] y) {{ [op] y = {kind} (x, w) }}", {"w": weight}
    )
    case = Case(
        proto, x, x, weight, out_last=kind == "MatMul", attrs={"group": 1} if kind == "Conv" else {}
    )
    check(case, kind, {"bits": bits, "terms": 2, "series": "fixed_ratio"})


def test_zero_input_gives_the_bias_exactly():
    proto = conv_model()
    after, _ = expand(proto, bits=4, terms=2)
    x = np.zeros((1, 3, 8, 8), np.float32)
    want = np.maximum(weights(4, seed=1), 0).reshape(1, 4, 1, 1)
    for optimize in (True, False):
        (y,) = run(after, {"x": x}, optimize=optimize)
        np.testing.assert_array_equal(y, np.broadcast_to(want, y.shape))


class TestStorage:
    @pytest.mark.parametrize(
        ("kind", "bits", "stored"),
        [
            ("Conv", 4, onnx.TensorProto.UINT4),
            ("Conv", 5, onnx.TensorProto.UINT8),
            ("Conv", 8, onnx.TensorProto.UINT8),
            ("MatMul", 3, onnx.TensorProto.INT4),
            ("MatMul", 7, onnx.TensorProto.INT8),
            ("MatMul", 8, onnx.TensorProto.UINT8),
        ],
    )
    def test_types(self, kind, bits, stored):
        proto = conv_model() if kind == "Conv" else linear_model()
        after, _ = expand(proto, bits=bits, terms=2)
        found = [name for name in of_type(after, stored) if not name.startswith("onnxq/")]
        assert found == ["w/term0/q", "w/term1/q"]
        assert "w" not in of_type(after, onnx.TensorProto.FLOAT)

    def test_merged_digits_are_stored_apart(self):
        after, _ = expand(conv_model(), bits=4, terms=2, layout="merged")
        assert of_type(after, onnx.TensorProto.INT4) == ["w/term0/q", "w/term1/q"]
        assert of_type(after, onnx.TensorProto.INT8, onnx.TensorProto.UINT8) == ["onnxq/uint8/128"]


def linear_model() -> onnx.ModelProto:
    return model(
        "g (float[2,32] x) => (float[2,16] y) { [fc] y = MatMul (x, w) }", {"w": weights(32, 16)}
    )


class TestWhatOnnxruntimeMakesOfIt:
    """Fusions of a default session that the lowering is written for."""

    @pytest.mark.parametrize("bits", [4, 8])
    def test_one_term_matmul(self, bits):
        after, _ = expand(linear_model(), bits=bits, terms=1)
        assert ops(optimized(after)) == ["DynamicQuantizeMatMul"]

    @pytest.mark.parametrize("bits", [4, 8])
    def test_two_term_matmul(self, bits):
        after, _ = expand(linear_model(), bits=bits, terms=2)
        fused = ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat", "Add"]
        assert ops(optimized(after)) == fused

    def test_merged_matmul(self):
        after, _ = expand(linear_model(), bits=4, terms=2, layout="merged")
        assert ops(optimized(after)) == ["DynamicQuantizeMatMul"]

    def test_gemm_with_a_transposed_weight_and_bias(self):
        proto = model(
            "g (float[2,32] x) => (float[2,16] y) { [fc] y = Gemm <transB = 1> (x, w, c) }",
            {"w": weights(16, 32), "c": weights(16)},
        )
        after, _ = expand(proto, bits=4, terms=1)
        assert ops(optimized(after)) == ["DynamicQuantizeMatMul"]

    @pytest.mark.parametrize(
        ("layout", "products"), [("parallel", 2), ("merged", 1)], ids=["parallel", "merged"]
    )
    def test_conv_weights_are_folded(self, layout, products):
        after, _ = expand(conv_model(), bits=4, terms=2, layout=layout)
        final = optimized(after)
        assert ops(final).count("ConvInteger") == products
        stored = {t.name: t for t in final.graph.initializer}
        for found in final.graph.node:
            if found.op_type == "ConvInteger":
                assert stored[found.input[1]].data_type == onnx.TensorProto.UINT8
                assert list(stored[found.input[1]].dims) == [4, 3, 3, 3]
        # the one Cast of the parallel form makes the zero point of x
        made = [n.output[0] for n in final.graph.node if n.op_type == "Cast"]
        assert made == (["x/int8/zero_point"] if layout == "parallel" else [])
