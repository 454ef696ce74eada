"""The step from one trial to the next: how much predicted error to allow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxq.tolerance import Tolerance

_AIM = 0.94  # share of the tolerance that is aimed at
_STEP = 30.0  # largest change of the budget from one trial to the next
# How much faster or slower the loss may grow with the predicted error than it does in theory: what
# later nodes make up for, and how close classes lie, differ from plan to plan.
_SLOPES = 0.6, 1.5
# What is measured on a few samples is off by a quarter or more, in other ways for each plan: the
# theory counts as much as two trials whose predicted errors lie a factor of four apart, and all
# trials count, those the more that are near to what is aimed at.
_PRIOR = 1.0
_NEAR = 0.05  # (relative distance)² within which trials count alike


def next_budget(
    known: Mapping[float, float], tolerance: Tolerance, bracket: tuple[float, float]
) -> float:
    """The predicted error to allow next: what the trials nearest to the tolerance tell.

    Args:
        known: loss by predicted error of what was tried, at least one, the latest last.
        tolerance: what is aimed at, a little below its limit.
        bracket: the largest budget known to keep it (0 for none), the smallest known not to (inf).

    The middle of the bracket where what they tell lies outside.
    """
    low, high = bracket
    aim = _AIM * tolerance.limit
    told = {p: loss for p, loss in known.items() if p > 0 and 0 < loss < float("inf")}
    if told:
        predicted, factor = _line(told, aim, tolerance.power)
    else:
        predicted, loss = list(known.items())[-1]
        factor = _STEP if loss <= 0 else 1 / _STEP
    wanted = predicted * float(np.clip(factor, 1 / _STEP, _STEP))
    if low < wanted < high:
        return wanted
    if low == 0:
        return min(wanted, high / 2)
    return float(np.sqrt(low * high)) if np.isfinite(high) else max(wanted, low * 1.5)


def _line(known: Mapping[float, float], aim: float, power: float) -> tuple[float, float]:
    """Where the line through what is known, in logarithms, reaches the aim: (place, factor)."""
    x, y = np.log(list(known)), np.log(np.array(list(known.values())) / aim)
    weights = 1 / (_NEAR + y**2)
    weights *= len(weights) / weights.sum()
    middle, height = np.average(x, weights=weights), np.average(y, weights=weights)
    along = weights @ (x - middle) ** 2 + _PRIOR
    slope = (weights @ ((x - middle) * (y - height)) + _PRIOR * power) / along
    least, most = (power * bound for bound in _SLOPES)
    slope = float(np.clip(slope, least, most))
    return float(np.exp(middle)), float(np.exp(-height / slope))
