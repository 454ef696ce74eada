"""Planning: which columns of the inputs of MatMuls are multiplied in float, from their ranges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq.kernels_ref.outliers import choose_columns, column_ranges
from onnxq.model import Model
from onnxq.passes.observation import Array, Observe, is_float
from onnxq.passes.search_scales import match_plan
from onnxq.plan import NodePlan, Plan


@dataclass(frozen=True)
class ChooseOutliers:
    """Fill in the outlier columns of the MatMuls whose input has some.

    Given:   NodePlan of a MatMul by a matrix with activations dynamic, and no offset
    Result:  NodePlan.outliers, where it shrinks the range of what is quantized enough to pay

    The samples need not be real: which channels reach far is a property of the model, and what is
    chosen wrongly costs accuracy gained, never correctness. Weights alone do not tell, as ranges
    estimated through them are too far off (docs/series.md).

    Attributes:
        observe: the values of inner tensors of the canonical float model, on any samples.
        most: columns of one tensor at most.
    """

    observe: Observe
    most: int = 8

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """The plan with outliers; `model` is only read. Nodes that have some keep theirs.

        Raises:
            ConfigError: the plan was made for another model.
        """
        inputs = {
            entry.name: candidate.node.inputs[0].name
            for entry, (candidate, weight) in match_plan(model, plan)
            # tensors of bodies cannot be observed
            if _may_have_outliers(entry) and weight.slot == 1 and not candidate.inner
        }
        ranges: dict[str, tuple[Array, Array]] = {}
        for values in self.observe(list(dict.fromkeys(inputs.values()))):
            for name, value in values.items():
                _widen(ranges, name, value)
        chosen = {
            name: tuple(map(int, choose_columns(rmin, rmax, most=self.most)))
            for name, (rmin, rmax) in ranges.items()
        }
        nodes = [
            node.model_copy(update={"outliers": chosen[inputs[node.name]]})
            if chosen.get(inputs.get(node.name, ""))
            else node
            for node in plan.nodes
        ]
        return plan.model_copy(update={"nodes": nodes})


def _may_have_outliers(entry: NodePlan) -> bool:
    return (
        entry.op_type == "MatMul"
        and entry.activations == "dynamic"
        and len(entry.shape) == 2
        and not entry.offset
        and not entry.outliers
    )


def _widen(ranges: dict[str, tuple[Array, Array]], name: str, value: Array) -> None:
    if not is_float(value) or not np.isfinite(value).all():
        return
    rmin, rmax = column_ranges(value)
    if name in ranges:
        rmin, rmax = np.minimum(rmin, ranges[name][0]), np.maximum(rmax, ranges[name][1])
    ranges[name] = rmin, rmax
