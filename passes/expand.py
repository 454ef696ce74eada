"""Graph + plan -> graph with basis nodes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from onnxq.errors import ConfigError
from onnxq.model import Model
from onnxq.passes.add_bias import add_bias
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Builder, Names
from onnxq.passes.lower_dynamic import dynamic_pair, lower_dynamic
from onnxq.passes.lower_float import lower_float
from onnxq.passes.lower_nbits import lower_nbits
from onnxq.passes.lower_static import StaticQuantizer, is_parallel, lower_static
from onnxq.passes.quantize_activations import ActivationQuantizer
from onnxq.passes.search_scales import Progress, match_plan, no_progress, node_series
from onnxq.passes.site import Site
from onnxq.passes.stored_terms import PACKED_BITS, StoredTerms
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan


def required_opset(plan: Plan) -> int:
    """The lowest default-domain opset in which the plan's forms exist.

    Cast and constants of INT4/UINT4: opset 21. DequantizeLinear with one scale per channel: 13.
    BitShift, for bits in bytes, and ScatterND and Pad, for terms of a part: 11. Slice with its
    ends as inputs, which cuts off the padding of the last block: 10. Cast of int8 and Mul with
    broadcasting: 7.
    """
    return max(
        (_required_opset(node, partial=node.name in plan.points) for node in plan.quantized),
        default=7,
    )


def _required_opset(node: NodePlan, *, partial: bool) -> int:
    if node.form == "nbits" or (node.bits <= PACKED_BITS and node.packing == "int4"):
        return 21
    if node.activations != "none":
        return 13
    if node.bits < 8 or partial or node.centre:
        return 11
    return 10 if node.block_size else 7


@dataclass(eq=False)
class _OfGraph:
    """What the nodes of one graph share."""

    static: StaticQuantizer
    dynamic: ActivationQuantizer = field(default_factory=ActivationQuantizer)
    scalars: dict[str, Any] = field(default_factory=dict)


def _has_products(entry: NodePlan) -> bool:
    """Whether a node becomes ConvInteger or MatMulInteger."""
    static = entry.activations == "static" and is_parallel(entry)
    return static or entry.activations == "dynamic"


@dataclass(frozen=True)
class Expand:
    """Decompose each planned node into basis nodes summed by Add nodes.

    Given:   Conv | ConvTranspose | MatMul … with a constant weight, and its NodePlan with scales
    Result:  one basis node per term (parallel) or one node with the summed terms (merged)
    """

    plan: Plan
    progress: Progress = no_progress

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place; its opset must be at least `required_opset(plan)`.

        Raises:
            ConfigError: the plan was made for another model.
        """
        sites = match_plan(model, self.plan)
        names = Names(model)
        stored: dict[tuple[object, ...], StoredTerms] = {}
        made: dict[int, _OfGraph] = {}
        for done, (entry, (candidate, weight)) in enumerate(sites):
            self.progress("expanding", done, len(sites))
            graph, node = candidate.graph, candidate.node
            of_graph = made.setdefault(id(graph), _OfGraph(StaticQuantizer(self.plan.ranges)))
            terms = self._stored(stored, weight, entry)
            builder = Builder(graph, node, names, "expand", of_graph.scalars)
            if entry.name in self.plan.bias:
                self._correct(model, node, builder, weight, entry.name)
            site = Site(graph, node, terms, entry, builder)
            if entry.activations == "dynamic":
                lower_dynamic(site, of_graph.dynamic)
            elif entry.activations == "static":
                lower_static(site, self.plan.ranges, of_graph.static)
            elif entry.form == "nbits":
                lower_nbits(site)
            else:
                lower_float(site)
        self.progress("expanding", len(sites), len(sites))
        return PassResult(
            tuple(entry.name for entry, _ in sites),
            {node.name: node.reason for node in self.plan.nodes if node.reason},
        )

    def _correct(
        self, model: Model, node: gs.Node, builder: Builder, weight: Weight, name: str
    ) -> None:
        delta = self.plan.bias[name]
        if delta.shape != (weight.out,):
            raise ConfigError(
                f"plan: the bias of node {name!r} has shape {list(delta.shape)}, not "
                f"[{weight.out}]; delete its .npz to have it made again"
            )
        if node.op != "MatMul":
            shape: tuple[int, ...] = (-1, *(1 for _ in weight.shape[2:]))
        elif weight.slot == 1 and len(weight.shape) == 2:
            shape = (-1,)
        else:
            shape = weight.channel_shape()
        add_bias(model, node, builder, delta, shape)

    def _stored(
        self, stored: dict[tuple[object, ...], StoredTerms], weight: Weight, entry: NodePlan
    ) -> StoredTerms:
        """The terms of a weight, made once per way in which they are stored."""
        key = (
            id(weight.tensor),
            weight.split,
            weight.out_axes,
            entry.op_type,  # ConvInteger and MatMulInteger take other integer types
            entry.activations,
            str(dynamic_pair(entry)) if _has_products(entry) else entry.target,
            entry.layout,
            entry.packing,
            entry.scales_key(),
            *(scale.tobytes() for scale in self.plan.scales[entry.name]),
            *(zlib.crc32(q.data) for q in self.plan.integers.get(entry.name, ())),
            *(
                made[entry.name].tobytes() if entry.name in made else b""
                for made in (self.plan.points, self.plan.offsets)
            ),
        )
        if key not in stored:
            series = node_series(weight, entry, self.plan)
            stored[key] = StoredTerms(weight, entry, series)
        return stored[key]
