"""Planning, static compute: 8-bit weights that uint8·int8 kernels multiply exactly everywhere.

x86 without VNNI adds the products of two neighbours in 16 bits, which saturate (onnxruntime issue
6004). Weights of 7 bits make it exact, but more than is needed: only neighbours must be small
together, |w1 + w2| <= 128, since 255·128 < 2^15. That costs 0.3 to 0.7 bits instead of one
(measured on three classifiers), where uint8·uint8, exact too, takes about 1.4 times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.model import Model
from onnxq.passes.search_scales import match_plan
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]

FULL_BITS = 8
PAIR_LIMIT = 128


@dataclass(frozen=True)
class FitPairs:
    """Widen the scales of 8-bit weights until no two neighbours can saturate 16 bits.

    Given:   a static Conv or MatMul, one term of 8 bits, target cpu-avx2
    Result:  plan.scales with which `pairs_fit` holds, so that lower_static writes int8 weights

    Depthwise Convs need no such care, and integers that were not simply rounded are left alone.
    """

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """`plan` with its scales made to fit; `model` is only read.

        Raises:
            ConfigError: the plan was made for another model.
        """
        for entry, (candidate, weight) in match_plan(model, plan):
            if not needs_pairs(entry) or entry.name in plan.integers:
                continue
            if is_depthwise(candidate.node, entry.shape):
                continue
            largest = _largest_pair(weight.matrix(), places(entry))
            (scale,) = plan.scales[entry.name]
            least = largest / (PAIR_LIMIT - 1)  # each of the two may be rounded up by a half
            if scale.ndim == 0:
                least = least.max()
            plan.scales[entry.name] = (np.maximum(scale, least.astype(scale.dtype)),)
        return plan


def needs_pairs(entry: NodePlan) -> bool:
    """Whether int8 weights of a node could saturate where it runs."""
    return (
        entry.activations == "static"
        and entry.target == "cpu-avx2"
        and entry.terms == entry.activation_terms == 1
        and entry.bits == FULL_BITS
    )


def is_depthwise(node: gs.Node, shape: tuple[int, ...]) -> bool:
    """Whether a Conv has one input and one output channel per group."""
    group = int(node.attrs.get("group", 1))
    return node.op == "Conv" and group > 1 and group == shape[0] and shape[1] == 1


def places(entry: NodePlan) -> int:
    """Values of a kernel per channel: 1 for MatMul."""
    return int(np.prod(entry.shape[2:])) if entry.op_type == "Conv" else 1


def pairs_fit(q: Array, size: int) -> bool:
    """Whether the sums of all neighbours of an integer matrix [out, in] fit.

    Args:
        q: integers.
        size: places per channel, `in` being channels times places; neighbours are both those in
            this order and those in the order of channels-last layouts.
    """
    return bool((_largest_pair(q.astype(np.int64), size) <= PAIR_LIMIT).all())


def _largest_pair(matrix: Array, size: int) -> Array:
    """The largest magnitude, per row, of a value and of a sum of two neighbours of one sign."""
    out = len(matrix)
    turned = matrix.reshape(out, -1, size).swapaxes(1, 2).reshape(out, -1)
    largest = np.abs(matrix).max(axis=1)
    for order in (matrix, turned):
        one, other = order[:, :-1], order[:, 1:]
        sums = np.where((one > 0) == (other > 0), np.abs(one + other), 0)
        largest = np.maximum(largest, sums.max(axis=1, initial=0))
    return np.asarray(largest)
