"""Static integer compute: one integer kernel per node, from Q/DQ pairs that onnxruntime fuses.

The integer weight is brought to 8 bits by nodes on constants alone, which run once, at load: a
4-bit file runs at 8-bit speed. Its DequantizeLinear states the zero point, which QGemm asks for.
What quantizes the activations comes with InsertQDQ.

Several products cannot be fused so, of weight terms in parallel or of several activation terms:
their sum stands before the output is quantized. They take the nodes of dynamic compute, with the
scales of the activation's terms known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import ConfigError
from onnxq.kernels_ref import activation_params
from onnxq.kernels_ref.activation_series import residual_step
from onnxq.model import is_constant, values
from onnxq.passes.edit import Builder
from onnxq.passes.fit_pairs import is_depthwise, needs_pairs, pairs_fit, places
from onnxq.passes.forms import (
    SAFE_BITS,
    IntType,
    Operator,
    TypePair,
    type_pair,
    weight_zero_point,
)
from onnxq.passes.lower_dynamic import lower_dynamic
from onnxq.passes.quantize_activations import ActivationQuantizer, Quantized
from onnxq.passes.site import Site
from onnxq.plan import NodePlan, Range

Array = npt.NDArray[Any]

_INT32 = np.iinfo(np.int32)


def lower_static(
    site: Site, ranges: Mapping[str, Range], quantizer: StaticQuantizer | None = None
) -> None:
    """Replace a node by one that reads dequantized integers.

    Given:   conv1(x, W, b)
    Result:  W/term0/q -> Cast -> DequantizeLinear; b as int32 -> DequantizeLinear;
             conv1/term0 (or conv1/merged) = Conv(x, …, …)

    Args:
        site: the node.
        ranges: of the plan.
        quantizer: of the graph, so that several nodes share the terms of what they all read.

    Raises:
        ConfigError: the plan has no range for x, or the bias does not fit into int32.
    """
    node, builder, plan, stored = site.node, site.builder, site.plan, site.stored
    if is_parallel(plan):
        input_range(plan.name, node.inputs[0].name, ranges)
        lower_dynamic(site, quantizer or StaticQuantizer(ranges))
        return
    count = len(stored.series)
    group = tuple(range(count))
    name = f"{site.name}/merged" if count > 1 else f"{site.name}/term0"
    pair = static_pair(site)
    zero_point = weight_zero_point(pair.weight, plan.bits * count)
    weight = stored.integer_weight(
        builder, group, signed=pair.weight == "int8", zero_point=zero_point
    )
    out = stored.weight.out
    scale = stored.channel_scale(builder, count - 1, (out,))
    zeros = np.full(out, zero_point, np.dtype(pair.weight))
    axis = 0 if node.op == "Conv" else 1
    inputs = [
        node.inputs[0],
        builder.add(
            "DequantizeLinear",
            f"{name}/weight",
            [weight, scale, builder.constant(f"{name}/weight/zero_point", zeros)],
            attrs={"axis": axis},
        ),
    ]
    if len(node.inputs) > 2 and node.inputs[2].name:
        x_scale = input_scale(site.name, node.inputs[0].name, ranges)
        bias = values(node.inputs[2])
        inputs.append(static_bias(site.builder, name, bias, x_scale * values(scale)))
    builder.add(
        node.op,
        name,
        inputs,
        attrs=node.attrs,
        output=site.remove(),
        metadata=site.basis_metadata(group),
    )


def is_parallel(plan: NodePlan) -> bool:
    """Whether the node becomes several integer nodes, which write float."""
    return plan.activation_terms > 1 or (plan.terms > 1 and plan.layout == "parallel")


class StaticQuantizer(ActivationQuantizer):
    """Quantizes with scales that are known: constants where dynamic compute has nodes.

    The first term has the range of the plan, as every static tensor has; the others go on as those
    of `kernels_ref.activation_series`. What lies outside of the range saturates in all of them.
    """

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        super().__init__()
        self._ranges = ranges

    def term(
        self, builder: Builder, tensor: Any, kind: IntType, bits: int = 8, index: int = 0
    ) -> Quantized:
        """A term of an activation, in 8 bits; the arguments are those of the base class."""
        key = (id(tensor), kind, bits, index)
        if key not in self.done:
            if index:
                self.done[key] = self._residual_term(builder, tensor, kind, bits, index)
            else:
                self.done[key] = self._first_term(builder, tensor, kind)
        return self.done[key]

    def _first_term(self, builder: Builder, tensor: Any, kind: IntType) -> Quantized:
        rmin, rmax = self._ranges[tensor.name]
        scale, zero_point = activation_params(rmin, rmax, signed=kind == "int8")
        params = [builder.scalar(scale), builder.scalar(np.dtype(kind).type(zero_point))]
        q = builder.add("QuantizeLinear", f"{tensor.name}/{kind}", [tensor, *params])
        return Quantized(q, *params)

    def _residual_scale(self, builder: Builder, before: Any, bits: int, name: str) -> Any:
        """A constant too."""
        return builder.scalar(np.float32(values(before) * residual_step(bits)))


def static_pair(site: Site) -> TypePair:
    """The types of a static node's product."""
    plan, node = site.plan, site.node
    op: Operator = "Conv" if node.op == "Conv" else "MatMul"
    if is_depthwise(node, plan.shape):
        op = "DepthwiseConv"
    bits = plan.bits * plan.terms
    if needs_pairs(plan) and pairs_fit(site.stored.series.terms[0].q, places(plan)):
        bits = SAFE_BITS  # as exact as those
    return type_pair(op, "static", bits, plan.target)


def input_range(node: str, tensor: str, ranges: Mapping[str, Range]) -> Range:
    """The range of the activation that a static node reads.

    Raises:
        ConfigError: the plan has no range for it.
    """
    if tensor not in ranges:
        raise ConfigError(
            f"plan: no range for tensor {tensor!r}, which the static node {node!r} reads; make "
            "the plan again with --calibration"
        )
    return ranges[tensor]


def input_scale(node: str, tensor: str, ranges: Mapping[str, Range]) -> np.float32:
    """The scale of that activation; int8 and uint8 have the same.

    Raises:
        ConfigError: the plan has no range for it.
    """
    return activation_params(*input_range(node, tensor, ranges))[0]


def static_bias(builder: Builder, name: str, bias: Array, scale: Array) -> Any:
    """A constant bias, dequantized from int32.

    Args:
        builder: where to.
        name: of the node.
        bias: float32 [out].
        scale: float32 [out], of the node's products: onnxruntime takes no other.

    Raises:
        ConfigError: bias / scale passes int32; `fit_bias` chooses scales with which it does not.
    """
    q = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    if (q < _INT32.min).any() or (q > _INT32.max).any():
        raise ConfigError(
            f"plan: the bias of node {name!r} does not fit into int32 with the plan's scales and "
            "ranges; delete the plan's .npz to have the scales searched again"
        )
    constants = [
        builder.constant(f"{name}/bias/q", q.astype(np.int32)),
        builder.constant(f"{name}/bias/scale", scale.astype(np.float32)),
    ]
    return builder.add("DequantizeLinear", f"{name}/bias", constants, attrs={"axis": 0})


def has_constant_bias(node: Any) -> bool:
    """Whether a Conv has a bias that is known."""
    return len(node.inputs) > 2 and bool(node.inputs[2].name) and is_constant(node.inputs[2])
