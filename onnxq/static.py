"""Completing a plan with static activations: which tensors, which ranges, what stays float."""

from __future__ import annotations

from onnxq.calibration import Calibration
from onnxq.model import Model
from onnxq.observing import observer
from onnxq.passes.fit_bias import FitBias
from onnxq.passes.fit_pairs import FitPairs
from onnxq.passes.search_ranges import RangeMethod, SearchRanges
from onnxq.passes.search_scales import Progress, no_progress
from onnxq.passes.select_tensors import SelectTensors
from onnxq.plan import Plan


def plan_static(
    model: Model,
    plan: Plan,
    samples: Calibration,
    method: RangeMethod = "minmax",
    progress: Progress = no_progress,
    *,
    avoid_saturation: bool = True,
) -> Plan:
    """A plan with the ranges that its static nodes need, from calibration samples.

    Args:
        model: canonical float model; only read.
        plan: with scales (SearchScales); ranges that it has already are kept.
        samples: what the model is run on.
        method: how a range is chosen from the values of a tensor.
        progress: called with ("calibrating", runs done, runs in all).
        avoid_saturation: on CPUs whose fast kernels saturate, choose scales of 8-bit weights with
            which they do not; otherwise slower kernels keep the scales as they are.

    Static nodes that have to compute in float after all become `activations none`, and their note
    says why.

    Raises:
        ConfigError: the plan was made for another model.
        CalibrationError: the model fails on a sample.
    """
    selection = SelectTensors()(model, plan)
    nodes = [
        node.model_copy(
            update={"activations": "none", "note": f"float compute: {selection.left[node.name]}"}
        )
        if node.name in selection.left
        else node
        for node in plan.nodes
    ]
    plan = plan.model_copy(update={"nodes": nodes})
    if avoid_saturation:
        plan = FitPairs()(model, plan)
    observe = observer(model, samples, samples.failing)
    plan = SearchRanges(observe, method, progress, len(samples))(plan, selection)
    return FitBias()(model, plan)
