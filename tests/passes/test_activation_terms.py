"""Series of activations: every term and product bit for bit, every sum within its bound."""

import numpy as np
import onnx
import pytest
from expanding import (
    basis_nodes,
    expand,
    from_rows,
    gamma,
    metadata,
    node,
    of_type,
    optimized,
    series_of,
    with_outputs,
)
from geometry import Case, convs, gemms, integer_options, matmuls
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import conv_model, model, ops, run, weights

from onnxq.kernels_ref import Series, Term, conv, conv_integer, matmul_integer
from onnxq.kernels_ref.activation_series import SeriesProduct, activation_series, series_product
from onnxq.kernels_ref.products import dropped_bound, kept_products
from onnxq.plan import NodePlan

SETTINGS = settings(deadline=None, max_examples=60)
U32 = 2.0**-24

ACTIVATIONS = st.fixed_dictionaries(
    {
        "activation_bits": st.sampled_from([2, 3, 4, 5, 6, 7, 8, 8, 8]),
        "activation_terms": st.integers(1, 4),
        "products": st.sampled_from(["all", "triangular", "triangular", 1, 2, 3, 5]),
        "conv_activations": st.sampled_from(["int8", "uint8"]),
    }
)


def _spread(case: Case, scale: np.ndarray, rank: int) -> np.ndarray:
    """One scale per output channel, as it broadcasts over the output."""
    if "group" in case.attrs:
        return scale.reshape(-1, *(1 for _ in range(rank - 2)))
    shape = case.weight.shape
    return scale.reshape(shape[0], 1, shape[2]) if len(shape) == 3 else scale.reshape(-1)


def _integers(case: Case, series: Series, entry: NodePlan) -> list[tuple[np.ndarray, np.ndarray]]:
    """The integer weights of the basis nodes and their scales, in the operator's layout."""
    groups = [(i,) for i in range(entry.terms)]
    if entry.layout == "merged":
        groups = [tuple(range(entry.terms))]
    rank = case.weight.ndim
    made = []
    for group in groups:
        rows = sum(series.terms[i].q.astype(int) << entry.bits * (group[-1] - i) for i in group)
        q = from_rows(rows.astype(np.int8), case.weight.shape, out_last=case.out_last)
        scale = np.broadcast_to(series.terms[group[-1]].scale.reshape(-1), (len(rows),))
        made.append((np.ascontiguousarray(q), _spread(case, scale, rank)))
    return made


def _oracle(
    case: Case, series: Series, entry: NodePlan, *, signed: bool
) -> tuple[tuple[Term, ...], SeriesProduct]:
    relu = any(n.op_type == "Relu" for n in case.proto.graph.node)
    bits, count = entry.activation_bits, entry.activation_terms
    terms = activation_series(case.operand, bits, count, signed=signed, nonnegative=relu)
    weight = _integers(case, series, entry)
    kept = kept_products(
        len(weight),
        count,
        entry.products,
        weight_bits=entry.bits * (entry.terms if entry.layout == "merged" else 1),
        activation_bits=bits,
    )

    def product(q, w, zero_point):
        if "group" in case.attrs:
            return conv_integer(q, w, zero_point, **case.attrs)
        return matmul_integer(q, w, zero_point)

    return terms, series_product(terms, weight, kept, product)


def check(case: Case, options: dict) -> None:
    """Terms and integer products bit for bit; outputs within rounding, optimised or not."""
    after, plan = expand(case.proto, activations="dynamic", **options)
    entry = plan["op"]
    if entry.activations != "dynamic":
        return  # float compute: tested elsewhere
    series = series_of(entry, plan, case.weight, out_last=case.out_last)
    found = basis_nodes(after, "op")
    seen = with_outputs(
        after,
        [name for basis in found for name in (basis.input[0], basis.output[0])],
        {"x": case.x},
    )
    signed = seen[found[0].input[0]].dtype == np.int8
    quantized, oracle = _oracle(case, series, entry, signed=signed)
    assert len(found) == len(oracle.integers)
    for basis, ((_, j), expected) in zip(found, oracle.integers.items(), strict=True):
        if entry.activation_terms > 1:
            assert basis.name.endswith(f"x{j}")
            assert metadata(basis)["onnxq.activation_term"] == str(j)
        np.testing.assert_array_equal(seen[basis.input[0]], quantized[j].q, strict=True)
        np.testing.assert_array_equal(seen[basis.output[0]], expected, strict=True)
    total, magnitude = oracle.total, oracle.magnitude
    if case.bias is not None:
        total, magnitude = total + case.bias, magnitude + np.abs(case.bias)
    # Of one product: weight scale times x scale, int32 to float, their product; then at most one
    # addition per product, the bias included.
    bound = gamma(3 + len(found)) * magnitude
    for optimize in (True, False):
        (y,) = run(after, {"x": case.x}, optimize=optimize)
        assert y.shape == total.shape
        assert (np.abs(y - total) <= bound).all()


# What is written for other CPUs is not always exact on this one: MatMul's pair for ARM saturates
# on x86 without VNNI.
@SETTINGS
@given(
    case=convs(),
    options=integer_options(),
    activations=ACTIVATIONS,
    target=st.sampled_from(["cpu-avx2", "cpu-avx2", "cpu-arm"]),
)
def test_conv(case, options, activations, target):
    check(case, {**options, **activations, "target": target})


@SETTINGS
@given(case=matmuls(), options=integer_options(), activations=ACTIVATIONS)
def test_matmul(case, options, activations):
    check(case, {**options, **activations})


@settings(deadline=None, max_examples=30)
@given(case=gemms(), options=integer_options(), activations=ACTIVATIONS)
def test_gemm(case, options, activations):
    check(case, {**options, **activations})


@settings(deadline=None, max_examples=40)
@given(
    case=convs() | matmuls(),
    bits=st.integers(2, 8),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    products=st.sampled_from(["all", "triangular"]),
)
def test_the_float_result_comes_back_as_the_bound_says(case, bits, counts, products):
    """Error: Σ|w| · half the last scale of x, the weight's rest, dropped products, rounding."""
    terms, activation_terms = counts
    after, plan = expand(
        case.proto,
        activations="dynamic",
        bits=8,
        terms=terms,
        activation_bits=bits,
        activation_terms=activation_terms,
        products=products,
    )
    entry = plan["op"]
    assume(entry.activations == "dynamic")
    series = series_of(entry, plan, case.weight, out_last=case.out_last)
    rows = series.terms[0].q.shape[1]
    x, w = case.operand.astype(np.float64), case.weight.astype(np.float64)
    total = from_rows(series.dequantize().astype(np.float64), w.shape, out_last=case.out_last)
    span = float(max(x.max(), 0) - min(x.min(), 0))
    last = span / (2.0**bits - 1) ** activation_terms
    reach = _product(case, np.ones_like(x), np.abs(total))
    kept = kept_products(terms, activation_terms, products, activation_bits=bits)
    dropped = dropped_bound(series, bits, activation_terms, kept, span)
    # scales are rounded up by 2**-11 each; sums of `rows` products per basis node
    bound = reach * last / 2 * 1.01 + _product(case, np.abs(x), np.abs(w - total))
    bound = bound + _spread(case, dropped, reach.ndim) * 1.01
    magnitude = span * _product(case, np.ones_like(x), np.abs(w)) * 1.01 + 1e-18
    bias = np.zeros(()) if case.bias is None else case.bias.astype(np.float64)
    bound = bound + (10 + gamma(rows + 20) / U32) * U32 * (magnitude + np.abs(bias))
    (y,) = run(after, {"x": case.x})
    assert (np.abs(y - _product(case, x, w) - bias) <= bound).all()


def _product(case: Case, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return conv(x, w, **case.attrs) if "group" in case.attrs else np.matmul(x, w)


@pytest.mark.parametrize(("bits", "activation_bits"), [(7, 8), (8, 7), (8, 8)])
@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_extreme_values_do_not_saturate(kind, bits, activation_bits):
    """On x86 without VNNI pairs of products are added in 16 bits: all at their largest fit."""
    k = 64
    weight = np.ones((2, k, 1) if kind == "Conv" else (k, 2), np.float32)
    weight[1 if kind == "Conv" else (slice(None), 1)] = -1
    x = np.where(np.arange(k) % 32 < 16, 1, -1).astype(np.float32)
    x[::2] *= 1.002  # the rest of the first term is large as well
    x = x.reshape((1, k, 1) if kind == "Conv" else (1, k))
    xs, ys = ",".join(map(str, x.shape)), "1,2,1" if kind == "Conv" else "1,2"
    text = f"g (float[{xs}] x) => (float[{ys}] y) {{ [op] y = {kind} (x, w) }}"
    attrs = {"group": 1} if kind == "Conv" else {}
    case = Case(model(text, {"w": weight}), x, x, weight, out_last=kind == "MatMul", attrs=attrs)
    check(
        case,
        {"bits": bits, "terms": 2, "activation_bits": activation_bits, "activation_terms": 3},
    )


@pytest.mark.parametrize(
    ("kind", "target", "bits", "activation_bits", "pair"),
    [
        ("Conv", "cpu-avx2", 8, 8, ("UINT8", "UINT8")),
        ("Conv", "cpu-avx2", 8, 7, ("INT8", "UINT8")),
        ("Conv", "cpu-avx2", 7, 8, ("INT8", "UINT8")),
        ("Conv", "cpu-vnni", 8, 8, ("INT8", "UINT8")),
        ("Conv", "cpu-arm", 8, 8, ("INT8", "INT8")),
        ("MatMul", "cpu-avx2", 8, 8, ("UINT8", "UINT8")),
        ("MatMul", "cpu-avx2", 8, 7, ("UINT8", "INT8")),
        ("MatMul", "cpu-avx2", 7, 8, ("UINT8", "INT8")),
        ("MatMul", "cpu-vnni", 8, 8, ("UINT8", "INT8")),
    ],
)
def test_types(kind, target, bits, activation_bits, pair):
    proto = conv_model() if kind == "Conv" else linear_model()
    after, _ = expand(
        proto,
        bits=bits,
        terms=1,
        activation_bits=activation_bits,
        activation_terms=2,
        target=target,
    )
    inferred = onnx.shape_inference.infer_shapes(after)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    activation, weight = (getattr(onnx.TensorProto, name) for name in pair)
    found = basis_nodes(after, "conv" if kind == "Conv" else "fc")
    assert [types[basis.input[0]] for basis in found] == [activation, activation]
    assert of_type(after, weight).count("w/term0/q") == 1


def linear_model() -> onnx.ModelProto:
    return model(
        "g (float[2,32] x) => (float[2,16] y) { [fc] y = MatMul (x, w) }", {"w": weights(32, 16)}
    )


class TestNames:
    def test_one_basis_node_per_product(self):
        after, _ = expand(linear_model(), bits=8, terms=2, activation_terms=2)
        names = [basis.name for basis in basis_nodes(after, "fc")]
        assert names == ["fc/term0x0", "fc/term0x1", "fc/term1x0"]
        after, _ = expand(linear_model(), bits=8, terms=2, activation_terms=2, products="all")
        assert len(basis_nodes(after, "fc")) == 4

    def test_merged(self):
        after, _ = expand(linear_model(), bits=4, terms=2, layout="merged", activation_terms=2)
        found = basis_nodes(after, "fc")
        assert [basis.name for basis in found] == ["fc/mergedx0", "fc/mergedx1"]
        assert {metadata(basis)["onnxq.term"] for basis in found} == {"0+1"}

    def test_one_activation_term_is_named_as_before(self):
        after, _ = expand(linear_model(), bits=8, terms=2, products=1)
        (basis,) = basis_nodes(after, "fc")
        assert basis.name == "fc/term0"
        assert "onnxq.activation_term" not in metadata(basis)

    def test_terms_that_no_product_needs_are_not_made(self):
        after, _ = expand(linear_model(), bits=8, terms=2, activation_terms=3, products=2)
        assert [b.name for b in basis_nodes(after, "fc")] == ["fc/term0x0", "fc/term0x1"]
        assert ops(after).count("QuantizeLinear") == 1


class TestSharing:
    TWO = """g (float[2,32] x) => (float[2,16] y, float[2,16] z) {
        [a] y = MatMul (x, v)
        [b] z = MatMul (x, w)
    }"""

    def two(self, **update) -> onnx.ModelProto:
        proto = model(self.TWO, {"v": weights(32, 16), "w": weights(32, 16, seed=1)})
        options = {"bits": 7, "terms": 2, "activation_terms": 2}
        _, plan = expand(proto, **options)
        changed = [n.model_copy(update=update) if n.name == "b" else n for n in plan.nodes]
        return expand(proto, plan.model_copy(update={"nodes": changed}))[0]

    def test_readers_share_the_terms(self):
        found = ops(self.two())
        assert found.count("DynamicQuantizeLinear") == found.count("QuantizeLinear") == 1

    def test_a_reader_of_more_terms_adds_its_own(self):
        found = ops(self.two(activation_terms=3))
        assert found.count("DynamicQuantizeLinear") == 1
        assert found.count("QuantizeLinear") == 2

    def test_other_bits_are_quantized_apart(self):
        found = ops(self.two(activation_bits=4))
        assert found.count("DynamicQuantizeLinear") == 1
        assert found.count("QuantizeLinear") == 3


def test_a_weight_that_two_products_read_in_different_types_is_stored_for_each():
    """8-bit weights are uint8 for 8-bit activations, and int8 for narrower ones."""
    proto = model(TestSharing.TWO.replace("(x, v)", "(x, w)"), {"w": weights(32, 16)})
    _, plan = expand(proto, bits=8, terms=1, target="cpu-avx2")
    narrow = {"activation_bits": 7, "activation_terms": 2}
    nodes = [n.model_copy(update=narrow) if n.name == "b" else n for n in plan.nodes]
    after, _ = expand(proto, plan.model_copy(update={"nodes": nodes}))
    x = weights(2, 32, seed=4)
    (y, z), (want, _) = run(after, {"x": x}), run(proto, {"x": x})
    # half a scale of each side for every product that is summed, with a tenth to spare
    span, reach = np.ptp(x), np.abs(weights(32, 16))
    limit = 32 * (reach.max() * span / 255 + np.abs(x).max() * reach.max() / 127) / 2 * 1.1
    assert np.abs(y - want).max() <= limit
    assert np.abs(z - want).max() <= limit


class TestWhatOnnxruntimeMakesOfIt:
    @pytest.mark.parametrize("bits", [7, 8])
    def test_every_product_of_a_matmul_is_one_fused_node(self, bits):
        after, _ = expand(linear_model(), bits=bits, terms=2, activation_terms=2)
        final = ops(optimized(after))
        assert final.count("MatMulIntegerToFloat") == 3
        rest = sorted(op for op in final if op != "MatMulIntegerToFloat")
        made = ["DequantizeLinear", "DynamicQuantizeLinear", "Mul", "QuantizeLinear", "Sub"]
        assert rest == ["Add", "Add", *made]

    def test_no_clip_is_needed_for_few_bits(self):
        after, _ = expand(conv_model(), bits=4, terms=1, activation_bits=3, activation_terms=2)
        assert "Clip" not in ops(after)
        x = weights(1, 3, 8, 8, seed=5)
        names = [basis.input[0] for basis in basis_nodes(after, "conv")]
        seen = with_outputs(after, names, {"x": x})
        assert [len(np.unique(seen[name])) for name in names] == [8, 7]


def test_zero_input_gives_the_bias_exactly():
    after, _ = expand(conv_model(), bits=4, terms=2, activation_terms=3, products="all")
    x = np.zeros((1, 3, 8, 8), np.float32)
    want = np.maximum(weights(4, seed=1), 0).reshape(1, 4, 1, 1)
    for optimize in (True, False):
        (y,) = run(after, {"x": x}, optimize=optimize)
        np.testing.assert_array_equal(y, np.broadcast_to(want, y.shape))


def test_borders_are_padded_with_each_terms_zero_point():
    """Far from 0 and padded: a border that was padded with the integer 0 would be far off."""
    after, _ = expand(conv_model(), bits=8, terms=3, activation_terms=3)
    x = weights(1, 3, 8, 8, seed=3) + np.float32(40)
    assert node(after, "conv/term0x1").op_type == "ConvInteger"
    (want,), (y,) = run(conv_model(), {"x": x}), run(after, {"x": x})
    # 24 bits on both sides: what is left is the rounding of float32, of sums of 27 products
    limit = gamma(60) * 27 * np.abs(weights(4, 3, 3, 3)).max() * x.max()
    assert np.abs(y - want).max() <= limit
