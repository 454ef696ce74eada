"""Bits and terms where they buy most: a plan for a tolerance, a size or a latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from onnxq.calibration import Calibration
from onnxq.candidates import EFFICIENT, Candidate
from onnxq.errors import ConfigError
from onnxq.feeds import Feed, Feeds
from onnxq.goal import Allocation, Goal, Infeasible
from onnxq.model import Model
from onnxq.plan import Plan
from onnxq.rounding_factors import with_rounding
from onnxq.search import TRIALS, Array, Progress, Refine, Search
from onnxq.sensitivity import SAMPLES, Table, estimate, measure
from onnxq.tolerance import Tolerance
from onnxq.trial import Trial

# Made-up inputs are no pictures: they say nothing about classes.
_MADE_UP_KINDS = ("error", "sqnr", "mae", "cosine")
_MADE_UP_TRIALS = 6
# The error on them is that of the weights if it falls with their own: at least as this power of it.
_ANSWERS = 0.5
_MADE_UP_BYTES = 2**28  # of the model; plans of larger ones take too long to try unasked
_CORRECTIONS = 5  # how often whole models may turn out to be too slow

__all__ = ["Allocation", "Goal", "Infeasible", "allocate", "allocate_without_data", "split"]


def split(samples: Iterable[Feed], *, refined: bool) -> tuple[Feeds, Feeds]:
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
    samples: Feeds,
    goal: Goal,
    *,
    candidates: Sequence[Candidate] | None = None,
    refine: Refine | None = None,
    finish: Refine | None = None,
    rounded: bool = False,
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
        finish: like `refine`, but with all samples: completes the plan that was found. What is
            said to be measured is that of `refine`, which is not better.
        rounded: whether `refine` rounds weights to samples by second order: the errors of nodes are
            those of weights rounded so.
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
    if rounded:
        table = with_rounding(model, plan, table, samples, progress=progress)
    beside = () if judge is samples else samples
    with Trial(model, judge, threads, beside) as trial:
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
            found = _solve(search)
        else:
            found = _solve_timed(search, partial(timed, trial))
        return found if finish is None else _finished(search, found, finish)


def _finished(search: Search, found: Allocation, finish: Refine) -> Allocation:
    """Completed with all samples, if it then still has the size."""
    made = finish(search.model, search.table.plan(search.base, found.options))
    size, bound = search.trial.size(made), search.goal.max_bytes
    return found if bound is not None and size > bound else replace(found, plan=made, size=size)


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
    made_up: Iterable[Feed] = (),
    refine: Refine | None = None,
    threads: int | None = None,
) -> Allocation:
    """The same from the weights alone: the error is an estimate.

    The tolerance is stated as an energy of the error (`Tolerance.energy`), the sum over nodes of
    the relative energy of each weight's own error. With made-up inputs, the plan is run on them; if
    it does not keep the tolerance there, finer ones are tried, a few times at most. Where these
    hardly lower the error, it is not the weights', and the estimate's plan stands: noise may be
    nothing that the model has an answer to. `refine` completes a plan before it is run.
    `stated` says which of these it was.

    Raises:
        Infeasible: the goal cannot be kept by the estimate.
        ConfigError: a latency is asked for.
    """
    if goal.max_latency is not None or goal.minimize == "latency":
        raise ConfigError("latencies are measured on samples: add --calibration")
    table = estimate(model, plan, candidates or EFFICIENT)
    with Trial(model, made_up, threads) as trial:
        table = trial.exact_bytes(table, plan)
        search = Search(model, plan, goal, table, trial, refine=refine, most_trials=0)
        found = search.by_estimate()
        tried = list(islice(made_up, 1)) and trial.float_bytes <= _MADE_UP_BYTES
        wanted = goal.tolerance
        if not tried or wanted is None or wanted.kind not in _MADE_UP_KINDS:
            return found
        return found if goal.minimize == "error" else _corrected(search, wanted, found)


def _corrected(search: Search, tolerance: Tolerance, found: Allocation) -> Allocation:
    """What also keeps the tolerance on made-up inputs, or the estimate's plan."""
    search.most_trials = _MADE_UP_TRIALS
    try:
        made = search.least_cost(tolerance.energy, loosen=False)
    except Infeasible as error:
        made = error.closest
    bound = search.goal.max_bytes
    if bound is not None and made.size > bound:
        return replace(found, stated=f"{found.stated}; finer plans are larger than {bound} bytes")
    assert made.measured is not None
    said = tolerance.shown(made.measured)
    first = made.trials[0][1].energy.value
    expected = first * (made.predicted / found.predicted) ** _ANSWERS if found.predicted else 0.0
    if made.measured.energy.value == 0:  # the float output, too, is zero
        said = "its output is zero on made-up inputs, so that they do not count"
    elif len(made.trials) == 1:
        said = f"{said} on made-up inputs"
    elif made.options != found.options and made.measured.energy.value <= expected:
        said = f"made finer until it had {said} on made-up inputs"
    else:
        said = f"{said} on made-up inputs with finer weights, too, so that they do not count"
    kept = found if said.endswith("count") else made
    return replace(kept, stated=f"{found.stated}; {said}")
