"""Scales as float16: what is stored is what was planned, and nothing saturates for it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import PerBlock, fixed_ratio_bound, realize, reduce_absmax, series_scales
from onnxq.kernels_ref.half import as_half, half_scales, series_ratio

KINDS = ("fixed_ratio", "digit", "joint")
# Rounded up to 11 significant bits.
MOST_GROWTH = 2.0**-10


def floats(low: float, high: float, *shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


class TestAsHalf:
    @given(
        hnp.arrays(np.float16, (3, 5), elements=st.floats(2.0**-14, 60000, width=16)),
        st.integers(-60, 60),
    )
    def test_what_is_made_of_half_numbers_comes_back(self, numbers, power):
        scale = np.ldexp(numbers.astype(np.float32), power)
        found = as_half(scale)
        if found is None:  # brought to the top, the smallest needs bits that float16 has not
            assert numbers.max() / numbers.min() > 2.0**28
            return
        half, factor = found
        assert half.dtype == np.float16
        assert np.frexp(factor)[0] == 0.5  # a power of two
        np.testing.assert_array_equal(half.astype(np.float32) * factor, scale)

    def test_no_factor_where_none_is_needed(self):
        half, power = as_half(np.float32([[0.5, 6e4], [2.0**-14, 1.0]]))
        assert power == 1
        assert half.shape == (2, 2)

    @pytest.mark.parametrize(
        "scale",
        [[1 + 2.0**-11], [1.0, 2.0**-45], [2.0**120]],
        ids=["12 bits", "far apart", "a power that float32 may not divide by"],
    )
    def test_what_does_not_fit(self, scale):
        assert as_half(np.float32(scale)) is None


class TestHalfScales:
    @settings(deadline=None)
    @given(
        w=floats(-1, 1, 4, 24),
        kind=st.sampled_from(KINDS),
        bits=st.integers(2, 8),
        terms=st.integers(1, 4),
        power=st.integers(-40, 40),
    )
    def test_they_grow_a_little_and_fit(self, w, kind, bits, terms, power):
        w[np.abs(w) < 2.0**-10] = 0  # blocks of zeros have scale 1
        w = np.ldexp(w, power)
        before = series_scales(kind, w, bits=bits, terms=terms, granularity=PerBlock(1, 8))
        after = half_scales(kind, before, bits)
        if all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
            return
        assert as_half(after[0]) is not None
        for old, new in zip(before, after, strict=True):
            assert new.dtype == old.dtype
            # of a ratio that is no power of two, each division rounds once more
            ulp = terms * float(np.finfo(old.dtype).eps)
            assert (new >= old * (1 - ulp)).all()
            assert (new <= old * (1 + MOST_GROWTH) * (1 + ulp)).all()
        if kind != "joint" and terms > 1:
            assert series_ratio(kind, after, bits) == (2**bits - 2 * (kind == "fixed_ratio"))

    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit"])
    @pytest.mark.parametrize(("bits", "terms"), [(4, 1), (4, 3), (8, 1), (8, 2)])
    def test_the_largest_weights_do_not_saturate(self, kind, bits, terms):
        w = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
        blocks = PerBlock(1, 16)
        scales = series_scales(kind, w, bits=bits, terms=terms, granularity=blocks)
        made = half_scales(kind, scales, bits)
        series = realize(kind, w, made, bits=bits, granularity=blocks)
        rest = np.abs(series.residual(w)).reshape(16, 4, 16).max(axis=2)
        # half a step, and the float32 roundings of the division and of the subtractions
        rounding = 4 * terms * np.finfo(np.float32).eps * reduce_absmax(w, blocks)
        assert (rest <= made[-1] / 2 + rounding).all()
        if kind == "fixed_ratio":
            bound = fixed_ratio_bound(reduce_absmax(w, blocks), bits, terms)
            assert (rest <= bound * (1 + MOST_GROWTH) + rounding).all()

    def test_blocks_that_lie_too_far_apart_keep_all_bits(self):
        scales = (np.float32([[0.3, 1e-30]]),)
        (made,) = half_scales("fixed_ratio", scales, 4)
        np.testing.assert_array_equal(made, scales[0])

    def test_a_series_whose_scales_were_multiplied_by_one_number_keeps_its_ratio(self):
        first = np.float32([[0.3, 0.7, 0.11]])
        clipped = tuple(s * np.float32(0.83) for s in (first, first / np.float32(14)))
        assert series_ratio("fixed_ratio", half_scales("fixed_ratio", clipped, 4), 4) == 14

    def test_scales_in_no_ratio_are_rounded_each_alone(self):
        scales = (np.float32([[0.3]]), np.float32([[0.011]]))
        made = half_scales("fixed_ratio", scales, 4)
        assert series_ratio("fixed_ratio", made, 4) is None
        assert all(as_half(scale) for scale in made)
