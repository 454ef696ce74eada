"""What planning does with a tolerance or a budget: bits and terms chosen per node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnxq.allocate import Allocation, Goal, Infeasible, allocate, allocate_without_data, split
from onnxq.calibrated import round_to_samples
from onnxq.calibration import Calibration
from onnxq.candidates import EFFICIENT, INTEGER
from onnxq.goal import parse_size
from onnxq.latencies import MeasureLatencies, parse_latency
from onnxq.model import Model
from onnxq.options import Options
from onnxq.plan import Plan
from onnxq.tolerance import Tolerance

Progress = Callable[[str, int, int], None]

# Rounding to data takes most of a trial's time.
_TRIALS_ROUNDED = 4


@dataclass(frozen=True, eq=False)
class Budgeted:
    """Chooses what is done to each node.

    Attributes:
        options: with a tolerance or a budget, or the default tolerance.
        samples: to measure on; without them the weights alone decide.
        float_bytes: of the float model's file.
        progress: called with (what, done, total).
    """

    options: Options
    samples: Calibration | None
    float_bytes: int
    progress: Progress

    def __call__(self, model: Model, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
        """The plan, and notes for the user.

        Raises:
            Infeasible: the goal cannot be kept, and the closest is not wanted.
            ConfigError: the goal makes no sense for such a model.
        """
        notes: tuple[str, ...] = ()
        try:
            made = self._allocate(model, plan)
        except Infeasible as error:
            if not (self.options.best_effort or self.options.by_default):
                raise
            made, notes = error.closest, (f"{error}: this is the closest",)
        return made.plan, (self._summary(made), *notes)

    def goal(self) -> Goal:
        """The options as a goal.

        Raises:
            ConfigError: a text cannot be read, or the bounds say nothing.
        """
        options = self.options
        tolerance = options.effective_tolerance
        return Goal(
            tolerance=None if tolerance is None else Tolerance.parse(tolerance),
            max_latency=parse_latency(options.max_latency) if options.max_latency else None,
            max_bytes=parse_size(options.max_size, self.float_bytes) if options.max_size else None,
            minimize=options.effective_minimize,
        )

    def _allocate(self, model: Model, plan: Plan) -> Allocation:
        goal = self.goal()
        candidates = EFFICIENT if self.options.activations == "none" else INTEGER
        if self.options.by_default:  # a quantizer quantizes; leaving out is for stated bounds
            candidates = tuple(one for one in candidates if one.quantized)
        if self.samples is None:
            return allocate_without_data(model, plan, goal, candidates=candidates)
        latency = None
        if goal.max_latency is not None or goal.minimize == "latency":
            latency = MeasureLatencies(model, next(iter(self.samples)), progress=self.progress)
        timing: Any = {"latency": latency, "timed": latency.whole} if latency else {}
        if self.options.effort == "fast":
            return allocate(
                model,
                plan,
                self.samples,
                goal,
                candidates=candidates,
                progress=self.progress,
                **timing,
            )
        fit, judge = split(self.samples, refined=True)

        def refine(model: Model, plan: Plan) -> Plan:
            # split keeps a Calibration a Calibration
            return round_to_samples(model, plan, fit, self.options, self.progress)[0]  # type: ignore[arg-type]

        return allocate(
            model,
            plan,
            fit,
            goal,
            candidates=candidates,
            refine=refine,
            judge=judge,
            trials=_TRIALS_ROUNDED,
            progress=self.progress,
            **timing,
        )

    def _summary(self, made: Allocation) -> str:
        kinds = ", ".join(f"{count} × {name}" for name, count in made.chosen.items() if count)
        bounds = (
            self.options.effective_tolerance,
            self.options.max_size and f"at most {self.options.max_size}",
            self.options.max_latency and f"latency at most {self.options.max_latency}",
        )
        asked = ", ".join(bound for bound in bounds if bound)
        default = " (the default tolerance)" if self.options.by_default else ""
        return f"{asked}{default}, {made.stated}: {kinds} (bits x terms / block)"
