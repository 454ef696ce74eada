"""What planning does with calibration samples, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxq.calibrate_weights import calibrate_weights
from onnxq.calibration import Calibration
from onnxq.feeds import Feed, Feeds
from onnxq.model import Model
from onnxq.options import Options
from onnxq.passes.fit_bias import FitBias
from onnxq.passes.fit_pairs import needs_pairs
from onnxq.passes.node_samples import MOST_ROWS
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.plan import Plan
from onnxq.refine_blocks import refine_blocks
from onnxq.static import plan_static

REFINED = 64
Progress = Callable[[str, int, int], None]


def round_to_samples(
    model: Model,
    plan: Plan,
    samples: Feeds,
    options: Options,
    progress: Progress,
    *,
    rows: int = MOST_ROWS,
) -> tuple[Plan, tuple[str, ...]]:
    """`calibrate_weights` with the user's options.

    Raises: as `calibrate_weights`.
    """
    return calibrate_weights(
        model,
        plan,
        samples,
        measure=options.clip,
        rounding="nearest" if options.effort == "fast" else options.rounding,
        affine=options.affine,
        bias_correction=options.bias_correction,
        rows=rows,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Completes a plan by running the canonical float model on samples.

    `rows` of a node's input are looked at, at most.
    """

    options: Options
    samples: Calibration
    progress: Progress
    rows: int = MOST_ROWS

    def __call__(self, model: Model, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
        """The plan with what the samples tell, and notes for the user.

        Raises:
            CalibrationError: the model fails on a sample.
            ModelError: the model is larger than 2 GiB.
        """
        static = any(node.activations == "static" for node in plan.quantized)
        if static:
            plan = plan_static(model, plan, self.samples, self.options.ranges, self.progress)
            self._pin_pairs(model, plan)
        plan, notes = round_to_samples(
            model, plan, self.samples, self.options, self.progress, rows=self.rows
        )
        if self.options.effort == "high":
            plan, more = refine_blocks(model, plan, self._some(), progress=self.progress)
            notes += more
        if static:  # once more: a corrected bias may be larger
            plan = FitBias()(model, plan)
        return plan, notes

    def _some(self) -> list[Feed]:
        """At most REFINED samples, evenly spread: refining keeps tensors of all of them."""
        few = self.samples if len(self.samples) <= REFINED else self.samples.split(REFINED)[1]
        return list(few)

    def _pin_pairs(self, model: Model, plan: Plan) -> None:
        """Keep the roundings that cannot saturate; only their bias is calibrated."""
        for entry, (_, weight) in match_plan(model, plan):
            if needs_pairs(entry):
                series = node_series(weight, entry, plan)
                plan.integers[entry.name] = tuple(term.q.astype(np.int8) for term in series.terms)
