"""Planning, second step: the scales of each node's series, from the weight alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxq.errors import ConfigError
from onnxq.kernels_ref import Series
from onnxq.kernels_ref.partial import Coverage, partial_scales, realize_partial, restore_partial
from onnxq.model import Model
from onnxq.passes.stored_scales import storable
from onnxq.passes.weights import Candidate, Weight, candidates, check_finite
from onnxq.plan import NodePlan, Plan

Progress = Callable[[str, int, int], None]


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class SearchScales:
    """Fill in the scales that a plan does not have yet.

    Given:   NodePlan with bits, terms, series, granularity, centre, offset; plan.points[name]
    Result:  plan.scales[name], one array per term; plan.offsets[name]
    """

    progress: Progress = no_progress

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """`plan` with all scales; `model` is only read.

        Raises:
            ConfigError: the plan was made for another model.
        """
        sites = match_plan(model, plan)
        shared: dict[tuple[object, ...], str] = {}
        for i, (node, (_, weight)) in enumerate(sites):
            self.progress("planning", i, len(sites))
            if node.name in plan.scales:
                continue
            points = plan.points.get(node.name)
            key = (
                id(weight.tensor),
                weight.split,
                weight.out_axes,
                node.scales_key(),
                node.form,
                None if points is None else points.tobytes(),
            )
            if key in shared:  # a weight that several nodes share is searched once
                plan.scales[node.name] = plan.scales[shared[key]]
                if node.offset:
                    plan.offsets[node.name] = plan.offsets[shared[key]]
                continue
            shared[key] = node.name
            _search(weight, node, plan)
        self.progress("planning", len(sites), len(sites))
        return plan


def _search(weight: Weight, node: NodePlan, plan: Plan) -> None:
    try:
        offset, scales = partial_scales(
            node.series,
            weight.matrix(),
            node_coverage(weight, node, plan),
            bits=node.bits,
            terms=node.terms,
            granularity=node.matrix_granularity(),
        )
    except ValueError as error:
        raise _unfit(node, error) from None
    plan.scales[node.name] = storable(scales, node)
    if offset is not None:
        plan.offsets[node.name] = offset


def node_coverage(weight: Weight, node: NodePlan, plan: Plan) -> Coverage:
    """Which part of the weight, as a matrix [out, in], each term of a node covers."""
    centre = None
    if node.centre:  # the columns are channels times taps
        taps = math.prod(weight.shape[2:])
        centre = np.arange(weight.shape[1]) * taps + taps // 2
    return Coverage(plan.points.get(node.name), centre, node.offset)


def node_series(weight: Weight, node: NodePlan, plan: Plan) -> Series:
    """The terms of one node, as matrices [out, in].

    Raises:
        ConfigError: the plan's scales are of another shape, sign or ratio than the series needs,
            or its points or offset do not fit.
    """
    scales, granularity = plan.scales[node.name], node.matrix_granularity()
    shape = (weight.out, weight.size // weight.out)
    integers, offset = plan.integers.get(node.name), plan.offsets.get(node.name)
    try:
        coverage = node_coverage(weight, node, plan)
        if integers is not None:
            return restore_partial(
                node.series,
                integers,
                scales,
                coverage,
                offset,
                shape=shape,
                bits=node.bits,
                granularity=granularity,
            )
        return realize_partial(
            node.series,
            weight.matrix(),
            scales,
            coverage,
            offset,
            bits=node.bits,
            granularity=granularity,
        )
    except ValueError as error:
        raise _unfit(node, error) from None


def _unfit(node: NodePlan, error: ValueError) -> ConfigError:
    return ConfigError(
        f"plan: the numbers of node {node.name!r} do not fit: {error}; delete its .npz to have "
        "them searched again"
    )


def match_plan(model: Model, plan: Plan) -> list[tuple[NodePlan, tuple[Candidate, Weight]]]:
    """What the plan will do, in graph order: each entry with its place in the model.

    Raises:
        ConfigError: the plan was made for another model; names the first node that differs.
    """
    places = {c.name: c for c in candidates(model, embeddings=True)}
    matched = {
        entry.name: (entry, _match(entry, places.get(entry.name))) for entry in plan.quantized
    }
    return [matched[name] for name in places if name in matched]


def _match(entry: NodePlan, candidate: Candidate | None) -> tuple[Candidate, Weight]:
    if candidate is None or candidate.node.op != entry.op_type:
        raise _other_model(f"it has no {entry.op_type} node {entry.name!r}")
    found = candidate.found
    if isinstance(found, str):
        raise _other_model(f"node {entry.name!r} cannot be quantized: {found}")
    if found.shape != tuple(entry.shape):
        raise _other_model(
            f"the weight of node {entry.name!r} is {list(found.shape)}, not {list(entry.shape)}"
        )
    if not entry.crc32:  # written by hand
        check_finite(entry.name, candidate.node, found)
    elif found.crc32() != entry.crc32:
        raise _other_model(f"the weight of node {entry.name!r} has other values")
    return candidate, found


def _other_model(difference: str) -> ConfigError:
    return ConfigError(
        f"the plan was made for another model: {difference}; make a new one with --plan-out"
    )
