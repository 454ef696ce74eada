"""The way of a model through the house: canonicalize, plan, expand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
    SplitHardSwish,
    required_opset,
    signature,
    verify,
)
from onnxq.passes.weights import candidates
from onnxq.plan import NodePlan, Plan

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


def canonicalize(model: Model) -> dict[str, PassResult]:
    """Run the exact float folds of PIPELINE, in place, verifying after each.

    Raises:
        PassError: a pass broke the graph.
    """
    return {type(pass_).__name__: apply(pass_, model) for pass_ in PIPELINE}


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
    choose: Complete | None = None,
    complete: Sequence[Complete] = (),
) -> Rewritten:
    """Canonicalize, plan (or take the given plan) and expand. `model` is used up.

    Args:
        model: the float model.
        select: what to plan.
        plan: what to do instead of planning.
        progress: called with (what, done, total).
        equalize: even out the channels of neighbouring layers before planning.
        choose: chooses bits and terms of the selected nodes.
        complete: what fills in a plan that has scales, by running the canonical model.

    Raises:
        ModelError: no node can be quantized, a weight is not finite, or the opset cannot be raised.
        ConfigError: the plan was made for another model, its scales do not fit, or a glob matches
            nothing.
    """
    passes = canonicalize(model)
    if equalize or (plan is not None and plan.equalized):
        passes["Equalize"] = apply(Equalize(), model)
    if select.activations == "static" if plan is None else _is_static(plan):
        passes["SplitHardSwish"] = apply(SplitHardSwish(), model)
    left = unfolded(passes, model)
    chosen = select(model) if plan is None else _with_the_rest(plan, model)
    if "Equalize" in passes:
        chosen = chosen.model_copy(update={"equalized": True})
    if not chosen.quantized:
        raise _nothing_to_do(chosen)
    notes: tuple[str, ...] = ()
    if plan is None and choose is not None:
        chosen, notes = choose(model, chosen)
    found_before = set(chosen.scales)
    chosen = SearchScales(progress)(model, chosen)
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
