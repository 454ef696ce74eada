"""The joint series: every term's scale is free, and all are searched together.

Choosing scales one after the other is poor: the first one, best on its own, clips the outliers,
and the second term is spent on them. So the search moves along two kinds of line for each row
(output channel or block) at once:

1. the whole chain s, s/rho, s/rho**2, … with rho = 2**bits - 1, the ratio at which the levels of n
   terms are evenly spaced without overlap, over a grid of clips s = t * absmax / (h + 1/2);
2. then, from the best of these, the tails (s_i, …, s_n) scaled up and down by shrinking steps.

A row keeps the better of what was found and the fixed-ratio scales, and never does worse than
with one term less. The idea of free scales per term is that of arXiv 2002.09049; this search is
our own.
"""

from __future__ import annotations

import numpy as np

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.fixed_ratio import fixed_ratio_scales, scale_ratio
from onnxq.kernels_ref.granularity import Granularity
from onnxq.kernels_ref.layout import (
    Tile,
    as_row_params,
    as_rows,
    from_row_params,
    row_groups,
    tiles_of,
)
from onnxq.kernels_ref.quantize import half_range
from onnxq.kernels_ref.residual import peel

CLIP_STEPS = 11
TAIL_STEPS = (0.05, 0.025, 0.0125, 0.006)
# The chain reaches absmax, with the last half step, where its first scale is absmax / (h + 1/2).
# Going a little beyond often pays in short rows, where it is a matter of luck.
WIDEST_CLIP = 1.08


def joint_scales(
    w: FloatArray, absmax: FloatArray, *, bits: int, terms: int, granularity: Granularity
) -> tuple[FloatArray, ...]:
    """Scales of absmax's shape and dtype that make the squared error of each row small.

    w: finite; absmax: of `scale_shape`. Per row, the error (of the terms as `realize` rounds
    them) is at most that of the fixed-ratio series, and at most that with one term less.
    """
    rows = as_rows(w, granularity)
    flat = as_row_params(absmax, granularity)
    fixed = np.stack(fixed_ratio_scales(flat, bits, terms))
    best = np.empty_like(fixed)
    for group in row_groups(*rows.shape):
        pieces = _Pieces.load(rows, group, half_range(bits), fixed[0, group])
        best[:, group] = _best_scales(pieces, fixed[:, group], bits)
    return tuple(from_row_params(part, w.shape, granularity) for part in best)


class _Pieces:
    """The tiles of a few rows, with what it takes to judge scales on them.

    Errors are squared and summed in units of `unit`, one value per row: weights of any magnitude
    neither overflow nor underflow when squared.
    """

    def __init__(self, tiles: list[tuple[Tile, FloatArray]], h: int, unit: FloatArray) -> None:
        self.tiles = tiles
        self.h = h
        self.unit = unit

    @classmethod
    def load(cls, rows: FloatArray, group: slice, h: int, unit: FloatArray) -> _Pieces:
        here = slice(0, group.stop - group.start)
        found = []
        for tile in tiles_of(group, rows.shape[1]):
            # From here on rows are counted within the group.
            found.append((Tile(here, tile.cols, tile.transposed), tile.load(rows)))
        return cls(found, h, unit)

    def quick_error(self, scales: FloatArray) -> FloatArray:
        """Squared error per row, in the dtype of the weight; for the search. scales: [n, rows].

        Works in units of the current scale: one pass less per term than subtracting s * q.
        """
        total: FloatArray = np.zeros_like(self.unit)
        for tile, values in self.tiles:
            rest, level = np.empty_like(values), np.empty_like(values)
            np.divide(values, tile.params(scales[0]), out=rest)
            for i in range(len(scales)):
                if i:
                    rest *= tile.params(scales[i - 1] / scales[i])
                np.rint(rest, out=level)
                level.clip(-self.h, self.h, out=level)
                rest -= level
            total += np.einsum("ij,ij->j" if tile.transposed else "ij,ij->i", rest, rest)
        total *= np.square(scales[-1] / self.unit)
        return total

    def exact_error(self, scales: FloatArray) -> FloatArray:
        """Squared error per row of the terms as `realize` rounds them, summed in float64."""
        total: FloatArray = np.zeros(self.unit.shape, dtype=np.float64)
        for tile, values in self.tiles:
            rest, level = values.copy(), np.empty_like(values)
            for scale in scales:
                peel(rest, tile.params(scale), self.h, level)
            rest /= tile.params(self.unit)
            np.square(rest, out=rest)
            total += rest.sum(axis=tile.element_axis, dtype=np.float64)
        return total


def _best_scales(pieces: _Pieces, fixed: FloatArray, bits: int) -> FloatArray:
    """The best scales [n, rows] known for n = len(fixed) terms, one term at a time."""
    tiny = np.finfo(fixed.dtype).tiny
    best = fixed[:0]
    error: FloatArray = np.full(fixed.shape[1], np.inf)
    for n in range(1, len(fixed) + 1):
        shorter, shorter_error = best, error
        found = _search(pieces, fixed[0], n, bits)
        found_error, fixed_error = pieces.exact_error(found), pieces.exact_error(fixed[:n])
        best = np.where(found_error < fixed_error, found, fixed[:n])
        error = np.minimum(found_error, fixed_error)
        lost = error > shorter_error
        if lost.any():
            # One more term behind the shorter series cannot be worse than the shorter series.
            extra = np.maximum(shorter[-1] / fixed.dtype.type(scale_ratio(bits)), tiny)
            best = np.where(lost, np.vstack([shorter, extra]), best)
            error = np.minimum(error, shorter_error)
    return best


def _search(pieces: _Pieces, widest: FloatArray, terms: int, bits: int) -> FloatArray:
    """Scales [terms, rows] of a low squared error; widest: absmax / h per row."""
    h = half_range(bits)
    chain = h / (h + 0.5) * (2.0**bits - 1.0) ** -np.arange(terms)
    best = np.tile(widest, (terms, 1))
    error = np.full(widest.shape, np.inf, dtype=widest.dtype)
    for clip in np.geomspace(WIDEST_CLIP, _smallest_clip(bits * terms), CLIP_STEPS):
        trial = np.outer(chain * clip, widest).astype(widest.dtype)
        best, error = _keep_better(pieces, best, error, trial)
    for step in TAIL_STEPS:
        for first in range(terms):
            before = best
            for factor in (1.0 + step, 1.0 / (1.0 + step)):
                trial = before.copy()
                trial[first:] *= widest.dtype.type(factor)
                best, error = _keep_better(pieces, best, error, trial)
    return best


def _keep_better(
    pieces: _Pieces, best: FloatArray, error: FloatArray, trial: FloatArray
) -> tuple[FloatArray, FloatArray]:
    # Scales must not vanish, however small the channel and many the terms.
    trial = np.maximum(trial, np.finfo(trial.dtype).tiny)
    trial_error = pieces.quick_error(trial)
    better = trial_error < error
    return np.where(better, trial, best), np.where(better, trial_error, error)


def _smallest_clip(total_bits: int) -> float:
    """How far the clips go down: the coarser the series, the more the tails are worth clipping.

    Measured on Gaussian and Laplace rows of 32 to 4096 elements, with a margin.
    """
    return {2: 0.25, 3: 0.3, 4: 0.35, 5: 0.5, 6: 0.6, 7: 0.7}.get(total_bits, 0.85)
