"""Clip ratios judged by what second-order rounding makes of them.

Plain rounding wants more clipping than rounding that makes up for its errors, so a search that
tries the one is wrong for the other. As many ratios as memory allows are rounded in one call, as
more output channels, and one decomposition of the inputs' second moments serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref import PerAxis, PerBlock, SeriesKind, restore
from onnxq.kernels_ref.clip_search import OutputSamples
from onnxq.kernels_ref.second_order import Prepared
from onnxq.passes.channel_terms import offset_of

Array = npt.NDArray[Any]

# Each ratio is another rounding too, of which a channel keeps its best: more of them help beyond
# the better clip, so the fine grid is taken where it costs little.
FINE = tuple(round(1.1 - 0.02 * i, 2) for i in range(35))
COARSE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
FINE_PRODUCTS = 5e10
# Elements that are rounded at once: the memory of this search is about ten float64 arrays of it.
MOST_ELEMENTS = 1 << 23


def search_rounded_clip(
    target: Array,
    scales: Sequence[Array],
    hessian: Array,
    *,
    bits: int,
    kind: SeriesKind,
    damping: float,
    with_offset: bool = False,
    samples: OutputSamples | None = None,
    points: Array | None = None,
) -> tuple[tuple[Array, ...], Array | None]:
    """(The scales times, per output channel, the ratio with the least output error, offset).

    target: float [out, in]. scales: float [out] per term. hessian: float64 [groups, in, in], rows
    of target group after group. The error is dᵀHd; with `samples` the mean absolute error of the
    output on their x, [groups, n, in]. with_offset: the levels are those of a series with an
    offset, which is that of `offset_of`. points: int [out], the number of each row's terms.
    """
    groups, (out, inputs) = len(hessian), target.shape
    unclipped = [np.asarray(scale) for scale in scales]
    best = list(unclipped)
    least = np.full(out, np.inf)
    grid = FINE if len(FINE) * target.size * inputs <= FINE_PRODUCTS else COARSE
    prepared = Prepared.of(target, hessian, damping)
    for trial in rounded_trials(
        target,
        unclipped,
        prepared,
        grid,
        bits=bits,
        kind=kind,
        with_offset=with_offset,
        points=points,
        elements=MOST_ELEMENTS,
    ):
        error = trial.error.reshape(groups, -1, inputs)
        costs = _costs(error, hessian, samples).reshape(trial.error.shape[:3])
        winner = costs.argmin(axis=1)[:, np.newaxis]  # the first, so the largest, of equal ones
        cost = np.take_along_axis(costs, winner, axis=1).reshape(-1)
        for i, scale in enumerate(trial.scales):
            chosen = np.take_along_axis(scale, winner, axis=1).reshape(-1)
            best[i] = np.where(cost < least, chosen, best[i])
        least = np.minimum(cost, least)
    if not with_offset:
        return tuple(best), None
    return tuple(best), offset_of(target, best, bits, points)


@dataclass(frozen=True, eq=False)
class Trials:
    """A weight rounded once for each of several ratios.

    Attributes:
        scales: float [groups, ratios, rows of a group] per term, and blocks as the last axis where
            scales are per block.
        error: target - rounded, float [groups, ratios, rows of a group, in].
    """

    scales: tuple[Array, ...]
    error: Array


def rounded_trials(
    target: Array,
    scales: Sequence[Array],
    prepared: Prepared,
    grid: Sequence[float],
    *,
    bits: int,
    kind: SeriesKind,
    elements: int,
    block_size: int | None = None,
    with_offset: bool = False,
    points: Array | None = None,
) -> Iterator[Trials]:
    """Round target with the scales times each ratio of grid, so many at once as `elements` hold.

    target: float [out, in], rows group after group. scales: float [out] per term, or [out, blocks]
    with block_size. prepared: of target. with_offset, points: as for `search_rounded_clip`.
    """
    groups, (out, inputs) = len(prepared.h), target.shape
    granularity = PerAxis(0) if block_size is None else PerBlock(1, block_size)
    at_once = max(1, elements // target.size)
    for start in range(0, len(grid), at_once):
        ratios = np.array(grid[start : start + at_once])
        layout = (groups, len(ratios), out // groups)
        trials = [_times(scale, ratios, layout) for scale in scales]
        stacked = _repeat(target, layout)
        counts = None if points is None else _repeat(points, layout)
        if with_offset:
            stacked = stacked - offset_of(stacked, trials, bits, counts)[:, np.newaxis]
        rounded = prepared.round(
            stacked,
            trials,
            bits=bits,
            kind=kind,
            block_size=block_size,
            full_range=with_offset,
            points=counts,
        )
        series = restore(
            kind, rounded.terms, trials, shape=stacked.shape, bits=bits, granularity=granularity
        )
        yield Trials(
            scales=tuple(trial.reshape(*layout, *trial.shape[1:]) for trial in trials),
            error=(stacked - series.dequantize()).reshape(*layout, inputs),
        )


def _times(scale: Array, ratios: Array, layout: tuple[int, int, int]) -> Array:
    """The scale times each ratio, in the rows of `_repeat`."""
    groups, count, rows = layout
    rest = scale.shape[1:]
    factors = ratios.astype(scale.dtype).reshape(count, *(1 for _ in scale.shape))
    trial = scale.reshape(groups, 1, rows, *rest) * factors
    trial = np.maximum(trial, np.finfo(trial.dtype).tiny)
    return np.asarray(trial.reshape(-1, *rest))


def _repeat(array: Array, layout: tuple[int, int, int]) -> Array:
    """Rows group after group, those of a group once per ratio; layout (groups, ratios, rows)."""
    groups, count, rows = layout
    split = array.reshape(groups, 1, rows, *array.shape[1:])
    return np.repeat(split, count, axis=1).reshape(-1, *array.shape[1:])


def _costs(error: Array, hessian: Array, samples: OutputSamples | None) -> Array:
    """[groups, rows]; error [groups, rows, in]."""
    if samples is None:
        return np.asarray(np.einsum("gri,gri->gr", np.matmul(error, hessian), error))
    found = np.matmul(samples.x, error.astype(np.float32).transpose(0, 2, 1))
    return np.asarray(np.abs(found, out=found).mean(axis=1))
