"""Digits that are dropped are rounded into the ones that stay."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels_ref import PerAxis, expand
from onnxq.kernels_ref.digit import merge_digits
from onnxq.kernels_ref.round_digits import round_digits


def number(digits: list[int], bits: int) -> int:
    total = 0
    for digit in digits:
        total = (total << bits) + digit
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], int, int]:
    bits = draw(st.integers(2, 8))
    half = 1 << (bits - 1)
    count = draw(st.integers(1, min(4, 64 // bits)))
    # the first digit within ±h, as in every digit series
    first = st.integers(1 - half, half - 1)
    others = st.integers(-half, half - 1)
    row = st.tuples(first, *[others] * (count - 1)).map(list)
    return draw(st.lists(row, min_size=1, max_size=9)), bits, draw(st.integers(1, count))


@given(cases())
def test_nearest_and_ties_to_even(case):
    rows, bits, keep = case
    digits = [np.array(column, np.int8) for column in zip(*rows, strict=True)]
    kept = round_digits(digits, bits, keep)
    assert len(kept) == keep
    half, ones = 1 << (bits - 1), sum(1 << (bits * i) for i in range(keep))
    for row, got in zip(rows, np.stack(kept, axis=1).tolist(), strict=True):
        exact = round(Fraction(number(row, bits), 1 << (bits * (len(row) - keep))))  # half to even
        assert number(got, bits) == min(max(exact, -half * ones), (half - 1) * ones)
        assert all(-half <= digit < half for digit in got)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_of_a_series_stays_within_its_digits(bits):
    """A series' number is at most h in every digit, so that rounding never saturates."""
    w = np.random.default_rng(0).standard_normal((8, 500)).astype(np.float32)
    series = expand("digit", w, bits=bits, terms=3, granularity=PerAxis(0))
    wide = merge_digits(series.terms).astype(np.int64)
    for keep in (1, 2):
        kept = round_digits([term.q for term in series.terms], bits, keep)
        got = np.zeros(w.shape, np.int64)
        for digit in kept:
            got = (got << bits) + digit
        step = 1 << (bits * (3 - keep))
        assert np.abs(wide - got * step).max() <= step // 2


def test_all_digits_stay():
    digits = [np.array([7, -8, 0], np.int8), np.array([-8, 7, 1], np.int8)]
    for got, want in zip(round_digits(digits, 4, 2), digits, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("keep", "bits"), [(0, 4), (3, 4), (1, 9)])
def test_what_cannot_be(keep, bits):
    with pytest.raises(ValueError, match=r"keep is|bits is"):
        round_digits([np.zeros(2, np.int8)] * 2, bits, keep)
