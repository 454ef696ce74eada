"""Rounding that follows several of the best roundings of a row at once.

Second-order rounding settles each weight by itself, given those settled before (Babai's nearest
plane). With few, strongly correlated inputs - first layers, depthwise convolutions - that is far
from the best: following the `width` cheapest partial roundings (the K-best decoder of lattice
problems), over all clip ratios, left 0.5 to 0.6 of the output error of a first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, check_float
from onnxq.kernels_ref.clip_search import check_ratios
from onnxq.kernels_ref.hessian import batched, check_damping, factor_all
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.quantize import half_range

Int8Array = npt.NDArray[np.int8]

WIDTHS = (32, 16, 8, 4)
# Partial roundings that are extended in all; fewer widths are followed where rows are many.
MOST_STEPS = 6_000_000
# Elements of the errors held at once.
MOST_ELEMENTS = 1 << 22


def beam_width(rows: int, inputs: int, ratios: int) -> int:
    """The width that is affordable for a matrix [rows, inputs], 0 if none is."""
    # Taking over what is followed costs more the longer the rows are.
    steps = rows * inputs * ratios * max(1.0, inputs / 64)
    return next((width for width in WIDTHS if width * steps <= MOST_STEPS), 0)


def round_beam(
    target: FloatArray,
    scale: FloatArray,
    hessian: FloatArray,
    *,
    bits: int,
    ratios: Sequence[float],
    width: int,
    damping: float = 0.01,
) -> tuple[Int8Array, FloatArray]:
    """Integers and scales of one term per channel with a small eᵀHe, e = target - rounded.

    target: float [out, in], finite. scale: float [out], multiplied per row by the best of the
    ratios. hessian: [in, in], or [groups, in, in] with the rows group after group; damping times
    the mean of its diagonal is added to it. width: partial roundings followed per row and ratio.
    Returns int8 [out, in] within ±(2^(bits-1) - 1) and the scale, of scale's dtype.
    Raises ValueError for shapes that do not fit, a negative damping, a width below 1, ratios that
    are not positive, or a hessian that is not finite.
    """
    check_float(target, "target")
    check_ratios(ratios)
    check_damping(damping)
    if width < 1:
        raise ValueError(f"width is {width}; give at least 1")
    h = batched(hessian, target, "hessian")
    if not np.isfinite(h).all():
        raise ValueError("the hessian is not finite")
    out, inputs = target.shape
    factors, order, _ = factor_all(h, damping, True)
    diagonal = np.einsum("gii->gi", h)
    diagonal += damping * diagonal.mean(axis=1, keepdims=True)
    ordered = np.take_along_axis(h, order[:, :, np.newaxis], axis=1)
    ordered = np.take_along_axis(ordered, order[:, np.newaxis, :], axis=2)
    pivots = _pivots(ordered, factors)
    split = target.astype(np.float64).reshape(len(h), -1, inputs)
    t = np.take_along_axis(split, order[:, np.newaxis, :], axis=2)
    limit = half_range(bits)
    best_q = np.zeros(t.shape, np.int8)
    best_scale, least = scale.reshape(t.shape[:2]).copy(), np.full(t.shape[:2], np.inf)
    at_once = max(1, MOST_ELEMENTS // (out * width * inputs))
    for start in range(0, len(ratios), at_once):
        ratio = np.array(ratios[start : start + at_once])
        trial = scale.reshape(len(h), -1, 1) * ratio.astype(scale.dtype)
        trial = np.maximum(trial, np.finfo(scale.dtype).tiny)
        wide = np.repeat(t, len(ratio), axis=1)
        steps = trial.reshape(len(h), -1)
        q, cost = _follow(wide, steps.astype(np.float64), factors, pivots, limit, width)
        costs = cost.reshape(trial.shape)
        winner = costs.argmin(axis=2)[:, :, np.newaxis]
        cost = np.take_along_axis(costs, winner, axis=2)[:, :, 0]
        chosen = np.take_along_axis(
            q.reshape(*trial.shape, inputs), winner[..., np.newaxis], axis=2
        )[:, :, 0]
        better = cost < least
        best_q = np.where(better[:, :, np.newaxis], chosen, best_q)
        found = np.take_along_axis(trial, winner, axis=2)[:, :, 0]
        best_scale = np.where(better, found, best_scale)
        least = np.where(better, cost, least)
    natural = np.empty_like(best_q)
    np.put_along_axis(natural, np.broadcast_to(order[:, np.newaxis], best_q.shape), best_q, axis=2)
    return natural.reshape(out, inputs), best_scale.reshape(-1)


def _pivots(h: Float64Array, factors: Float64Array) -> Float64Array:
    """D of H = L D Lᵀ, with L of unit diagonal, [groups, in]; from the products of its rows."""
    pivots = np.empty(h.shape[:2])
    for k in range(h.shape[1]):
        squares = np.square(factors[:, k, :k]) * pivots[:, :k]
        pivots[:, k] = np.maximum(h[:, k, k] - squares.sum(axis=1), 0.0)
    return pivots


def _follow(
    t: Float64Array,
    steps: Float64Array,
    factors: Float64Array,
    pivots: Float64Array,
    limit: int,
    width: int,
) -> tuple[Int8Array, Float64Array]:
    """The best rounding of each row of t [groups, rows, in], in its order, and its cost."""
    groups, rows, inputs = t.shape
    q = np.zeros((groups, rows, 1, inputs), np.int8)
    error = np.zeros((groups, rows, 1, inputs))
    cost = np.zeros((groups, rows, 1))
    step = steps[:, :, np.newaxis, np.newaxis]
    for k in reversed(range(inputs)):
        later = error[..., k + 1 :].reshape(groups, -1, inputs - k - 1)
        pull = np.matmul(later, factors[:, k + 1 :, k, np.newaxis]).reshape(cost.shape)
        value = (t[:, :, k, np.newaxis] + pull)[..., np.newaxis]
        near = np.rint(value / step)
        other = near + np.where(value / step < near, -1.0, 1.0)
        levels = np.concatenate([near, other], axis=3).clip(-limit, limit)
        more = pivots[:, k, np.newaxis, np.newaxis, np.newaxis] * np.square(value - levels * step)
        # One level twice would fill the beam with copies.
        more[..., 1][levels[..., 0] == levels[..., 1]] = np.inf
        total = (cost[..., np.newaxis] + more).reshape(groups, rows, -1)
        kept = min(width, total.shape[2])
        chosen = np.argpartition(total, kept - 1, axis=2)[..., :kept]
        cost = np.take_along_axis(total, chosen, axis=2)
        parent = (chosen // 2)[..., np.newaxis]
        error = np.take_along_axis(error, parent, axis=2)
        q = np.take_along_axis(q, parent, axis=2)
        level = np.take_along_axis(levels.reshape(total.shape), chosen, axis=2)
        q[..., k] = level
        error[..., k] = t[:, :, k, np.newaxis] - level * steps[:, :, np.newaxis]
    best = cost.argmin(axis=2)[:, :, np.newaxis]
    found = np.take_along_axis(q, best[..., np.newaxis], axis=2)[:, :, 0]
    return found, np.take_along_axis(cost, best, axis=2)[:, :, 0]
