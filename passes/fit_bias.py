"""Planning, static compute: scales with which every bias fits into int32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.model import Model, values
from onnxq.passes.lower_static import has_constant_bias, input_scale, is_parallel
from onnxq.passes.ranks import Shape, tensor_shapes
from onnxq.passes.search_scales import match_plan
from onnxq.passes.static_matmul import bias_add, bias_of, is_gemm
from onnxq.plan import Plan

# The products beside it have room, and a bias correction has too.
LARGEST_BIAS = 2.0**30

# Far from float32's smallest normal number, also when multiplied by the scale of an activation.
SMALLEST_SCALE = 1e-30

FloatArray = npt.NDArray[Any]


@dataclass(frozen=True)
class FitBias:
    """Choose the weight scales of channels whose bias int32 would not hold well.

    Given:   conv1(x, W, b), static, whose bias is stored in steps of scale(x)·scale(W)
    Result:  plan.scales, raised where |b| is more than 2^30 steps; and set so that |b| is at most
             2^30 steps where the weights are all zero, whose scale says nothing about the bias

    A channel whose scale is raised loses bits of its weights, but they are too small to count: with
    K products of 255 levels, half a new step is at most K·255/2^31·|b| of the output, 0.0005·|b|
    for K = 4608, and the output itself is rounded to steps of more than |b|/255.
    """

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """`plan` with its scales and integers made to fit; `model` is only read.

        Raises:
            ConfigError: the plan was made for another model, or lacks a range.
        """
        shapes = tensor_shapes(model)
        for entry, (candidate, weight) in match_plan(model, plan):
            bias = _bias(model, candidate.node, shapes)
            if entry.activations != "static" or is_parallel(entry) or bias is None:
                continue
            bias = bias + plan.bias.get(entry.name, np.zeros(weight.out, np.float32))
            least = np.abs(bias.astype(np.float64)) / LARGEST_BIAS
            least /= input_scale(entry.name, candidate.node.inputs[0].name, plan.ranges)
            dead = ~weight.matrix().any(axis=1)
            _fit(plan, entry.name, np.maximum(least, SMALLEST_SCALE), dead & (least > 0))
        return plan


def _bias(model: Model, node: gs.Node, shapes: Mapping[str, Shape]) -> FloatArray | None:
    """The bias that is stored as int32, or None."""
    if node.op == "Conv" and has_constant_bias(node):
        return values(node.inputs[2])
    add = bias_add(model, node) if node.op == "MatMul" else None
    if add is None or not is_gemm(model, node, shapes):
        return None
    return bias_of(node, add).reshape(-1)


def _fit(plan: Plan, name: str, least: FloatArray, dead: npt.NDArray[np.bool_]) -> None:
    """Bring the last, finest, term's scales to `least`, all terms' by one factor per channel."""
    scales = plan.scales[name]
    # A power of two keeps the ratios between the terms exact.
    factor = np.exp2(np.ceil(np.log2(least / scales[-1].astype(np.float64))))
    factor = np.where(dead, factor, np.maximum(factor, 1.0))
    if scales[-1].ndim == 0:  # per tensor: the channels cannot differ
        factor = np.maximum(factor, 1.0).max()
    if (factor == 1.0).all():
        return
    plan.scales[name] = tuple((s * factor).astype(s.dtype) for s in scales)
    if name in plan.integers:
        # A channel whose bias is that large has weights that round away; see above.
        rows = np.broadcast_to(factor, (len(least),))[:, None]
        plan.integers[name] = tuple(np.rint(q / rows).astype(np.int8) for q in plan.integers[name])
