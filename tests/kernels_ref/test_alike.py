"""Rounding for inputs that are alike at neighbouring positions."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.kernels_ref import PerAxis, realize, restore, series_scales
from onnxq.kernels_ref.alike import neighbour_correlation, round_alike
from onnxq.kernels_ref.offset import offset_scales, realize_offset

OUT, CHANNELS, KERNEL, BITS = 6, 5, (3, 3), 3
TAPS = 9


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((OUT, CHANNELS * TAPS)).astype(np.float32)


def test_correlation_of_taps_is_that_of_positions():
    """In a random field made by averaging, and by definition: distance along both axes."""
    found = neighbour_correlation((2, 3), (1, 2), 0.5)
    assert found[0].tolist() == [1, 0.25, 0.0625, 0.5, 0.125, 0.03125]
    assert np.array_equal(found, found.T)
    assert np.linalg.eigvalsh(found).min() > 0


def cost(w: np.ndarray, found: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """eᵀCe of every channel of every row."""
    error = (w - found).reshape(-1, TAPS).astype(np.float64)
    return np.einsum("ri,ij,rj->r", error, correlation, error)


@pytest.mark.parametrize(
    ("kind", "terms"), [("fixed_ratio", 1), ("fixed_ratio", 2), ("digit", 2), ("joint", 2)]
)
def test_no_channel_gets_worse_and_the_whole_gets_much_better(kind, terms):
    w, granularity = weights(), PerAxis(0)
    correlation = neighbour_correlation(KERNEL, (1, 1), 0.9)
    scales = series_scales(kind, w, bits=BITS, terms=terms, granularity=granularity)
    plain = realize(kind, w, scales, bits=BITS, granularity=granularity).dequantize()
    integers = round_alike(w, scales, correlation, bits=BITS, kind=kind)
    series = restore(kind, integers, scales, shape=w.shape, bits=BITS, granularity=granularity)
    before, after = cost(w, plain, correlation), cost(w, series.dequantize(), correlation)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum() / 2


def test_with_an_offset_all_levels_are_used():
    w = np.abs(weights())  # on one side, so that the lowest level is needed
    correlation = neighbour_correlation(KERNEL, (1, 1), 0.9)
    beta, scales = offset_scales(w, bits=BITS, terms=1)
    rest = w - beta[:, np.newaxis]
    (q,) = round_alike(rest, scales, correlation, bits=BITS, kind="digit", full_range=True)
    (nearest,) = realize_offset(w, beta, scales, BITS)
    scale = scales[0][:, np.newaxis]
    assert q.min() == -(2 ** (BITS - 1))
    assert q.max() == 2 ** (BITS - 1) - 1
    before = cost(rest, nearest * scale, correlation)
    after = cost(rest, q * scale, correlation)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.7 * before.sum()


def test_the_gain_is_that_of_the_pivots():
    """With L D Lᵀ = C, errors of nearest rounding cost trace C each, these trace D.

    For rho = 0.9 and 3×3 taps D is the product of (1, 0.19, 0.19) with itself, in all 1.9 of 9.
    Rows that keep plain rounding make it less; 300 channels leave a standard error of 5 %.
    """
    w = np.random.default_rng(1).standard_normal((6, 50 * TAPS)).astype(np.float32)
    correlation = neighbour_correlation(KERNEL, (1, 1), 0.9)
    scales = series_scales("fixed_ratio", w, bits=8, terms=1, granularity=PerAxis(0))
    (q,) = round_alike(w, scales, correlation, bits=8, kind="fixed_ratio")
    scale = scales[0][:, np.newaxis]
    before = cost(w, np.rint(w / scale) * scale, correlation).sum()
    assert cost(w, q * scale, correlation).sum() < 1.15 * before * (1 + 2 * 0.19) ** 2 / 9


def test_nothing_alike_is_rounded_to_nearest():
    w = weights()
    scales = series_scales("fixed_ratio", w, bits=BITS, terms=1, granularity=PerAxis(0))
    (q,) = round_alike(
        w, scales, neighbour_correlation(KERNEL, (1, 1), 0.0), bits=BITS, kind="fixed_ratio"
    )
    plain = realize("fixed_ratio", w, scales, bits=BITS, granularity=PerAxis(0))
    assert np.array_equal(q, plain.terms[0].q)


@pytest.mark.parametrize("rho", [-0.1, 1.0, np.nan])
def test_a_correlation_out_of_range_is_refused(rho):
    with pytest.raises(ValueError, match="rho is"):
        neighbour_correlation(KERNEL, (1, 1), rho)


def test_a_weight_that_is_no_multiple_of_the_taps_is_refused():
    w = np.ones((2, 10), np.float32)
    with pytest.raises(ValueError, match="a multiple of 9"):
        round_alike(w, [np.ones(2, np.float32)], np.eye(9), bits=4, kind="fixed_ratio")
