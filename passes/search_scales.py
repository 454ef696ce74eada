"""Planning, second step: the scales of each node's series, from the weight alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxq.errors import ConfigError
from onnxq.kernels_ref import Series, realize, series_scales
from onnxq.model import Model
from onnxq.passes.select_nodes import weighted_nodes
from onnxq.passes.weights import Weight, find_weight
from onnxq.plan import NodePlan, Plan

Progress = Callable[[str, int, int], None]


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class SearchScales:
    """Fill in the scales that a plan does not have yet.

    Given:   NodePlan with bits, terms, series, granularity
    Result:  plan.scales[name], one array per term
    """

    progress: Progress = no_progress

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """`plan` with all scales; `model` is only read.

        Raises:
            ConfigError: the plan was made for another model.
        """
        weights = match_plan(model, plan)
        todo = plan.quantized
        shared: dict[tuple[int, bool, str], str] = {}
        for i, node in enumerate(todo):
            self.progress("planning", i, len(todo))
            if node.name in plan.scales:
                continue
            weight = weights[node.name]
            key = (id(weight.tensor), weight.out_last, node.scales_key())
            if key in shared:  # a weight that several nodes share is searched once
                plan.scales[node.name] = plan.scales[shared[key]]
                continue
            shared[key] = node.name
            plan.scales[node.name] = series_scales(
                node.series,
                weight.matrix(),
                bits=node.bits,
                terms=node.terms,
                granularity=node.matrix_granularity(),
            )
        self.progress("planning", len(todo), len(todo))
        return plan


def node_series(weight: Weight, node: NodePlan, plan: Plan) -> Series:
    """The terms of one node, as matrices [out, in]."""
    return realize(
        node.series,
        weight.matrix(),
        plan.scales[node.name],
        bits=node.bits,
        granularity=node.matrix_granularity(),
    )


def match_plan(model: Model, plan: Plan) -> dict[str, Weight]:
    """The weights that a plan speaks of.

    Raises:
        ConfigError: the plan was made for another model; names the first node that differs.
    """
    nodes: dict[str, gs.Node] = {node.name: node for node in weighted_nodes(model)}
    weights: dict[str, Weight] = {}
    for entry in plan.quantized:
        node = nodes.get(entry.name)
        if node is None or node.op != entry.op_type:
            raise _other_model(f"it has no {entry.op_type} node {entry.name!r}")
        found = find_weight(model, node)
        if isinstance(found, str):
            raise _other_model(f"node {entry.name!r} cannot be quantized: {found}")
        if found.shape != tuple(entry.shape):
            raise _other_model(
                f"the weight of node {entry.name!r} is {list(found.shape)}, not {list(entry.shape)}"
            )
        if entry.crc32 and found.crc32() != entry.crc32:
            raise _other_model(f"the weight of node {entry.name!r} has other values")
        weights[entry.name] = found
    return weights


def _other_model(difference: str) -> ConfigError:
    return ConfigError(
        f"the plan was made for another model: {difference}; make a new one with --plan-out"
    )
