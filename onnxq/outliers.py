"""Outlier columns of MatMul inputs, looked for on whatever inputs are at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnxq.errors import CalibrationError, ModelError, ValidationError
from onnxq.feeds import Feed
from onnxq.model import Model
from onnxq.observing import observer
from onnxq.passes.choose_outliers import ChooseOutliers
from onnxq.plan import Plan


@dataclass(frozen=True, eq=False)
class Outliers:
    """Completes a plan with the columns that stay in float (docs/series.md).

    Made-up inputs will do: which channels reach far is a property of the model.

    Attributes:
        feeds: inputs that the float model runs on.
        most: columns of one tensor at most.
    """

    feeds: Iterable[Feed]
    most: int

    def __call__(self, model: Model, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
        """The plan with outlier columns where they pay, and a note of them."""
        wanted = ("MatMul", "dynamic")
        if not any((node.op_type, node.activations) == wanted for node in plan.quantized):
            return plan, ()
        try:
            plan = ChooseOutliers(observer(model, self.feeds, _failing), self.most)(model, plan)
        except (CalibrationError, ModelError, ValidationError) as error:
            return plan, (f"outlier columns were not looked for: {error}",)
        found = [node for node in plan.quantized if node.outliers]
        if not found:
            return plan, ()
        columns = sum(len(node.outliers) for node in found)
        return plan, (f"{len(found)} MatMuls have {columns} outlier columns in float",)


def _failing(index: int, error: ValidationError) -> CalibrationError:
    return CalibrationError(f"the float model fails on input {index} ({error})")
