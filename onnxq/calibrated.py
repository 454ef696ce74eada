"""What planning does with calibration samples, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnxq.calibration import Calibration
from onnxq.model import Model
from onnxq.options import Options
from onnxq.plan import Plan

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Completes a plan by running the canonical float model on samples."""

    options: Options
    samples: Calibration | None
    progress: Progress

    def __call__(self, model: Model, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
        """The plan with what the samples tell, and notes for the user."""
        return plan, ()
