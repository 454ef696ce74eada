"""Planning: the centre tap of kernels folded from branches as a coarse term of its own (CFWS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.partial import partial_scales, realize_partial
from onnxq.model import Model
from onnxq.passes.search_scales import match_plan, node_coverage
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]

# How many times as much as its bytes a term of the centre must gain: ordinary kernels reach 1.9.
MARGIN = 2.0


@dataclass(frozen=True)
class ChooseCentre:
    """Plan a term of the centre tap where it pays for its bytes.

    In a kernel folded from branches the centre tap carries the 1×1 and identity branches, is far
    larger than the other taps, and takes the scale from them.

    Given:   NodePlan of a Conv with a kernel of odd size, n terms, for which no numbers are planned
    Result:  centre, n + 1 terms of which the first holds the centre tap alone, and no offset

    A term of b bits that covers one of k taps costs b/k bits per weight. Spent on all weights they
    would divide the squared error by 4^(b/k); twice as much the centre term has to gain at least.

    Attributes:
        always: every node that can have one gets it.
    """

    always: bool = False

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """A new plan; `model` and `plan` are only read.

        Raises:
            ConfigError: the plan was made for another model.
        """
        chosen = {}
        for entry, (candidate, weight) in match_plan(model, plan):
            if entry.name in plan.scales or entry.name in plan.points or candidate.inner:
                continue
            centred = _centred(entry)
            if centred is not None and (self.always or _pays(weight, entry, centred)):
                chosen[entry.name] = centred
        nodes = [chosen.get(node.name, node) for node in plan.nodes]
        numbers = {key: dict(getattr(plan, key)) for key in ("scales", "offsets")}
        return plan.model_copy(update={"nodes": nodes, **numbers})


def _centred(entry: NodePlan) -> NodePlan | None:
    """The entry with a term of the centre, or None where there cannot be one."""
    if entry.centre:
        return None
    # As a further term it lies outside of what makes digits of the others.
    series = "fixed_ratio" if entry.terms == 1 else entry.series
    fields = {"centre": True, "offset": False, "terms": entry.terms + 1, "series": series}
    try:
        return NodePlan(**{**entry.model_dump(), **fields})
    except ValueError:  # NodePlan knows where a centre makes sense
        return None


def _pays(weight: Weight, entry: NodePlan, centred: NodePlan) -> bool:
    matrix = weight.matrix()
    by_bytes = 4 ** (entry.bits / math.prod(weight.shape[2:]))
    before, after = (_error(weight, matrix, each) for each in (entry, centred))
    return before > MARGIN * by_bytes * after


def _error(weight: Weight, matrix: Array, entry: NodePlan) -> float:
    """Sum over the rows of squared error / squared weights."""
    coverage = node_coverage(weight, entry, Plan(nodes=[entry]))
    granularity = entry.matrix_granularity()
    offset, scales = partial_scales(
        entry.series,
        matrix,
        coverage,
        bits=entry.bits,
        terms=entry.terms,
        granularity=granularity,
    )
    series = realize_partial(
        entry.series, matrix, scales, coverage, offset, bits=entry.bits, granularity=granularity
    )
    rest = np.square(matrix - series.dequantize()).sum(axis=1, dtype=np.float64)
    size = np.square(matrix).sum(axis=1, dtype=np.float64)
    return float((rest / np.where(size > 0, size, 1.0)).sum())
