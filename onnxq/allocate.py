"""Bits and terms where they buy most: a plan for a tolerance, a size or a latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from onnxq.calibration import Calibration
from onnxq.candidates import EFFICIENT, Candidate
from onnxq.errors import ConfigError
from onnxq.feeds import Feed
from onnxq.goal import Allocation, Goal, Infeasible
from onnxq.model import Model
from onnxq.plan import Plan
from onnxq.search import TRIALS, Array, Progress, Refine, Search
from onnxq.sensitivity import SAMPLES, Table, estimate, measure
from onnxq.trial import Trial

_CORRECTIONS = 5  # how often whole models may turn out to be too slow

__all__ = ["Allocation", "Goal", "Infeasible", "allocate", "allocate_without_data", "split"]


def split(samples: Iterable[Feed], *, refined: bool) -> tuple[Iterable[Feed], Iterable[Feed]]:
    """(To fit on, to judge on). Sensitivity needs few samples; rounding to data most of them.

    One sample is both.
    """
    kept = samples if isinstance(samples, Calibration) else list(samples)
    count = len(kept)
    if count < 2:
        return kept, kept
    judged = max(count // 4, 1) if refined else max(count - SAMPLES, count // 2)
    if isinstance(kept, Calibration):
        return kept.split(judged)
    out = {(2 * i + 1) * count // (2 * judged) for i in range(judged)}
    return [f for i, f in enumerate(kept) if i not in out], [kept[i] for i in sorted(out)]


def allocate(
    model: Model,
    plan: Plan,
    samples: Iterable[Feed],
    goal: Goal,
    *,
    candidates: Sequence[Candidate] | None = None,
    refine: Refine | None = None,
    judge: Iterable[Feed] | None = None,
    latency: Callable[[Table], Array] | None = None,
    timed: Callable[[Trial, Plan], float] | None = None,
    trials: int = TRIALS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Choose a candidate for each node, and correct the choice by measuring the whole model.

    The error that each candidate has on its own is measured first; a knapsack is solved with their
    sum as the error. The plan that comes out is tried on the whole model, and the sum that is
    allowed is corrected by what was measured, until the smallest plan that keeps the goal is found.

    Args:
        model: canonical; only read.
        plan: entries as selected; those that are left alone stay so.
        samples: at least one, re-iterable.
        goal: what is wanted.
        candidates: what a node may be; `candidates.EFFICIENT` if not given.
        refine: completes a plan before it is tried, e.g. rounds to data. It should see no sample of
            `judge`.
        judge: samples to measure on; a part of `samples` (see `split`) if not given.
        latency: latencies [units, candidates] of a table, relative to the float model's;
            `latencies.MeasureLatencies` measures them.
        timed: latency of the whole model that a plan makes, relative to the float model's. What it
            is more than the sum of the table is made up for, and `Allocation.latency` is what it
            says.
        trials: how often the whole model is measured, at most.
        threads: of onnxruntime.
        progress: called with (what, done, total).

    Raises:
        Infeasible: the goal cannot be kept.
        ConfigError: a latency is asked for without a table of them, or the tolerance is not one
            for such a model.
        ModelError, ValidationError: the model is too large, or does not run.
    """
    if latency is None and (goal.max_latency is not None or goal.minimize == "latency"):
        raise ConfigError("--max-latency and --minimize latency need latencies that were measured")
    if judge is None:
        samples, judge = split(samples, refined=refine is not None)
    table = measure(
        model,
        plan,
        candidates or EFFICIENT,
        samples,
        threads=threads,
        progress=progress,
    )
    with Trial(model, judge, threads) as trial:
        table = trial.exact_bytes(table, plan)
        search = Search(
            model,
            plan,
            goal,
            table,
            trial,
            refine=refine,
            latency=None if latency is None else latency(table),
            most_trials=trials,
            progress=progress,
        )
        if timed is None or search.latency is None:
            return _solve(search)
        return _solve_timed(search, lambda made: timed(trial, made))


def _solve(search: Search) -> Allocation:
    return search.least_error() if search.goal.minimize == "error" else search.least_cost()


def _solve_timed(search: Search, timed: Callable[[Plan], float]) -> Allocation:
    """With the bound on the latency lowered by what whole models take beyond the sum of nodes."""
    most, trials = search.goal.max_latency, search.most_trials
    found = _solve(search)
    closest, least = found, float("inf")
    for i in range(_CORRECTIONS):
        predicted, measured = found.latency or 0.0, timed(found.plan)
        found = replace(found, latency=measured)
        if most is None or measured <= most:
            return found
        if measured < least:
            closest, least = found, measured
        # further each time: what is beyond the sum of nodes differs from plan to plan
        bound = predicted - 2**i * (measured - most)
        search.goal = replace(search.goal, max_latency=bound)
        search.most_trials = len(search.tried) + trials
        try:
            found = _solve(search)
        except Infeasible:
            break
    raise Infeasible(
        f"latency {most:.3g}x cannot be kept; the closest is {least:.3g}x, {closest.size} bytes",
        closest,
    )


def allocate_without_data(
    model: Model,
    plan: Plan,
    goal: Goal,
    *,
    candidates: Sequence[Candidate] | None = None,
) -> Allocation:
    """The same from the weights alone: nothing is run, and the error is an estimate.

    The tolerance is stated as an energy of the error (`Tolerance.energy`), the sum over nodes of
    the relative energy of each weight's own error.

    Raises:
        Infeasible: the goal cannot be kept by the estimate.
        ConfigError: a latency is asked for.
    """
    if goal.max_latency is not None or goal.minimize == "latency":
        raise ConfigError("latencies are measured on samples: add --calibration")
    table = estimate(model, plan, candidates or EFFICIENT)
    with Trial(model, ()) as trial:
        table = trial.exact_bytes(table, plan)
        search = Search(model, plan, goal, table, trial, most_trials=0)
        return search.by_estimate()
