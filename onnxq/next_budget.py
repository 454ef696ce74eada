"""The step from one trial to the next: how much predicted error to allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.tolerance import Tolerance

_AIM = 0.94  # share of the tolerance that is aimed at
_STEP = 30.0  # largest change of the budget from one trial to the next
# How much faster or slower the loss may grow with the predicted error than it does in theory: what
# later nodes make up for, and how close classes lie, differ from plan to plan.
_SLOPES = 0.6, 1.5


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
    told = {p: loss for p, loss in known.items() if 0 < loss < float("inf")}
    if told:
        near = sorted(told, key=lambda p: abs(np.log(told[p] / aim)))
        predicted, slope = near[0], tolerance.power * _growth(told, near[:2], tolerance.power)
        factor = (aim / told[predicted]) ** (1 / slope)
    else:
        predicted, loss = list(known.items())[-1]
        factor = _STEP if loss <= 0 else 1 / _STEP
    wanted = predicted * float(np.clip(factor, 1 / _STEP, _STEP))
    if low < wanted < high:
        return wanted
    if low == 0:
        return min(wanted, high / 2)
    return float(np.sqrt(low * high)) if np.isfinite(high) else max(wanted, low * 1.5)


def _growth(known: Mapping[float, float], places: Sequence[float], power: float) -> float:
    """How the loss grows between two predicted errors, relative to what it does in theory."""
    if len(places) < 2:
        return 1.0
    one, other = places
    grown = np.log(known[one] / known[other]) / np.log(one / other)
    return float(np.clip(grown / power, *_SLOPES))
