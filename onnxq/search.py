"""Which plan is tried next, from what the plans before it turned out to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.candidates import FLOAT_BYTES
from onnxq.goal import Allocation, Goal, Infeasible
from onnxq.knapsack import Limit, choose, total
from onnxq.meter import Measured
from onnxq.model import Model
from onnxq.next_budget import next_budget
from onnxq.plan import Plan
from onnxq.sensitivity import Table
from onnxq.tolerance import Tolerance
from onnxq.trial import Trial

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
Refine = Callable[[Model, Plan], Plan]

TRIALS = 8
# Standard errors above the mean at which the tolerance must still be kept: what comes out on
# other samples is above the mean of these half of the time.
DEVIATIONS = 1.0
_ENOUGH = 0.88  # share of the tolerance that is not worth looking for a smaller plan
_CLOSE = 1.05  # budgets nearer than this are not worth another trial
_PRODUCT = 0.25  # bytes that a product per weight counts for where the size is made small
_TIE = 1e-3  # how much of the latency all bytes of the float model count for


@dataclass(eq=False)
class _Tried:
    chosen: tuple[int, ...]
    predicted: float
    plan: Plan
    size: int
    measured: Measured | None


@dataclass(eq=False)
class Search:
    """Plans for one table, the most promising first, each tried at most once.

    With `most_trials` 0 nothing is run: plans have the error that the table predicts.
    """

    model: Model
    base: Plan
    goal: Goal
    table: Table
    trial: Trial
    refine: Refine | None = None
    latency: Array | None = None
    most_trials: int = TRIALS
    progress: Progress | None = None
    tried: dict[tuple[int, ...], _Tried] = field(default_factory=dict)

    def least_cost(self, start: float | None = None, *, loosen: bool = True) -> Allocation:
        """The smallest or fastest plan that keeps the tolerance.

        `start` is the first budget. Without `loosen` the plan for it is taken if it keeps the
        tolerance, though a smaller one might, too.
        """
        tolerance = self._tolerance()
        kept: _Tried | None = None
        budget = start or tolerance.limit ** (1 / tolerance.power)
        low, high = 0.0, float("inf")  # budgets known to keep it, and not to
        known: dict[float, float] = {}  # predicted error -> loss
        while len(self.tried) < self.most_trials:
            before = len(self.tried)
            tried = self._try(self._cheapest(budget))
            loss = tolerance.loss(self._known(tried)).upper(DEVIATIONS)
            known[tried.predicted or budget] = loss
            if loss <= tolerance.limit:
                if self._fast_enough(tried) and (
                    kept is None or self._cost(tried.chosen) <= self._cost(kept.chosen)
                ):
                    kept = tried
                low = max(low, budget)
                enough = loss >= _ENOUGH * tolerance.limit or not (loosen or before)
                if enough or tried.chosen == self._cheapest(float("inf")):
                    break
            else:
                high = min(high, tried.predicted, budget)
                if tried.chosen in (self._finest(), self._closest()):
                    break
            known_before = len(self.tried) == before
            last, budget = budget, next_budget(known, tolerance, (low, high))
            if (low and high / low < _CLOSE) or (known_before and low and high < float("inf")):
                break
            if known_before and budget in (last, 0.0):  # nothing is predicted to be better
                break
        if kept is None:
            raise self._infeasible(f"{tolerance} cannot be kept")
        if not kept.plan.quantized:
            what = f"{tolerance} is only kept by the float model"
            if self.goal.minimize == "latency":
                what = f"nothing that keeps {tolerance} is faster than the float model"
            raise self._infeasible(what, kept)
        self._check_bounds(kept)
        return self._allocation(kept)

    def least_error(self) -> Allocation:
        """The most exact plan within size and latency."""
        best = self._within_size()
        tolerance = self.goal.tolerance
        if tolerance is not None and not tolerance.met(self._known(best)):
            raise self._infeasible(f"{tolerance} cannot be kept within the size or latency", best)
        return self._allocation(best)

    def by_estimate(self) -> Allocation:
        """One solution, not measured."""
        if self.goal.minimize == "error":
            return self._allocation(self._within_size())
        energy = self._tolerance().energy
        found = self._sized(self._cheapest(energy))
        if found.predicted > energy:
            raise self._infeasible(f"{self.goal.tolerance} cannot be kept by the estimate", found)
        self._check_bounds(found)
        return self._allocation(found)

    def _within_size(self) -> _Tried:
        rest = self._rest()
        bound = self.goal.max_bytes or float("inf")
        best: _Tried | None = None
        for _ in range(4):
            tried = self._try(self._most_exact(rest) or self._smallest())
            if tried.size <= bound and (best is None or self._better(tried, best)):
                best = tried
            seen = tried.size - total(self.table.bytes, tried.chosen)
            if tried.size <= bound and abs(seen - rest) <= 0.005 * tried.size:
                break
            rest = seen
        if best is None:
            raise self._infeasible(f"{self.goal.max_bytes} bytes cannot be kept", self._least())
        if not self._fast_enough(best):
            raise self._infeasible(f"{self._latency_bound()} cannot be kept", best)
        return self._or_uniform(best)

    def _rest(self) -> float:
        """Bytes of the file beside the units' weights."""
        weights = sum(unit.weight.size for unit in self.table.units)
        return float(self.trial.float_bytes - FLOAT_BYTES * weights)

    def _latency_bound(self) -> str:
        return f"latency {self.goal.max_latency:.3g}x"

    def _fast_enough(self, tried: _Tried) -> bool:
        most = self.goal.max_latency
        return most is None or self.latency is None or total(self.latency, tried.chosen) <= most

    def _least(self) -> _Tried:
        """The smallest that is known."""
        known = self.tried.values() or [self._sized(self._smallest())]
        return min(known, key=lambda tried: tried.size)

    def _smallest(self) -> tuple[int, ...]:
        """The cheapest choice within the bound that is given, whatever its error."""
        by_bytes = self.goal.max_latency is None or self.latency is None
        return _argmin(self.table.bytes if by_bytes else self._by_latency())

    def _or_uniform(self, best: _Tried) -> _Tried:
        """The plan, or the most exact one with the same candidate everywhere, if that is better."""
        bound = self.goal.max_bytes
        if bound is None or best.measured is None or self.goal.max_latency is not None:
            return best
        for option in np.argsort(self.table.error.sum(axis=0)):
            there = np.isfinite(self.table.error[:, option])
            same = tuple(
                int(o) for o in np.where(there, option, np.argmin(self.table.bytes, axis=1))
            )
            if total(self.table.bytes, same) <= best.size:
                tried = self._try(same)
                if tried.size <= bound and self._better(tried, best):
                    return tried
                return best
        return best

    def _better(self, one: _Tried, other: _Tried) -> bool:
        if one.measured is None or other.measured is None:
            return one.predicted < other.predicted
        if self.goal.tolerance is not None:
            loss = self.goal.tolerance.loss
            return loss(one.measured).value < loss(other.measured).value
        return one.measured.energy.value < other.measured.energy.value

    def _tolerance(self) -> Tolerance:
        assert self.goal.tolerance is not None
        return self.goal.tolerance

    def _costs(self) -> Array:
        """What is made small; of nearly equal sizes the faster wins.

        Terms of activations take no bytes to speak of, but time.
        """
        if self.goal.minimize == "latency":
            return self._by_latency()
        return self.table.bytes + _PRODUCT * self.table.products

    def _by_latency(self) -> Array:
        """Latencies, with so little of the bytes that of equally fast choices the smaller wins.

        In float compute all are as fast as the float node, whose error is the least.
        """
        assert self.latency is not None
        bytes_ = self.table.bytes / self.trial.float_bytes
        return self.latency + _TIE * float(np.min(self.latency, axis=1).sum()) * bytes_

    def _cost(self, chosen: tuple[int, ...]) -> float:
        return total(self._costs(), chosen)

    def _limits(self, rest: float) -> list[Limit]:
        limits = []
        if self.goal.max_bytes is not None and self.goal.minimize != "size":
            limits.append(Limit(self.table.bytes, self.goal.max_bytes - rest))
        if self.goal.max_latency is not None and self.latency is not None:
            limits.append(Limit(self.latency, self.goal.max_latency))
        return limits

    def _cheapest(self, budget: float) -> tuple[int, ...]:
        error = self.table.error
        within = [] if np.isinf(budget) else [Limit(error, budget)]
        limits = self._limits(self._rest())
        return choose(self._costs(), [*within, *limits]) or self._closest()

    def _closest(self) -> tuple[int, ...]:
        """The most exact within the bounds, or of all that stay quantized."""
        limits = self._limits(self._rest())
        return (choose(self.table.error, limits) if limits else None) or self._finest()

    def _most_exact(self, rest: float) -> tuple[int, ...] | None:
        return choose(self.table.error, self._limits(rest))

    def _finest(self) -> tuple[int, ...]:
        """The most exact that stays quantized, at any cost."""
        quantized = [c.quantized for c in self.table.candidates]
        error = np.where(quantized, self.table.error, np.inf)
        alone = ~np.isfinite(error).any(axis=1)
        error[alone] = self.table.error[alone]
        return _argmin(error)

    def _try(self, chosen: tuple[int, ...]) -> _Tried:
        if chosen in self.tried:
            return self.tried[chosen]
        if self.most_trials == 0:
            return self._sized(chosen)
        if self.progress is not None:
            self.progress("allocation", len(self.tried), self.most_trials)
        plan = self._completed(chosen)
        measured, size = self.trial(plan)
        predicted = total(self.table.error, chosen)
        self.tried[chosen] = _Tried(chosen, predicted, plan, size, measured)
        return self.tried[chosen]

    def _sized(self, chosen: tuple[int, ...]) -> _Tried:
        plan, predicted = self._completed(chosen), total(self.table.error, chosen)
        return _Tried(chosen, predicted, plan, self.trial.size(plan), None)

    def _completed(self, chosen: tuple[int, ...]) -> Plan:
        plan = self.table.plan(self.base, chosen)
        return plan if self.refine is None else self.refine(self.model, plan)

    def _known(self, tried: _Tried) -> Measured:
        assert tried.measured is not None
        return tried.measured

    def _check_bounds(self, found: _Tried) -> None:
        bound = self.goal.max_bytes
        if bound is not None and found.size > bound:
            raise self._infeasible(
                f"{self.goal.tolerance} cannot be kept in {bound} bytes: {found.size} are needed",
                found,
            )
        if not self._fast_enough(found):
            raise self._infeasible(
                f"{self.goal.tolerance} cannot be kept within {self._latency_bound()}", found
            )

    def _infeasible(self, what: str, closest: _Tried | None = None) -> Infeasible:
        if closest is None:
            closest = next(iter(self.tried.values()))
            for tried in self.tried.values():
                closest = tried if self._better(tried, closest) else closest
        found = [f"{closest.size} bytes"]
        if self.latency is not None and self.goal.max_latency is not None:
            found.append(f"latency {total(self.latency, closest.chosen):.3g}x")
        if closest.measured is not None:
            shown = self.goal.tolerance or Tolerance(kind="error", number=1)
            found.append(shown.shown(closest.measured))
        return Infeasible(f"{what}; the closest is {', '.join(found)}", self._allocation(closest))

    def _allocation(self, found: _Tried) -> Allocation:
        names = [self.table.candidates[option].name for option in found.chosen]
        return Allocation(
            plan=found.plan,
            measured=found.measured,
            predicted=found.predicted,
            size=found.size,
            latency=None if self.latency is None else total(self.latency, found.chosen),
            chosen=dict(Counter(names).most_common()),
            options=found.chosen,
            trials=tuple((t.size, t.measured) for t in self.tried.values() if t.measured),
            stated=self.table.stated,
        )


def _argmin(values: Array) -> tuple[int, ...]:
    return tuple(int(option) for option in np.argmin(values, axis=1))
