import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import (
    PerAxis,
    PerBlock,
    PerTensor,
    Series,
    Term,
    expand,
    half_range,
    realize,
    scale_shape,
    series_scales,
)

KINDS = ("fixed_ratio", "digit", "joint")
GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis(-1), PerBlock(1, 4), PerBlock(0, 3)]


@st.composite
def weights(draw):
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=6))
    width = 32 if dtype is np.float32 else 64
    w = draw(hnp.arrays(dtype, shape, elements=st.floats(-1, 1, width=width)))
    w[np.abs(w) < 1e-12] = 0  # so that scaling by powers of two stays exact
    return w


@settings(deadline=None, max_examples=150)
@given(
    weights(),
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.integers(1, 3),
    st.sampled_from(GRANULARITIES),
)
def test_terms_have_the_shapes_dtypes_and_ranges_promised(w, kind, bits, terms, granularity):
    series = expand(kind, w, bits=bits, terms=terms, granularity=granularity)
    assert len(series) == terms
    assert series.kind == kind
    assert series.bits_per_weight == bits * terms
    h = half_range(bits)
    for i, term in enumerate(series.terms):
        assert term.q.dtype == np.int8
        assert term.q.shape == w.shape
        assert term.q.flags.c_contiguous
        assert term.scale.dtype == w.dtype
        assert term.scale.shape == scale_shape(w.shape, granularity)
        assert np.all(term.scale > 0)
        assert (term.zero_point, term.bits, term.granularity) == (0, bits, granularity)
        lowest = -h - 1 if kind == "digit" and i else -h
        assert term.q.min() >= lowest
        assert term.q.max() <= h
    assert series.dequantize().dtype == w.dtype


@settings(deadline=None, max_examples=100)
@given(
    weights(),
    st.sampled_from(("fixed_ratio", "joint")),
    st.integers(2, 8),
    st.integers(2, 4),
    st.sampled_from(GRANULARITIES),
)
def test_no_term_makes_any_residual_larger(w, kind, bits, terms, granularity):
    series = expand(kind, w, bits=bits, terms=terms, granularity=granularity)
    sizes = [np.abs(series.residual(w, n)).astype(np.float64) for n in range(terms + 1)]
    # Rounding to nearest may be off at a tie, and the difference rounds, by eps of |w| at most.
    slack = 2 * np.finfo(w.dtype).eps * np.abs(w)
    for before, after in itertools.pairwise(sizes):
        assert np.all(after <= before + slack)


@settings(deadline=None, max_examples=60)
@given(
    weights(),
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.sampled_from(GRANULARITIES),
    st.integers(-15, 15),
)
def test_powers_of_two_scale_the_scales_and_keep_the_integers(w, kind, bits, granularity, power):
    options = {"bits": bits, "terms": 2, "granularity": granularity}
    plain, scaled = expand(kind, w, **options), expand(kind, np.ldexp(w, power), **options)
    for a, b in zip(plain.terms, scaled.terms, strict=True):
        np.testing.assert_array_equal(a.q, b.q)
        at_work = np.ones_like(w, dtype=np.int8) * (a.q != 0)
        parts = (Term(at_work, t.scale, 0, bits, granularity).dequantize() for t in (a, b))
        one, other = parts
        np.testing.assert_array_equal(np.ldexp(one, power), other)


@pytest.mark.parametrize("kind", ["fixed_ratio", "digit"])
@pytest.mark.parametrize("block_size", [1, 4, 5, 32, 300, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_equal_a_slow_loop_over_blocks(kind, block_size, dtype):
    w = np.random.default_rng(block_size).standard_normal((3, 310)).astype(dtype)
    options = {"bits": 3, "terms": 2}
    series = expand(kind, w, granularity=PerBlock(1, block_size), **options)
    for row in range(len(w)):
        for i, start in enumerate(range(0, w.shape[1], block_size)):
            block = w[row, start : start + block_size].copy()
            alone = expand(kind, block, granularity=PerTensor(), **options)
            for got, want in zip(series.terms, alone.terms, strict=True):
                assert got.scale[row, i] == want.scale
                part = got.q[row, start : start + block_size]
                np.testing.assert_array_equal(part, want.q)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_order_and_axis_do_not_matter(kind):
    w = np.random.default_rng(0).standard_normal((70, 500)).astype(np.float32)
    options = {"bits": 4, "terms": 2}
    rows = expand(kind, w, granularity=PerAxis(0), **options)
    columns = expand(kind, np.ascontiguousarray(w.T), granularity=PerAxis(1), **options)
    fortran = expand(kind, np.asfortranarray(w), granularity=PerAxis(0), **options)
    for a, b, c in zip(rows.terms, columns.terms, fortran.terms, strict=True):
        np.testing.assert_array_equal(a.scale, b.scale)
        np.testing.assert_array_equal(a.q, b.q.T)
        np.testing.assert_array_equal(a.scale, c.scale)
        np.testing.assert_array_equal(a.q, c.q)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_channel_stays_zero_and_the_input_untouched(kind):
    w = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    w[1] = 0
    before = w.copy()
    series = expand(kind, w, bits=4, terms=3, granularity=PerAxis(0))
    np.testing.assert_array_equal(w, before)
    assert all(not term.q[1].any() for term in series.terms)
    np.testing.assert_array_equal(series.dequantize()[1], np.zeros(50))
    assert series.terms[0].q[0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiny_and_huge_channels_are_finite_and_close(kind, dtype):
    info = np.finfo(dtype)
    pattern = np.random.default_rng(2).uniform(-1, 1, 200).astype(dtype)
    peaks = np.array([info.tiny, info.tiny * 1e4, 1, info.max / 4], dtype=dtype)
    w = peaks[:, np.newaxis] * pattern
    series = expand(kind, w, bits=8, terms=2, granularity=PerAxis(0))
    rest = np.abs(series.residual(w))
    # Half of the finest step, which cannot be smaller than half the smallest normal number; the
    # joint search may clip, but keeps the sum of squares below that of the fixed ratio.
    limit = np.maximum(peaks / (2 * 127 * 254), info.tiny / 2) + 6 * info.eps * peaks
    if kind == "joint":
        limit = limit * np.sqrt(w.shape[1])
    assert np.all(rest <= limit[:, np.newaxis])


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_a_vanishing_channel_stay_normal_numbers(kind):
    tiny = np.finfo(np.float32).tiny
    w = np.random.default_rng(4).uniform(-300, 300, (2, 40)).astype(np.float32) * tiny
    w[1] /= 1e4
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        series = expand(kind, w, bits=8, terms=4, granularity=PerAxis(0))
    for term in series.terms:
        assert np.all(term.scale >= tiny)
    assert np.all(np.abs(series.residual(w)) <= tiny / 2)


def test_dequantize_and_residual_take_the_first_terms():
    w = np.random.default_rng(3).standard_normal((4, 9))
    series = expand("fixed_ratio", w, bits=3, terms=3, granularity=PerAxis(1))
    np.testing.assert_array_equal(series.dequantize(0), np.zeros_like(w))
    np.testing.assert_array_equal(series.residual(w, 0), w)
    np.testing.assert_array_equal(series.dequantize(1), series.terms[0].dequantize())
    total = sum(term.dequantize() for term in series.terms)
    np.testing.assert_array_equal(series.dequantize(), total)
    np.testing.assert_allclose(
        series.residual(w), w - total, atol=6 * np.finfo(float).eps * np.abs(w).max()
    )


def test_realize_takes_edited_scales_and_saturates():
    scales = [np.asarray(0.1), np.asarray(0.01)]
    series = realize("joint", np.array([1.0, 0.23]), scales, bits=4, granularity=PerTensor())
    np.testing.assert_array_equal(series.terms[0].q, [7, 2])
    np.testing.assert_array_equal(series.terms[1].q, [7, 3])


def test_an_affine_term_takes_its_zero_point_off():
    q = np.array([[1, 2], [3, 4]], np.uint8)
    term = Term(q, np.array([0.5, 2.0]), np.array([1, 4], np.uint8), 4, PerAxis(0))
    np.testing.assert_array_equal(term.dequantize(), [[0, 0.5], [-2, 0]])


OPTIONS = {"bits": 4, "granularity": PerTensor()}


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind is 'greedy'; choose one of fixed_ratio"):
        series_scales("greedy", np.ones(3), terms=1, **OPTIONS)
    with pytest.raises(ValueError, match="kind is 'greedy'"):
        realize("greedy", np.ones(3), [np.asarray(1.0)], **OPTIONS)
    with pytest.raises(ValueError, match="kind is 'greedy'"):
        Series((Term(np.ones(3, np.int8), np.asarray(1.0), 0, 4, PerTensor()),), "greedy")


@pytest.mark.parametrize("kind", KINDS)
def test_no_terms_are_refused(kind):
    with pytest.raises(ValueError, match="terms is 0"):
        series_scales(kind, np.ones(3), terms=0, **OPTIONS)
    with pytest.raises(ValueError, match="terms is 0"):
        realize(kind, np.ones(3), [], **OPTIONS)
    with pytest.raises(ValueError, match="terms is 0"):
        Series((), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_unfit_weights_are_refused(kind):
    one = [np.asarray(1.0)]
    with pytest.raises(ValueError, match="NaN or infinity"):
        expand(kind, np.array([1, np.inf]), terms=1, **OPTIONS)
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        realize(kind, np.array([1, np.nan, 2]), one, **OPTIONS)
    with pytest.raises(ValueError, match="w is int64"):
        realize(kind, np.ones(3, int), one, **OPTIONS)
    with pytest.raises(ValueError, match="no elements"):
        expand(kind, np.ones((0, 2)), terms=1, **OPTIONS)
    with pytest.raises(ValueError, match="bits is 1"):
        expand(kind, np.ones(3), bits=1, terms=1, granularity=PerTensor())


@pytest.mark.parametrize("kind", KINDS)
def test_unfit_scales_are_refused(kind):
    with pytest.raises(ValueError, match=r"scale 0 has shape \(2,\)"):
        realize(kind, np.ones(3), [np.ones(2)], **OPTIONS)
    with pytest.raises(ValueError, match="scale 0 holds values <= 0"):
        realize(kind, np.ones(3), [np.asarray(0.0)], **OPTIONS)
    with pytest.raises(ValueError, match="scale 0 holds NaN"):
        realize(kind, np.ones(3), [np.asarray(np.nan)], **OPTIONS)


def test_counts_and_shapes_that_do_not_fit_are_refused():
    series = expand("fixed_ratio", np.ones(3), terms=2, **OPTIONS)
    for n in (-1, 3):
        with pytest.raises(ValueError, match=f"n is {n}; this series has 0..2 terms"):
            series.dequantize(n)
        with pytest.raises(ValueError, match=f"n is {n}"):
            series.residual(np.ones(3), n)
    with pytest.raises(ValueError, match=r"w has shape \(4,\)"):
        series.residual(np.ones(4))
