"""Further terms for some output channels alone: what `--points` asks for, and its planning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration import Calibration
from onnxq.errors import ConfigError
from onnxq.goal import parse_size
from onnxq.model import Model
from onnxq.observing import observer
from onnxq.passes.plan_points import PlanPoints, with_points
from onnxq.passes.share_budget import Gain, gained
from onnxq.plan import Plan
from onnxq.trial import Trial

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*")
_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")
_ANY_SIZE = 10**15  # of a float model: that a share of it can be read is all that is asked
_CORRECTIONS = 6
_SPARE = 0.05  # of the bytes: where no more are left, what nodes take is known well enough
_LEAST_SETUP = 1.0
_SETUP = 1100.0  # bytes of the nodes that put the terms of some channels to the others; a guess
_NAMES_COUNT = 2**27  # bytes of the float file, above which names and nodes are next to nothing
_ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclass(frozen=True)
class PointsGoal:
    """What `--points` says: one of the two.

    Attributes:
        error: relative error (‖difference‖ / ‖output‖) that each channel's output may keep.
        size: what further terms may take in all, to be read by `goal.parse_size`.
    """

    error: float | None = None
    size: str | None = None

    @classmethod
    def parse(cls, text: str) -> PointsGoal:
        """`15%` of each channel's output, or `40KB`, `0.02x` of the float file.

        Raises:
            ConfigError: the text is none of these; a number alone is not, as it could be any.
        """
        bare = _NUMBER.fullmatch(text)
        if bare is not None:
            raise ConfigError(
                f"--points {bare[1]}: what is counted? give {bare[1]}% (the error that a channel "
                f"may keep), or {bare[1]}KB (the bytes that further terms may take)"
            )
        found = _PERCENT.fullmatch(text)
        if found is None:
            cls(size=text).budget(_ANY_SIZE)
            return cls(size=text)
        percent = float(found[1])
        if not 0 < percent < 100:
            raise ConfigError(f"--points {text}: give an error of more than 0 and less than 100 %")
        return cls(error=percent / 100)

    def budget(self, float_bytes: int) -> int:
        """Bytes; `float_bytes` is the size of the float model's file.

        Raises:
            ConfigError: it cannot be read, or is less than a byte.
        """
        try:
            return parse_size(self.size or "", float_bytes)
        except ConfigError:
            raise ConfigError(
                f"--points {self.size!r}: give the error that a channel may keep, as 15%, or the "
                "bytes that further terms may take, as 40KB or 0.02x"
            ) from None


@dataclass(frozen=True, eq=False)
class ChoosePoints:
    """Gives further terms to the output channels that need them, as `PlanPoints` does.

    Attributes:
        goal: what is wanted.
        samples: that errors are measured on; from the weights alone without.
        float_bytes: of the float model's file.
        progress: called with (what, done, total).
    """

    goal: PointsGoal
    samples: Calibration | None
    float_bytes: int
    progress: Progress

    def __call__(self, model: Model, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
        """The plan with points, and a note for the user.

        Args:
            model: canonical and float; only read.
            plan: without scales, with the most terms that a channel may have.

        Raises:
            ConfigError: the plan was made for another model.
            CalibrationError: the model fails on a sample.
            ModelError: the model is larger than 2 GiB, and there are samples.
        """
        planner = PlanPoints(progress=self.progress)
        if self.samples is not None:
            observe = observer(model, self.samples, self.samples.failing)
            planner = replace(planner, observe=observe, samples=len(self.samples))
        errors = planner.errors(model, plan)
        if self.goal.error is not None:
            made = replace(planner, tolerance=self.goal.error**2).choose(model, plan, errors)
        else:
            made = self._within(replace(planner, budget=1), model, plan, errors)
        said = _said(made, errors)
        if self.goal.size is not None and not any(made[name].terms > 1 for name in errors):
            said += f"; {self.goal.size.strip()} buys none that brings anything: give more"
        return made, (said,)

    def _within(
        self, planner: PlanPoints, model: Model, plan: Plan, errors: Mapping[str, Array]
    ) -> Plan:
        """What fits into the budget, nodes and their names included where these count.

        What they take is found by writing the model. More terms allowed never bring less.
        """
        allowed = self.goal.budget(self.float_bytes)
        most = max((found.shape[1] for found in errors.values()), default=1)
        one = {name: np.ones(len(found), np.int8) for name, found in errors.items()}
        search = _Search(model, plan, errors, with_points(plan, one))
        planner = replace(planner, budget=allowed, setup=_SETUP)
        if self.float_bytes > _NAMES_COUNT:
            for terms in range(2, most + 1):
                search.offer(search.choose(replace(planner, setup=0.0), terms))
            return search.best
        with Trial(model, ()) as trial:
            search.before = trial.size(_written(search.best))
            # what a run with fewer terms allowed has found, one with more finds, too
            for terms in range(2, most + 1):
                planner = search.fit(trial, planner, terms)
        return search.best


@dataclass(eq=False)
class _Search:
    """The best plan so far that fits into a budget.

    Attributes:
        errors: of each node that can have points, [out, terms].
        best: the plan; at first one without further terms.
        before: bytes of the file without further terms.
        written: bytes of the files that were tried, by the terms of their channels.
    """

    model: Model
    plan: Plan
    errors: Mapping[str, Array]
    best: Plan
    before: int = 0
    written: dict[tuple[tuple[int, ...], ...], int] = field(default_factory=dict)

    def choose(self, planner: PlanPoints, terms: int) -> Plan:
        """A plan with at most so many terms of a channel."""
        fewer = {name: found[:, :terms] for name, found in self.errors.items()}
        return planner.choose(self.model, self.plan, fewer)

    def offer(self, made: Plan) -> None:
        """Keep a plan that fits, where it brings more."""
        if self._gain(made) > self._gain(self.best):
            self.best = made

    def fit(self, trial: Trial, planner: PlanPoints, terms: int) -> PlanPoints:
        """Look for a better plan; returns the planner with what nodes were found to take."""
        allowed, margin = planner.budget or 0, 1.05
        for _ in range(_CORRECTIONS):
            made = self.choose(planner, terms)
            if self._gain(made) <= self._gain(self.best):
                break
            over = self._bytes(trial, made) - self.before - allowed
            if over <= 0:
                self.offer(made)
            if -_SPARE * allowed <= over <= 0:
                break
            with_terms = sum(made[name].terms > 1 for name in self.errors)
            more = (margin if over > 0 else 0.95) * over / with_terms
            margin *= 2  # a few bytes too many may be less than a term of a channel
            planner = replace(planner, setup=max(planner.setup + more, _LEAST_SETUP))
        return planner

    def _bytes(self, trial: Trial, made: Plan) -> int:
        """Of the file; each plan is written once."""
        key = tuple(tuple(points) for points in _points(made, self.errors))
        if key not in self.written:
            self.written[key] = trial.size(_written(made))
        return self.written[key]

    def _gain(self, plan: Plan) -> Gain:
        return gained(list(self.errors.values()), _points(plan, self.errors))


def _written(plan: Plan) -> Plan:
    """The plan as it can be written already: static compute needs ranges, which come later."""
    changed = {"activations": "none", "layout": "merged"}
    nodes = [
        node.model_copy(update=changed) if node.activations == "static" else node
        for node in plan.nodes
    ]
    return plan.model_copy(update={"nodes": nodes, "scales": {}, "offsets": {}})


def _points(plan: Plan, errors: Mapping[str, Array]) -> list[Array]:
    """The terms of each channel, [out], of the nodes that errors are known of."""
    entries = {entry.name: entry for entry in plan.quantized}
    return [
        plan.points.get(name, np.full(len(found), entries[name].terms))
        for name, found in errors.items()
    ]


def _said(plan: Plan, errors: Mapping[str, Array]) -> str:
    """How many of the channels that were looked at got how many terms."""
    points = np.concatenate(_points(plan, errors) or [np.ones(0, int)])
    counts = [int((points > i).sum()) for i in range(1, int(points.max(initial=2)))]
    share = 100 * counts[0] / max(len(points), 1)
    more = "".join(
        f", {count} a {which}" for count, which in zip(counts[1:], _ORDINALS[1:], strict=False)
    )
    return f"points: {counts[0]} of {len(points)} channels ({share:.1f} %) have a second term{more}"
