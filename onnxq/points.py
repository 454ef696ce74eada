"""Further terms for some output channels alone: what `--points` asks for, and its planning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration import Calibration
from onnxq.errors import ConfigError
from onnxq.goal import parse_size
from onnxq.model import Model
from onnxq.observing import observer
from onnxq.passes.plan_points import PlanPoints, with_points
from onnxq.plan import Plan
from onnxq.trial import Trial

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

_PERCENT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*%\s*")
_ANY_SIZE = 10**15  # of a float model: that a share of it can be read is all that is asked
_CORRECTIONS = 6
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
            ConfigError: the text is none of these.
        """
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
        return made, (_said(made, errors),)

    def _within(
        self, planner: PlanPoints, model: Model, plan: Plan, errors: Mapping[str, Array]
    ) -> Plan:
        """What fits into the budget, nodes and their names included where these count.

        What they take is found by writing the model.
        """
        allowed = self.goal.budget(self.float_bytes)
        planner = replace(planner, budget=allowed, setup=_SETUP)
        if self.float_bytes > _NAMES_COUNT:
            return replace(planner, setup=0.0).choose(model, plan, errors)
        one = {name: np.ones(len(found), np.int8) for name, found in errors.items()}
        none = with_points(plan, one)
        with Trial(model, ()) as trial:
            before = trial.size(_written(none))
            for _ in range(_CORRECTIONS):
                made = planner.choose(model, plan, errors)
                with_terms = sum(made[name].terms > 1 for name in errors)
                if not with_terms:
                    break
                over = trial.size(_written(made)) - before - allowed
                if over <= 0:
                    return made
                planner = replace(planner, setup=planner.setup + 1.05 * over / with_terms)
        return none


def _written(plan: Plan) -> Plan:
    """The plan as it can be written already: static compute needs ranges, which come later."""
    changed = {"activations": "none", "layout": "merged"}
    nodes = [
        node.model_copy(update=changed) if node.activations == "static" else node
        for node in plan.nodes
    ]
    return plan.model_copy(update={"nodes": nodes, "scales": {}, "offsets": {}})


def _said(plan: Plan, errors: Mapping[str, Array]) -> str:
    """How many of the channels that were looked at got how many terms."""
    entries = {entry.name: entry for entry in plan.quantized}
    points = np.concatenate(
        [
            plan.points.get(name, np.full(len(found), entries[name].terms))
            for name, found in errors.items()
        ]
        or [np.ones(0, int)]
    )
    counts = [int((points > i).sum()) for i in range(1, int(points.max(initial=2)))]
    share = 100 * counts[0] / max(len(points), 1)
    more = "".join(
        f", {count} a {which}" for count, which in zip(counts[1:], _ORDINALS[1:], strict=False)
    )
    return f"points: {counts[0]} of {len(points)} channels ({share:.1f} %) have a second term{more}"
