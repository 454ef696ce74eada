"""One option per item at the least cost within limits: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxq.c_output import silent_c_stdout

Array = npt.NDArray[Any]

_SECONDS = 60.0
_EXACT_UP_TO = 100  # items; beyond, the proof of the last 0.01 % may take longer than it is worth
_GAP = 1e-4
_SLACK = 1e-6  # how far HiGHS lets a constraint be overstepped, at most


class Limit(NamedTuple):
    """The sum over items of the chosen options' amounts, [items, options], may not pass `most`."""

    amounts: Array
    most: float


def choose(costs: Array, limits: Sequence[Limit]) -> tuple[int, ...] | None:
    """The option of each item that makes the sum of the costs smallest.

    Exact for up to 100 items, within 0.01 % beyond (HiGHS, by scipy.optimize.milp).

    Args:
        costs: float [items, options]; an option that is not finite, here or in a limit, is not
            there.
        limits: what the choice must keep.

    Returns:
        An option per item, or None if no choice keeps the limits.

    Raises:
        ValueError: shapes differ, or an item has no option.
    """
    items = len(costs)
    if any(limit.amounts.shape != costs.shape for limit in limits):
        raise ValueError(f"limits must have the shape of the costs, {costs.shape}")
    tables = np.stack([costs, *(limit.amounts for limit in limits)]).astype(np.float64)
    there: Array = np.asarray(np.isfinite(tables).all(axis=0))
    there_are = there.sum(axis=1)
    if not there_are.all():
        raise ValueError(f"item {int(np.argmin(there_are))} has no option")
    if not items:
        return ()
    tables[0] -= np.min(tables[0], axis=1, where=there, initial=np.inf)[:, None]
    kept = _undominated(tables, there)
    bounds = [limit.most for limit in limits]
    found: Array | None = None
    while True:
        chosen = _solve(np.argwhere(kept), tables, bounds, items)
        if chosen is None:
            break
        found = chosen
        # An option that alone costs more than a whole choice is in no better one. Without it, the
        # solver's tolerances, which are absolute, are smaller beside what is left.
        spent = float(tables[0, chosen[:, 0], chosen[:, 1]].sum())
        dearer = kept & (tables[0] > spent)
        if not dearer.any():
            break
        kept &= ~dearer
    if found is None:
        return None
    options = np.zeros(items, int)
    options[found[:, 0]] = found[:, 1]
    return tuple(int(option) for option in options)


def total(values: Array, chosen: Sequence[int]) -> float:
    """The sum of the chosen options' values, [items, options]."""
    return float(np.sum(values[np.arange(len(chosen)), list(chosen)]))


def _undominated(tables: Array, there: Array) -> Array:
    """Without options that another one of the same item equals or betters in every table."""
    kept = there.copy()
    for item in range(there.shape[0]):
        for option in np.flatnonzero(there[item]):
            own = tables[:, item, option, None]
            others = tables[:, item, :]
            as_good = np.asarray(kept[item] & np.all(others <= own, axis=0))
            as_good[option] = False
            if as_good.any():  # of equal ones, the last stays
                kept[item, option] = False
    return np.asarray(kept)


def _solve(places: Array, tables: Array, bounds: Sequence[float], items: int) -> Array | None:
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - slow to import
    from scipy.sparse import csr_array  # noqa: PLC0415

    columns = np.arange(len(places))
    once = csr_array((np.ones(len(places)), (places[:, 0], columns)), shape=(items, len(places)))
    flat = tables[:, places[:, 0], places[:, 1]]
    constraints = [LinearConstraint(once, 1, 1)]
    for values, most in zip(flat[1:], bounds, strict=True):
        unit = abs(most) or 1.0  # so that the solver's absolute slack means the same everywhere
        constraints.append(LinearConstraint(values[None] / unit, -np.inf, most / unit))
    largest = float(np.abs(flat[0]).max()) or 1.0
    for tightened in range(4):
        with silent_c_stdout():
            done = milp(
                flat[0] / largest,
                integrality=np.ones(len(places)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={
                    "mip_rel_gap": 0.0 if items <= _EXACT_UP_TO else _GAP,
                    "time_limit": _SECONDS,
                },
            )
        if done.x is None:
            return None
        picked = done.x > 0.5
        sums = flat[1:, picked].sum(axis=1)
        if np.all(sums <= np.asarray(bounds) + 1e-12 * np.abs(bounds)):
            found: Array = places[picked]
            return found
        for constraint, most in zip(constraints[1:], bounds, strict=True):
            unit = abs(most) or 1.0
            constraint.ub = most / unit - _SLACK * 4.0**tightened
    return None
