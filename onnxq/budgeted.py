"""What planning does with a tolerance or a budget: bits and terms chosen per node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from onnxq.allocate import Allocation, Goal, Infeasible, allocate, allocate_without_data, split
from onnxq.calibrated import Calibrated
from onnxq.calibration import Calibration
from onnxq.candidates import EFFICIENT, INTEGER, WITH_POINTS, Candidate, integer
from onnxq.feeds import Feed, Feeds
from onnxq.goal import parse_size
from onnxq.latencies import MeasureLatencies, parse_latency
from onnxq.mixed import mixed
from onnxq.model import Model
from onnxq.options import Options
from onnxq.passes import SearchScales
from onnxq.passes.node_samples import MOST_ROWS
from onnxq.plan import Plan
from onnxq.search import Refine
from onnxq.static import plan_static
from onnxq.tolerance import Tolerance

Progress = Callable[[str, int, int], None]
Finish = Callable[[Model, Plan], Plan]

_LEGEND = ("bits x terms / block", "bits x terms / block @ channels with all terms")
# Rounding to data takes most of a trial's time.
_TRIALS_ROUNDED = 6
# Rows of a node's inputs that plans are rounded to before one is chosen, for time: a plan of
# squeezenet1.1 had 2 % more error energy than with the rows that it is rounded to at last.
TRIED_ROWS = 16384


@dataclass(frozen=True, eq=False)
class Budgeted:
    """Chooses what is done to each node.

    Attributes:
        options: with a tolerance or a budget, or the default tolerance.
        samples: to measure on; without them the weights alone decide.
        float_bytes: of the float model's file.
        progress: called with (what, done, total).
        made_up: inputs that the float model runs on, to try plans on where there are no samples.
    """

    options: Options
    samples: Calibration | None
    float_bytes: int
    progress: Progress
    made_up: Iterable[Feed] = ()

    def __call__(
        self, model: Model, plan: Plan, finish: Finish | None = None
    ) -> tuple[Plan, tuple[str, ...]]:
        """The plan, and notes for the user.

        Args:
            model: canonical; only read.
            plan: as selected.
            finish: what is done to a plan afterwards where there are no samples.

        Raises:
            Infeasible: the goal cannot be kept, and the closest is not wanted.
            ConfigError: the goal makes no sense for such a model.
        """
        notes: tuple[str, ...] = ()
        try:
            made = self._allocate(model, plan, finish)
        except Infeasible as error:
            if not (self.options.best_effort or self.options.by_default):
                raise
            made, notes = error.closest, (f"{error}: this is the closest",)
        return made.plan, (self._summary(made, plan), *notes)

    def goal(self, plan: Plan) -> Goal:
        """The options as a goal for a plan as selected.

        Raises:
            ConfigError: a text cannot be read, or the bounds say nothing.
        """
        options = self.options
        tolerance = options.tolerance_for(plan)
        return Goal(
            tolerance=None if tolerance is None else Tolerance.parse(tolerance),
            max_latency=parse_latency(options.max_latency) if options.max_latency else None,
            max_bytes=parse_size(options.max_size, self.float_bytes) if options.max_size else None,
            minimize=options.effective_minimize,
        )

    def _allocate(self, model: Model, plan: Plan, finish: Finish | None) -> Allocation:
        goal = self.goal(plan)
        static = self.options.resolved_activations == "static"
        candidates = self._candidates(goal, plan)
        if self.samples is None:
            return allocate_without_data(
                model, plan, goal, candidates=candidates, made_up=self.made_up, refine=finish
            )
        more: dict[str, Any] = {}
        if goal.max_latency is not None or goal.minimize == "latency":
            latency = MeasureLatencies(model, next(iter(self.samples)), progress=self.progress)
            more = {"latency": latency, "timed": latency.whole}
        samples: Feeds = self.samples
        if static or self.options.effort != "fast":
            fit, judge = split(self.samples, refined=True)
            rounded = self.options.effort != "fast" and self.options.rounding == "second_order"
            more |= {
                "refine": self._completed(fit, tried=True),
                "finish": self._completed(self.samples, tried=False),
                "rounded": rounded,
                "judge": judge,
                "trials": _TRIALS_ROUNDED,
            }
            samples = fit
            if static:
                plan = self._with_ranges(model, plan, fit)
        return allocate(
            model, plan, samples, goal, candidates=candidates, progress=self.progress, **more
        )

    def _candidates(self, goal: Goal, plan: Plan) -> tuple[Candidate, ...]:
        """What a node may be. Without samples nothing is known of activations."""
        options, kind = self.options, self.options.resolved_activations
        if kind == "none":
            found = (*WITH_POINTS, *EFFICIENT) if options.points == "auto" else EFFICIENT
        elif kind == "static" or self.samples is None:
            found = INTEGER
        else:
            timed = goal.max_latency is not None or goal.minimize == "latency"
            said = {"activation_bits", "activation_terms", "products"} & options.model_fields_set
            found = integer(
                columns=options.outliers,
                terms=not said and (timed or goal.minimize == "size"),
                narrow=timed and any(node.target == "cpu-avx2" for node in plan.quantized),
            )
        if kind == "auto":
            found = mixed(EFFICIENT, found)
        if options.by_default:  # a quantizer quantizes; leaving out is for stated bounds
            return tuple(one for one in found if one.quantized)
        return found

    def _with_ranges(self, model: Model, plan: Plan, samples: Iterable[Feed]) -> Plan:
        """The plan with ranges of activations, and as float what cannot be static."""
        assert isinstance(samples, Calibration)
        own = plan.model_copy(update={"scales": {}, "ranges": dict(plan.ranges)})
        own = SearchScales()(model, own)
        made = plan_static(model, own, samples, self.options.ranges, self.progress)
        return plan.model_copy(update={"nodes": made.nodes, "ranges": made.ranges})

    def _completed(self, samples: Iterable[Feed], *, tried: bool) -> Refine:
        """How a plan is completed on samples; blocks are refined once it is chosen."""
        high = self.options.effort == "high"
        options = self.options.model_copy(update={"effort": "normal"} if high and tried else {})
        assert isinstance(samples, Calibration)  # split keeps it one
        rows = TRIED_ROWS if tried else MOST_ROWS
        complete = Calibrated(options, samples, self.progress, rows)

        def completed(model: Model, plan: Plan) -> Plan:
            ranges = dict(plan.ranges) if tried else {}  # at last those of all samples
            return complete(model, plan.model_copy(update={"ranges": ranges}))[0]

        return completed

    def _summary(self, made: Allocation, plan: Plan) -> str:
        kinds = ", ".join(f"{count} × {name}" for name, count in made.chosen.items() if count)
        bounds = (
            self.options.tolerance_for(plan),
            self.options.max_size and f"at most {self.options.max_size}",
            self.options.max_latency and f"latency at most {self.options.max_latency}",
        )
        asked = ", ".join(bound for bound in bounds if bound)
        legend = _LEGEND[any("@" in name for name in made.chosen)]
        default = " (the default tolerance)" if self.options.by_default else ""
        return f"{asked}{default}, {made.stated}: {kinds} ({legend})"
