"""The way of a model through the house: canonicalize, plan, expand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from onnxq.errors import ConfigError, ModelError
from onnxq.model import Model, graphs, raise_opset
from onnxq.passes import (
    PIPELINE,
    Equalize,
    Expand,
    FitBias,
    FitPairs,
    GraphPass,
    InsertQDQ,
    PassResult,
    SearchScales,
    SelectNodes,
    SplitBatchNorm,
    SplitHardSwish,
    required_opset,
    signature,
    verify,
)
from onnxq.passes.channel_statistics import ChannelMoments, channel_statistics
from onnxq.passes.choose_centre import ChooseCentre
from onnxq.passes.weights import candidates
from onnxq.plan import NodePlan, Plan
from onnxq.without_data import complete as complete_without_data

Progress = Callable[[str, int, int], None]
Complete = Callable[[Model, Plan], tuple[Plan, tuple[str, ...]]]


@dataclass(frozen=True)
class Rewritten:
    """A model with basis nodes, the plan that made it, what each pass did, and what it left."""

    model: Model
    plan: Plan
    passes: Mapping[str, PassResult] = field(default_factory=dict)
    unfolded: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Choose(Protocol):
    """Chooses bits and terms; `finish` is what is done to a plan afterwards."""

    def __call__(
        self, model: Model, plan: Plan, finish: Callable[[Model, Plan], Plan] | None
    ) -> tuple[Plan, tuple[str, ...]]:
        """The plan, and notes for the user."""
        ...


def canonicalize(
    model: Model, statistics: dict[str, ChannelMoments] | None = None
) -> dict[str, PassResult]:
    """Run the exact float folds of PIPELINE, in place, verifying after each.

    Args:
        model: the float model.
        statistics: gets what BatchNormalization tells about tensors, before it is folded.

    Raises:
        PassError: a pass broke the graph.
    """
    results = {}
    for pass_ in PIPELINE:
        if statistics is not None and isinstance(pass_, SplitBatchNorm):
            statistics.update(channel_statistics(model))
        results[type(pass_).__name__] = apply(pass_, model)
    return results


def unfolded(passes: Mapping[str, PassResult], model: Model) -> dict[str, str]:
    """What the folds left alone, and why: node -> "pass: reason".

    A node that a later pass has folded after all is not listed.
    """
    there = {node.name for _, graph in graphs(model) for node in graph.nodes}
    return {
        node: f"{name}: {reason}"
        for name, result in passes.items()
        for node, reason in result.skipped.items()
        if node in there
    }


def apply(pass_: GraphPass, model: Model) -> PassResult:
    """Run one pass and verify what it left.

    Raises:
        PassError: the pass broke the graph.
    """
    before = signature(model)
    result = pass_(model)
    verify(model, before, type(pass_).__name__)
    return result


def rewrite(
    model: Model,
    select: SelectNodes,
    plan: Plan | None,
    progress: Progress,
    *,
    equalize: bool = False,
    centre: ChooseCentre | None = None,
    points: Complete | None = None,
    choose: Choose | None = None,
    priors: bool = False,
    complete: Sequence[Complete] = (),
) -> Rewritten:
    """Canonicalize, plan (or take the given plan) and expand. `model` is used up.

    Args:
        model: the float model.
        select: what to plan.
        plan: what to do instead of planning.
        progress: called with (what, done, total).
        equalize: even out the channels of neighbouring layers before planning.
        centre: chooses selected nodes whose centre tap gets a term of its own.
        points: gives the output channels of selected nodes different numbers of terms.
        choose: chooses bits and terms of the selected nodes.
        priors: round and correct what planning has no numbers for; see `without_data`.
        complete: what fills in a plan that has scales, by running the canonical model.

    Raises:
        ModelError: no node can be quantized, a weight is not finite, or the opset cannot be raised.
        ConfigError: the plan was made for another model, its scales do not fit, or a glob matches
            nothing.
    """
    statistics: dict[str, ChannelMoments] = {}
    passes = canonicalize(model, statistics if priors else None)
    if equalize or (plan is not None and plan.equalized):
        passes["Equalize"] = apply(Equalize(), model)
        statistics.clear()  # its tensors have other values now
    if select.activations == "static" if plan is None else _is_static(plan):
        passes["SplitHardSwish"] = apply(SplitHardSwish(), model)
    left = unfolded(passes, model)
    chosen = select(model) if plan is None else _with_the_rest(plan, model)
    if "Equalize" in passes:
        chosen = chosen.model_copy(update={"equalized": True})
    if not chosen.quantized:
        raise _nothing_to_do(chosen)
    if plan is None and centre is not None:
        chosen = centre(model, chosen)
    given = set() if plan is None else set(plan.scales)
    notes: tuple[str, ...] = ()
    if plan is None and points is not None:
        chosen, notes = points(model, chosen)
    if plan is None and choose is not None:
        finish = partial(_with_priors, statistics) if priors else None
        chosen, notes = choose(model, chosen, finish)
        if finish is not None:  # found once more below, with a note
            chosen = chosen.model_copy(update={"integers": {}, "bias": {}})
    found_before = set(chosen.scales)
    chosen = SearchScales(progress)(model, chosen)
    if priors and not _is_static(chosen):
        names = set(chosen.scales) - given
        chosen, more = complete_without_data(model, chosen, statistics, names)
        notes += more
    for step in complete:
        chosen, more = step(model, chosen)
        notes += more
    if plan is not None and set(chosen.scales) - found_before and _is_static(chosen):
        chosen = FitBias()(model, FitPairs()(model, chosen))
    model = raise_opset(model, required_opset(chosen))
    passes["Expand"] = apply(Expand(chosen, progress), model)
    if _is_static(chosen):
        passes["InsertQDQ"] = apply(InsertQDQ(chosen), model)
    return Rewritten(model, chosen, passes, left, notes)


def _is_static(plan: Plan) -> bool:
    return any(node.activations == "static" for node in plan.quantized)


def _with_the_rest(plan: Plan, model: Model) -> Plan:
    """The plan, and an entry with a reason for each candidate that it does not mention."""
    planned = {node.name for node in plan.nodes}
    rest = [
        NodePlan(name=c.name, op_type=c.node.op, reason="not in the plan")
        for c in candidates(model)
        if c.name not in planned
    ]
    return plan.model_copy(update={"nodes": [*plan.nodes, *rest]})


def _nothing_to_do(plan: Plan) -> ModelError | ConfigError:
    if not plan.nodes:
        return ModelError("nothing to quantize: the model has no Conv, MatMul or Gemm")
    reasons = sorted({node.reason for node in plan.nodes if node.reason})
    more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
    return ModelError(
        f"nothing to quantize: all {len(plan.nodes)} candidate nodes are left alone: "
        f"{reasons[0]}{more}; see `onnxq inspect`"
    )


def _with_priors(statistics: Mapping[str, ChannelMoments], model: Model, plan: Plan) -> Plan:
    return complete_without_data(model, SearchScales()(model, plan), statistics)[0]
