"""What quantize has to say at the end, as data; the terminal and JSON both come from it."""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import BaseModel, ConfigDict

from onnxq.comparison import Comparison
from onnxq.passes.stored_scales import scale_bits
from onnxq.passes.stored_terms import stored_bits
from onnxq.pipeline import Rewritten
from onnxq.plan import NodePlan, Plan

FLOAT_BITS = 32


class Report(BaseModel):
    """The result of one `quantize`.

    `weight_bits` is stored bits per parameter, scales included, over all candidate nodes that have
    a constant weight, nodes left in float counted with 32; `planning` says what calibration did;
    `comparison` is None if not validated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    quantized: int
    kinds: dict[str, int]
    left_alone: dict[str, str]
    notes: dict[str, str]
    folded: dict[str, int]
    unfolded: dict[str, str]
    planning: tuple[str, ...]
    size_before: int
    size_after: int
    weight_bits: float
    opset_before: int
    opset_after: int
    comparison: Comparison | None
    warnings: tuple[str, ...]


def make_report(
    rewritten: Rewritten,
    *,
    sizes: tuple[int, int],
    opset_before: int,
    comparison: Comparison | None,
    warnings: tuple[str, ...],
) -> Report:
    """Put together what a run found out."""
    plan = rewritten.plan
    frozen = len(rewritten.passes["FreezeParameters"].rewritten)
    if frozen:
        warnings += (f"{frozen} weights were listed as graph inputs; they are fixed constants now",)
    return Report(
        quantized=len(plan.quantized),
        kinds=dict(
            Counter(describe(node, partial=node.name in plan.points) for node in plan.quantized)
        ),
        left_alone={node.name: node.reason for node in plan.nodes if node.reason},
        # a note says why a node is in float compute; an edited plan may have changed that
        notes={
            node.name: node.note
            for node in plan.quantized
            if node.note and node.activations == "none"
        },
        folded={
            name: len(result.rewritten)
            for name, result in rewritten.passes.items()
            if result.rewritten and name not in ("Expand", "NameNodes")
        },
        unfolded=dict(rewritten.unfolded),
        planning=rewritten.notes,
        size_before=sizes[0],
        size_after=sizes[1],
        weight_bits=weight_bits(plan),
        opset_before=opset_before,
        opset_after=rewritten.model.opset,
        comparison=with_size(comparison, sizes),
        warnings=warnings,
    )


def with_size(comparison: Comparison | None, sizes: tuple[int, int]) -> Comparison | None:
    """The comparison with its ratio of sizes (before, after) filled in."""
    if comparison is None:
        return None
    return comparison.model_copy(update={"size_ratio": sizes[1] / sizes[0]})


def describe(node: NodePlan, *, partial: bool = False) -> str:
    """One node's treatment in a few words; partial: some channels have fewer terms than others."""
    block = f" block {node.block_size}" if node.block_size else ""
    compute = _compute(node)
    terms = "1 to " if partial else ""
    terms += f"{node.terms} term{'s' if node.terms > 1 else ''} of {node.bits} bits"
    layout = f", {node.layout}" if node.terms > 1 else ""
    return f"{node.op_type}: {terms}{block}, {compute}{layout} ({node.series})"


def _compute(node: NodePlan) -> str:
    if node.activations == "none":
        return "float compute" if node.form == "folded" else "4-bit MatMul kernel"
    terms = f"{node.activation_terms} × " if node.activation_terms > 1 else ""
    return f"{terms}int{node.activation_bits} {node.activations}"


def weight_bits(plan: Plan) -> float:
    """Stored bits per parameter over the candidate nodes with a constant weight."""
    bits = parameters = 0.0
    for node in plan.nodes:
        count = float(np.prod(node.shape)) if node.shape else 0.0
        parameters += count
        if node.reason is not None:
            bits += FLOAT_BITS * count
            continue
        points = plan.points.get(node.name, np.array(node.terms))
        for covered in (count * float(np.mean(points > i)) for i in range(node.terms)):
            bits += stored_bits(node, int(covered)) * covered
        if node.name in plan.scales:
            share = float(np.mean(points)) / node.terms
            bits += scale_bits(node, plan.scales[node.name]) * share
    return bits / parameters if parameters else 0.0
