import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import (
    PerAxis,
    PerTensor,
    expand,
    fixed_ratio_bound,
    half_range,
    realize,
    reduce_absmax,
    series_scales,
)
from onnxq.kernels_ref.fixed_ratio import fixed_ratio_scales, scale_ratio

EPS = np.finfo(np.float64).eps


def bound_with_rounding(absmax, bits, terms, eps=EPS):
    """The bound, plus what floats add: n roundings in s_n, and per term those of /, * and -."""
    return fixed_ratio_bound(absmax, bits, terms) * (1 + terms * eps) + 3 * terms * eps * absmax


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
        elements=st.floats(-1, 1),
    ),
    st.integers(2, 8),
    st.integers(1, 5),
    st.integers(-300, 300),
)
def test_residual_is_within_the_bound_for_every_number_of_terms(x, bits, terms, power):
    x[np.abs(x) < 1e-100] = 0  # keep the products normal numbers after scaling
    w = np.ldexp(x, power)
    series = expand("fixed_ratio", w, bits=bits, terms=terms, granularity=PerAxis(0))
    absmax = reduce_absmax(w, PerAxis(0)).reshape(-1, *[1] * (w.ndim - 1))
    for n in range(1, terms + 1):
        assert np.all(np.abs(series.residual(w, n)) <= bound_with_rounding(absmax, bits, n))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bound_is_sharp(bits):
    # Where the first residual is exactly s/2 the second term is at ±h and ends at zero error; a
    # dense grid comes close to the bound at every depth, so the bound cannot be lower.
    w = np.linspace(-1, 1, 200_001)
    series = expand("fixed_ratio", w, bits=bits, terms=2, granularity=PerTensor())
    for n in (1, 2):
        worst = np.abs(series.residual(w, n)).max()
        bound = fixed_ratio_bound(1.0, bits, n)
        # The grid's own step is 1e-5: it misses the worst point by half of that at most.
        assert bound - 1e-5 <= worst <= bound_with_rounding(1.0, bits, n)


def test_two_bits_converge_by_halving():
    w = np.random.default_rng(0).standard_normal(1000)
    series = expand("fixed_ratio", w, bits=2, terms=20, granularity=PerTensor())
    absmax = np.abs(w).max()
    assert scale_ratio(2) == 2
    assert fixed_ratio_bound(absmax, 2, 20) == absmax / 2**20
    for n in range(1, 21):
        assert np.abs(series.residual(w, n)).max() <= absmax / 2**n * (1 + 20 * EPS) + 60 * EPS


def test_float32_obeys_the_bound_to_its_own_precision():
    w = np.random.default_rng(1).standard_normal((50, 60)).astype(np.float32)
    absmax = np.abs(w).max(axis=1, keepdims=True)
    eps = np.finfo(np.float32).eps
    for bits in (2, 4, 8):
        series = expand("fixed_ratio", w, bits=bits, terms=3, granularity=PerAxis(0))
        for n in (1, 2, 3):
            bound = bound_with_rounding(absmax, bits, n, eps)
            assert np.all(np.abs(series.residual(w, n)) <= bound)


def test_a_ratio_of_two_to_the_bits_does_not_converge():
    w = np.random.default_rng(2).standard_normal(20_000)
    bits, terms = 4, 4
    first = np.abs(w).max() / half_range(bits)
    trap = [np.asarray(first / 2.0 ** (bits * i)) for i in range(terms)]
    options = {"bits": bits, "granularity": PerTensor()}
    wrong = np.abs(realize("joint", w, trap, **options).residual(w)).max()
    right = np.abs(expand("fixed_ratio", w, terms=terms, **options).residual(w)).max()
    # A residual of s_1 / 2 = 8 s_2 meets the levels of the later terms, which reach
    # 7 s_2 (1 + 1/16 + 1/256) in all: about s_2 / 2 is left over, whatever the number of terms.
    reach = 7 * trap[1] * (1 + 1 / 16 + 1 / 256)
    assert wrong > 0.9 * (first / 2 - reach)
    assert right <= bound_with_rounding(np.abs(w).max(), bits, terms)
    assert wrong > 100 * right


def test_scales_follow_the_formula():
    absmax = np.array([7.0, 14.0])
    first, second, third = fixed_ratio_scales(absmax, 4, 3)
    np.testing.assert_array_equal(first, [1, 2])
    np.testing.assert_allclose(second, [1 / 14, 2 / 14], rtol=EPS)
    np.testing.assert_allclose(third, [1 / 196, 2 / 196], rtol=2 * EPS)


def test_underflowing_scales_stop_at_the_smallest_normal_number():
    tiny = np.finfo(np.float32).tiny
    w = np.array([tiny * 5, tiny], dtype=np.float32)
    scales = series_scales("fixed_ratio", w, bits=4, terms=4, granularity=PerTensor())
    assert [float(s) for s in scales] == [float(tiny)] * 4
    series = realize("fixed_ratio", w, scales, bits=4, granularity=PerTensor())
    np.testing.assert_array_equal(series.residual(w), [0, 0])


def test_bits_and_terms_out_of_range_are_refused():
    with pytest.raises(ValueError, match="terms is 0"):
        fixed_ratio_bound(1.0, 4, 0)
    with pytest.raises(ValueError, match="bits is 9"):
        fixed_ratio_bound(1.0, 9, 1)
    with pytest.raises(ValueError, match="terms is 0"):
        fixed_ratio_scales(np.ones(2), 4, 0)
    with pytest.raises(ValueError, match="bits is 1"):
        scale_ratio(1)
