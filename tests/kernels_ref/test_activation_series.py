from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import PerAxis, affine_params, conv_integer, expand, matmul_integer
from onnxq.kernels_ref.activation_series import activation_series, series_product
from onnxq.kernels_ref.granularity import PerTensor
from onnxq.kernels_ref.products import dropped_bound, kept_products

U32 = 2.0**-24


def levels(bits: int) -> int:
    return 2**bits - 1


def rounding(x: np.ndarray) -> float:
    """What float32 adds to the exact bound.

    With R = max - min: dequantizing and subtracting, R/2 · u per term at most and R · u for the
    first, 1.5 R u together; the division 1 R u; the ends of the range, moved by the roundings of
    scale, zero point and division, 6 R u.
    """
    return 10 * U32 * float(max(x.max(), 0) - min(x.min(), 0))


def check_series(x: np.ndarray, bits: int, terms: int, **options) -> None:
    made = activation_series(x, bits, terms, **options)
    signed = options.get("signed", False)
    h = levels(bits) // 2
    rest = x.astype(np.float64)
    for j, term in enumerate(made):
        low = -(2 ** (bits - 1)) if signed else 0
        q = term.q.astype(np.int64)
        assert term.q.dtype == (np.int8 if signed else np.uint8)
        assert q.min() >= low and q.max() <= low + levels(bits)
        assert low <= term.zero_point <= low + levels(bits)
        assert j == 0 or np.abs(q - term.zero_point).max() <= h
        # Where x is 0, so is every term: this is what padding with the zero point relies on.
        assert (q[x == 0] == term.zero_point).all()
        rest = rest - np.float64(term.scale) * (q - term.zero_point)
        assert np.abs(rest).max() <= np.float64(term.scale) / 2 + rounding(x)


BITS, TERMS = st.integers(2, 8), st.integers(1, 4)
ARRAYS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
    elements=st.floats(-1000, 1000, width=32).map(lambda v: 0.0 if abs(v) < 1e-6 else v),
)


@settings(deadline=None, max_examples=300)
@given(ARRAYS, BITS, TERMS, st.booleans())
def test_residual_is_within_half_a_scale_for_every_number_of_terms(x, bits, terms, signed):
    check_series(x, bits, terms, signed=signed)
    check_series(np.abs(x), bits, terms, signed=signed, nonnegative=True)


@settings(deadline=None, max_examples=300)
@given(st.data(), BITS, st.booleans(), st.integers(-20, 20))
def test_the_hardest_ranges_stay_in_their_bits(data, bits, signed, power):
    """Both ends of the range halfway between two levels: both would round outwards."""
    k = data.draw(st.integers(0, levels(bits) - 1))
    ends = np.array([-(k + 0.5), 0, levels(bits) - k - 0.5], np.float64)
    shifted = ends * (1 + data.draw(st.integers(-4, 4)) * U32)
    check_series(np.ldexp(shifted, power).astype(np.float32), bits, 3, signed=signed)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), BITS, TERMS)
def test_scales_fall_by_the_number_of_levels_less_one(seed, bits, terms):
    x = np.random.default_rng(seed).standard_normal(50).astype(np.float32)
    made = activation_series(x, bits, terms, signed=True)
    ratios = [float(a.scale / b.scale) for a, b in pairwise(made)]
    # 2**-11 that keeps residuals below level h + 1/2, and two roundings
    np.testing.assert_allclose(ratios, levels(bits), rtol=2.0**-11 + 4 * U32)


def test_eight_unsigned_bits_are_dynamic_quantize_linear():
    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    (term,) = activation_series(x, 8, 1)
    assert (term.scale, term.zero_point) == affine_params(x, 8, PerTensor())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_all_zero(bits, signed):
    for term in activation_series(np.zeros((2, 3), np.float32), bits, 4, signed=signed):
        assert term.scale > 0
        assert (term.q == term.zero_point).all()


@pytest.mark.parametrize(
    ("x", "bits", "terms", "message"),
    [
        (np.zeros(2), 8, 1, "float64"),
        (np.zeros(0, np.float32), 8, 1, "no elements"),
        (np.array([np.nan], np.float32), 8, 1, "NaN"),
        (np.zeros(2, np.float32), 1, 1, "bits is 1"),
        (np.zeros(2, np.float32), 9, 1, "bits is 9"),
        (np.zeros(2, np.float32), 8, 0, "terms is 0"),
    ],
)
def test_unfit_arguments(x, bits, terms, message):
    with pytest.raises(ValueError, match=message):
        activation_series(x, bits, terms)


class TestKeptProducts:
    @pytest.mark.parametrize(
        ("n", "m", "dropped"),
        [
            (1, 1, set()),
            (2, 1, set()),
            (1, 3, set()),
            (2, 2, {(1, 1)}),
            (3, 2, {(2, 1)}),
            (2, 3, {(1, 2)}),
            (3, 3, {(1, 2), (2, 1), (2, 2)}),
        ],
    )
    def test_triangular(self, n, m, dropped):
        every = set(kept_products(n, m, "all"))
        assert len(every) == n * m
        kept = kept_products(n, m)
        assert set(kept) == every - dropped
        # the rule as it is stated, in numbers from 1
        assert all(i + 1 + j + 1 <= max(n, m) + 1 for i, j in kept)

    def test_a_number_keeps_the_most_significant(self):
        assert kept_products(2, 2, 1) == ((0, 0),)
        # 8 + 8 bits tie: the activation's second term goes before the weight's
        assert kept_products(2, 2, 2) == ((0, 0), (0, 1))
        assert kept_products(2, 2, 3) == ((0, 0), (0, 1), (1, 0))
        assert kept_products(2, 2, 9) == kept_products(2, 2, "all")
        # 4-bit weight terms fall more slowly than 8-bit activation terms
        assert kept_products(3, 2, 3, weight_bits=4) == ((0, 0), (0, 1), (1, 0))
        assert kept_products(3, 2, 2, weight_bits=4) == ((0, 0), (1, 0))

    @settings(deadline=None, max_examples=100)
    @given(TERMS, TERMS, st.integers(1, 16), BITS, BITS)
    def test_numbers_are_nested(self, n, m, count, weight_bits, activation_bits):
        bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        fewer = kept_products(n, m, count, **bits)
        assert len(fewer) == min(count, n * m)
        assert (0, 0) in fewer
        assert set(fewer) <= set(kept_products(n, m, count + 1, **bits))

    def test_none_is_refused(self):
        with pytest.raises(ValueError, match="products is 0"):
            kept_products(2, 2, 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), BITS, BITS, st.integers(1, 3), st.integers(1, 3))
def test_dropped_products_are_within_their_bound(seed, bits, activation_bits, n, m):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((5, 12)).astype(np.float32)
    # the signs of one row of the weight: every product of that row adds up
    x = np.concatenate([rng.uniform(-3, 2, (4, 12)), 3 * np.sign(w[:1])]).astype(np.float32)
    series = expand("fixed_ratio", w, bits=bits, terms=n, granularity=PerAxis(0))
    terms = activation_series(x, activation_bits, m)
    weight = [(np.ascontiguousarray(t.q.T), t.scale.reshape(-1)) for t in series.terms]
    whole = series_product(terms, weight, kept_products(n, m, "all"), matmul_integer).total
    kept = kept_products(n, m, 1)
    dropped = whole - series_product(terms, weight, kept, matmul_integer).total
    span = float(x.max() - min(x.min(), 0))
    bound = dropped_bound(series, activation_bits, m, kept, span)
    assert bound.shape == (5,)
    # the scales' own rounding, a few units in the last place
    assert (np.abs(dropped) <= bound * (1 + 2.0**-20)).all()
    assert dropped_bound(series, activation_bits, m, kept_products(n, m, "all")).max() == 0


def test_the_bound_is_reached_where_every_product_adds_up():
    w = np.array([[1.0, 0.01, 0.01]], np.float32)  # the second and third leave a positive rest
    x = np.ones((1, 3), np.float32)
    series = expand("fixed_ratio", w, bits=8, terms=2, granularity=PerAxis(0))
    weight = [(np.ascontiguousarray(t.q.T), t.scale.reshape(-1)) for t in series.terms]
    made = series_product(activation_series(x, 8, 1), weight, [(1, 0)], matmul_integer)
    assert made.total[0, 0] > 0
    np.testing.assert_allclose(made.total[0], dropped_bound(series, 8, 1, [(0, 0)]), rtol=4 * U32)


def test_series_product_of_a_padded_convolution():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((2, 3, 6, 5)) + 5).astype(np.float32)  # 0 is far from its middle
    w = rng.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (4, 1, 1)).astype(np.float32)

    def product(q, weight, zero_point):
        return conv_integer(q, weight, zero_point, pads=[1, 2, 0, 1], strides=[2, 1])

    terms = activation_series(x, 8, 3, signed=True)
    made = series_product(terms, [(w, scale)], [(0, 0), (0, 1), (0, 2)], product)
    assert set(made.integers) == {(0, 0), (0, 1), (0, 2)}
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 0), (2, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2]
    exact = np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float64)) * scale
    reach = np.abs(w.astype(np.float64)).sum(axis=(1, 2, 3)).reshape(-1, 1, 1) * scale
    limit = reach * (np.float64(terms[-1].scale) / 2 + rounding(x))
    assert (np.abs(made.total - exact) <= limit).all()
    with pytest.raises(ValueError, match="no product"):
        series_product(terms, [(w, scale)], [], product)
