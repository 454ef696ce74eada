"""Clip ratios judged by what second-order rounding makes of them.

Plain rounding wants more clipping than rounding that makes up for its errors, so a search that
tries the one is wrong for the other. All ratios are rounded in one call, as more output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref import PerAxis, SeriesKind, restore, round_second_order
from onnxq.kernels_ref.clip_search import OutputSamples
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
    at_once = max(1, MOST_ELEMENTS // target.size)
    best = [np.asarray(scale) for scale in scales]
    least = np.full(out, np.inf)
    grid = FINE if len(FINE) * target.size * inputs <= FINE_PRODUCTS else COARSE
    for start in range(0, len(grid), at_once):
        ratios = np.array(grid[start : start + at_once])
        trials = [
            (scale.reshape(groups, 1, -1) * ratios[:, np.newaxis].astype(scale.dtype)).reshape(-1)
            for scale in scales
        ]
        trials = [np.maximum(trial, np.finfo(trial.dtype).tiny) for trial in trials]
        stacked = np.repeat(target.reshape(groups, 1, -1, inputs), len(ratios), axis=1)
        stacked = stacked.reshape(-1, inputs)
        counts = None
        if points is not None:
            counts = np.repeat(points.reshape(groups, 1, -1), len(ratios), axis=1).reshape(-1)
        if with_offset:
            offset = offset_of(stacked, trials, bits, counts)
            stacked = stacked - offset[:, np.newaxis]
        rounded = round_second_order(
            stacked,
            trials,
            hessian,
            bits=bits,
            kind=kind,
            damping=damping,
            full_range=with_offset,
            points=counts,
        )
        series = restore(
            kind, rounded.terms, trials, shape=stacked.shape, bits=bits, granularity=PerAxis(0)
        )
        error = (stacked - series.dequantize()).reshape(groups, -1, inputs)
        costs = _costs(error, hessian, samples).reshape(groups, len(ratios), -1)
        winner = costs.argmin(axis=1)[:, np.newaxis]  # the first, so the largest, of equal ones
        cost = np.take_along_axis(costs, winner, axis=1).reshape(-1)
        for i, trial in enumerate(trials):
            chosen = np.take_along_axis(trial.reshape(costs.shape), winner, axis=1).reshape(-1)
            best[i] = np.where(cost < least, chosen, best[i])
        least = np.minimum(cost, least)
    if not with_offset:
        return tuple(best), None
    return tuple(best), offset_of(target, best, bits, points)


def _costs(error: Array, hessian: Array, samples: OutputSamples | None) -> Array:
    """[groups, rows]; error [groups, rows, in]."""
    if samples is None:
        return np.asarray(np.einsum("gri,gri->gr", np.matmul(error, hessian), error))
    found = np.matmul(samples.x, error.astype(np.float32).transpose(0, 2, 1))
    return np.asarray(np.abs(found, out=found).mean(axis=1))
