import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import (
    PerAxis,
    PerBlock,
    PerTensor,
    expand,
    half_range,
    joint,
    relative_error,
)
from onnxq.kernels_ref.fixed_ratio import fixed_ratio_scales

KINDS_OF_ROW = ("normal", "laplace", "outlier", "sparse", "constant", "two_values", "zero", "tiny")


def rows_of(kinds, length, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for kind in kinds:
        row = rng.laplace(size=length) if kind == "laplace" else rng.standard_normal(length)
        if kind == "outlier":
            row[rng.integers(length)] *= 100
        elif kind == "sparse":
            row[rng.random(length) < 0.9] = 0
        elif kind == "constant":
            row[:] = row[0]
        elif kind == "two_values":
            row = np.where(row > 0, 1.0, 0.37)
        elif kind == "zero":
            row[:] = 0
        elif kind == "tiny":
            row *= 1e-200
        rows.append(row)
    return np.array(rows)


def squared_error(series, w, n=None):
    peak = np.maximum(np.abs(w).max(axis=-1, keepdims=True), 1e-300)
    return np.square(series.residual(w, n) / peak).sum(axis=-1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(KINDS_OF_ROW), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(0, 10**6),
    st.integers(2, 8),
)
def test_never_worse_than_fixed_ratio_nor_than_one_term_less(kinds, length, seed, bits):
    w = rows_of(kinds, length, seed)
    options = {"bits": bits, "granularity": PerAxis(0)}
    before = np.full(len(w), np.inf)
    for terms in (1, 2, 3):
        joint = expand("joint", w, terms=terms, **options)
        fixed = expand("fixed_ratio", w, terms=terms, **options)
        error = squared_error(joint, w)
        # The search compares sums of the same numbers in another order: < length * eps apart.
        slack = 1 + 2 * length * np.finfo(float).eps
        assert np.all(error <= squared_error(fixed, w) * slack)
        assert np.all(error <= before * slack)
        before = error


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerBlock(1, 17)], ids=["long row", "short blocks"]
)
def test_never_worse_than_fixed_ratio_across_tiles(granularity):
    # 70,000 elements take three tiles; blocks of 17 go through the transposed layout.
    w = np.random.default_rng(0).laplace(size=(7, 10_000))
    for bits in (2, 4):
        errors = [
            np.square(expand(k, w, bits=bits, terms=2, granularity=granularity).residual(w))
            for k in ("joint", "fixed_ratio")
        ]
        joint, fixed = errors
        if isinstance(granularity, PerBlock):
            starts = np.arange(0, w.shape[1], 17)
            joint, fixed = (np.add.reduceat(e, starts, axis=1) for e in errors)
            assert np.all(joint <= fixed * (1 + 1e-13))
        assert joint.sum() < 0.9 * fixed.sum()


def brute_force(w, bits):
    """The least squared error over a fine grid of both scales, of one row."""
    h = half_range(bits)
    widest = np.abs(w).max() / h
    ratios = np.linspace(0.85, 1.2, 29) * (2**bits - 1)
    least = np.inf
    for s1 in np.linspace(0.3, 1.05, 101) * widest:
        rest = w - s1 * np.clip(np.rint(w / s1), -h, h)
        for s2 in s1 / ratios:
            error = np.square(rest - s2 * np.clip(np.rint(rest / s2), -h, h)).sum()
            least = min(least, error)
    return np.sqrt(least / np.square(w).sum())


@pytest.mark.parametrize(("bits", "quoted"), [(2, 0.174), (3, 0.037), (4, 0.0081)])
def test_two_terms_reach_the_error_of_a_full_search(bits, quoted):
    w = np.random.default_rng(1).standard_normal(512)
    options = {"bits": bits, "terms": 2, "granularity": PerTensor()}
    error = relative_error(w, expand("joint", w, **options).dequantize())
    # 27 trials against 2929: within two per cent.
    assert error <= 1.02 * brute_force(w, bits)
    # The quoted errors are of another Gaussian row. From row to row the error moves with the
    # largest element, as that of the fixed ratio does: 1 / sqrt(2 log n) of it, over 5 per cent.
    assert error <= 1.05 * quoted


def test_one_term_is_the_best_single_scale():
    w = np.random.default_rng(2).standard_normal(4096)
    for bits in (2, 3, 4, 8):
        h = half_range(bits)
        series = expand("joint", w, bits=bits, terms=1, granularity=PerTensor())
        grid = np.linspace(0.2, 1.1, 400) * np.abs(w).max() / h
        best = min(np.linalg.norm(w - s * np.clip(np.rint(w / s), -h, h)) for s in grid)
        # 19 trials against 400; the search ends with steps of 0.6 per cent of the scale.
        assert np.linalg.norm(series.residual(w)) <= 1.01 * best


def test_float32_is_as_good_as_float64():
    w = np.random.default_rng(3).standard_normal((8, 500))
    options = {"bits": 4, "terms": 2, "granularity": PerAxis(0)}
    exact = relative_error(w, expand("joint", w, **options).dequantize())
    w32 = w.astype(np.float32)
    single = relative_error(w32, expand("joint", w32, **options).dequantize())
    # float32 may order two nearly equal trials differently, which then differ by little.
    assert abs(single - exact) < 0.01 * exact


def test_search_is_the_same_for_a_row_alone_and_among_others():
    w = np.random.default_rng(4).standard_normal((600, 300)).astype(np.float32)
    options = {"bits": 3, "terms": 2, "granularity": PerAxis(0)}
    together = expand("joint", w, **options)
    for row in (0, 108, 109, 599):  # 109 rows fill a tile
        alone = expand("joint", w[row : row + 1], **options)
        for a, b in zip(together.terms, alone.terms, strict=True):
            assert a.scale[row] == b.scale[0]
            np.testing.assert_array_equal(a.q[row], b.q[0])


def test_a_failed_search_for_two_terms_falls_back_on_one(monkeypatch):
    # At 2 bits the fixed ratio with two terms is worse than the best single term.
    w = np.random.default_rng(8).standard_normal((3, 4096))
    options = {"bits": 2, "granularity": PerAxis(0)}
    one = squared_error(expand("joint", w, terms=1, **options), w)
    assert np.all(squared_error(expand("fixed_ratio", w, terms=2, **options), w) > one)
    search = joint._search

    def fail_for_two(pieces, widest, terms, bits):
        if terms == 1:
            return search(pieces, widest, terms, bits)
        return np.stack(fixed_ratio_scales(widest, bits, terms))

    monkeypatch.setattr(joint, "_search", fail_for_two)
    assert np.all(squared_error(expand("joint", w, terms=2, **options), w) <= one)


def test_search_in_a_block_does_not_look_at_the_others():
    w = np.random.default_rng(6).standard_normal((40, 310))
    options = {"bits": 3, "terms": 2, "granularity": PerBlock(1, 32)}
    before = expand("joint", w, **options)
    w[7, 64:96] = np.random.default_rng(7).laplace(size=32)
    after = expand("joint", w, **options)
    for a, b in zip(before.terms, after.terms, strict=True):
        changed = a.scale != b.scale
        assert changed[7, 2]
        assert changed.sum() == 1


@pytest.mark.parametrize("peak", [1e-30, 1e30])
def test_squares_neither_overflow_nor_underflow_in_float32(peak):
    w = np.random.default_rng(5).standard_normal((2, 300)).astype(np.float32)
    options = {"bits": 4, "terms": 2, "granularity": PerAxis(0)}
    normal = relative_error(w, expand("joint", w, **options).dequantize())
    scaled = w * np.float32(peak)
    error = relative_error(scaled, expand("joint", scaled, **options).dequantize())
    assert abs(error - normal) < 0.01 * normal
