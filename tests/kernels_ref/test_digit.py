import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import (
    PerAxis,
    PerTensor,
    Term,
    expand,
    half_range,
    merge_digits,
    realize,
    relative_error,
    series_scales,
)
from onnxq.kernels_ref.digit import wide_dtype, wide_half_range

WIDTHS = st.tuples(st.integers(2, 8), st.integers(1, 5)).filter(lambda c: c[0] * c[1] <= 40)


def series_of(wide, bits, terms):
    """The digit series of given wide integers, with finest scale 1."""
    scales = [np.asarray(2.0 ** (bits * i)) for i in reversed(range(terms))]
    w = np.asarray(wide, dtype=np.float64)
    return realize("digit", w, scales, bits=bits, granularity=PerTensor())


def slow_merge(terms, bits):
    total = np.zeros(terms[0].q.shape, dtype=object)
    for term in terms:
        total = total * 2**bits + term.q.astype(object)
    return total


@settings(deadline=None, max_examples=150)
@given(WIDTHS, st.data())
def test_digits_are_exact_in_range_and_merge_back(widths, data):
    bits, terms = widths
    limit = wide_half_range(bits, terms)
    wide = data.draw(st.lists(st.integers(-limit, limit), min_size=1, max_size=20))
    wide = np.array([*wide, limit, -limit, 0])
    series = series_of(wide, bits, terms)
    h = half_range(bits)
    assert all(term.q.dtype == np.int8 for term in series.terms)
    assert np.abs(series.terms[0].q.astype(int)).max() <= h
    for term in series.terms[1:]:
        assert term.q.min() >= -h - 1
        assert term.q.max() <= h
    np.testing.assert_array_equal(slow_merge(series.terms, bits), wide)
    merged = merge_digits(series.terms)
    assert merged.dtype == wide_dtype(bits, terms)
    np.testing.assert_array_equal(merged, wide)
    np.testing.assert_array_equal(series.dequantize(), wide)  # below 2**53: exact


@pytest.mark.parametrize(("bits", "terms"), [(2, 2), (2, 3), (2, 4), (3, 2), (4, 2)])
def test_all_wide_integers_of_a_byte_survive(bits, terms):
    limit = wide_half_range(bits, terms)
    wide = np.arange(-limit, limit + 1)
    merged = merge_digits(series_of(wide, bits, terms).terms)
    assert merged.dtype == np.int8
    np.testing.assert_array_equal(merged, wide)


def test_the_widest_range_is_the_largest_with_a_top_digit_of_h():
    # One more would carry into the next place: the limit cannot be raised.
    limit = wide_half_range(4, 2)
    assert limit == 7 * 16 + 7
    assert (limit + 1 + 8) // 16 == 8  # rounding division by 16: the top digit would be 8 > h


@settings(deadline=None, max_examples=80)
@given(
    hnp.arrays(np.float64, (3, 7), elements=st.floats(-1, 1)),
    WIDTHS,
    st.integers(-100, 100),
)
def test_real_weights_are_within_half_the_finest_scale(x, widths, power):
    bits, terms = widths
    x[np.abs(x) < 1e-100] = 0
    w = np.ldexp(x, power)
    series = expand("digit", w, bits=bits, terms=terms, granularity=PerAxis(0))
    finest = series.terms[-1].scale[:, np.newaxis]
    np.testing.assert_array_equal(
        merge_digits(series.terms),
        np.rint(w / finest).clip(-wide_half_range(bits, terms), wide_half_range(bits, terms)),
    )
    # Rounding of w / s, of each product and of each difference, relative to |w| <= absmax.
    slack = (2 * terms + 2) * np.finfo(float).eps * np.abs(w).max(axis=1, keepdims=True)
    assert np.all(np.abs(series.residual(w)) <= finest / 2 + slack)


def test_scales_are_exactly_two_to_the_bits_apart():
    w = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    scales = series_scales("digit", w, bits=3, terms=4, granularity=PerAxis(0))
    for coarse, fine in itertools.pairwise(scales):
        assert coarse.dtype == np.float32
        np.testing.assert_array_equal(coarse, 8 * fine)


def test_float32_with_more_bits_than_its_mantissa_keeps_the_top_digit_in_range():
    w = np.array([1.0, -1.0, 0.3], dtype=np.float32)
    series = expand("digit", w, bits=8, terms=8, granularity=PerTensor())
    assert np.abs(series.terms[0].q.astype(int)).max() <= 127
    # The finest scale is rounded to float32, and so is the sum: a few units in the last place.
    np.testing.assert_allclose(series.dequantize(), w, rtol=9 * np.finfo(np.float32).eps)


def test_four_terms_of_two_bits_beat_the_fixed_ratio():
    w = np.random.default_rng(3).standard_normal(20_000)
    options = {"bits": 2, "terms": 4, "granularity": PerTensor()}
    errors = {
        kind: relative_error(w, expand(kind, w, **options).dequantize())
        for kind in ("digit", "fixed_ratio")
    }
    # Their finest scales are absmax / 85 and absmax / 8, and the error is even within a step.
    assert errors["digit"] * 8 < errors["fixed_ratio"]
    np.testing.assert_allclose(errors["digit"], np.abs(w).max() / 85 / 12**0.5, rtol=0.05)


def term(q, scale, bits=4):
    return Term(np.array(q, np.int8), np.asarray(float(scale)), 0, bits, PerTensor())


def test_terms_that_are_no_digit_series_are_refused():
    with pytest.raises(ValueError, match="terms is empty"):
        merge_digits([])
    with pytest.raises(ValueError, match=r"bits are \[4, 3\]"):
        merge_digits([term([1], 16), term([1], 1, bits=3)])
    with pytest.raises(ValueError, match="scale 0 is not 16 times scale 1"):
        merge_digits([term([1], 14), term([1], 1)])
    with pytest.raises(ValueError, match="outside ±7"):
        merge_digits([term([-8], 16), term([1], 1)])


def test_realize_refuses_scales_of_another_ratio():
    scales = [np.asarray(14.0), np.asarray(1.0)]
    with pytest.raises(ValueError, match="scale 0 is not 16 times scale 1"):
        realize("digit", np.ones(3), scales, bits=4, granularity=PerTensor())


def test_series_wider_than_64_bits_are_refused():
    with pytest.raises(ValueError, match="9 terms of 8 bits need a wide integer of 72 bits"):
        series_scales("digit", np.ones(3), bits=8, terms=9, granularity=PerTensor())
