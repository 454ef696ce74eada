"""The calibrated planning of weights: node after node, with inputs from the quantized prefix.

Every node aims at the float model's own output, so that it makes up for what the nodes before it
got wrong. Memory does not grow with the number of samples: no more of them are taken than fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from onnxq.errors import CalibrationError, ModelError
from onnxq.feeds import Feeds, spread
from onnxq.frontier import Frontier, Replacement, Segment, cut, live_bytes
from onnxq.kernels_ref import ClipMeasure, Series
from onnxq.model import Model, to_proto
from onnxq.passes.added_tensor import added_tensor
from onnxq.passes.calibrated_node import (
    Affine,
    NodeSettings,
    Rounding,
    plan_node,
    shift_only,
)
from onnxq.passes.node_rows import NodeRows
from onnxq.passes.node_samples import MOST_ROWS, NodeSamples, Numbers
from onnxq.passes.search_scales import SearchScales, match_plan, node_series
from onnxq.passes.weights import LINEAR, Candidate, Weight
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

BUDGET_BYTES = 1 << 30
# Of the budget, for one of the two matrices of second moments; solving takes a few more of them.
_MOMENTS_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class _Site:
    entry: NodePlan
    weight: Weight
    rows: NodeRows
    added: str | None

    @property
    def shared_key(self) -> tuple[object, ...]:
        """Equal for nodes that read one weight in one way."""
        weight = self.weight
        return (id(weight.tensor), weight.split, weight.out_axes, self.entry.scales_key())


def calibrate_weights(
    model: Model,
    plan: Plan,
    samples: Feeds,
    *,
    measure: ClipMeasure = "mse",
    rounding: Rounding = "second_order",
    affine: Affine = "none",
    bias_correction: bool = True,
    sums: bool = True,
    descent: bool = True,
    budget_bytes: int = BUDGET_BYTES,
    seed: int = 0,
    rows: int = MOST_ROWS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """A plan whose scales, integers and biases make the nodes' outputs on the samples right.

    Conv and MatMul of the main graph are calibrated; the others keep scales found without data.
    Where the plan has integers already they are kept, and only a missing bias is found. Nodes that
    share a weight get the integers of the first of them, and a bias each. Activations are float.

    Args:
        model: the canonical model; only read.
        plan: what is to be done; missing scales are searched without data.
        samples: feeds for `model`; evenly spread ones are taken if not all fit.
        measure, rounding, affine, bias_correction, descent: the steps, see `NodeSettings`.
        sums: whether a node that another activation is added to aims at the float model's sum.
        budget_bytes: for the tensors between nodes, of all samples and both variants.
        seed: of the positions that are drawn from large inputs.
        rows: of a node's input, that its moments are summed over at most.
        threads: of onnxruntime; its default if not given.
        progress: called with (what, done, total).

    Returns:
        A new plan, and notes for the user. After Ctrl-C the plan holds what was done until then.

    Raises:
        CalibrationError: there are no samples, or the model fails on one.
        ConfigError: the plan was made for another model.
        ModelError: the model is larger than 2 GiB.
    """
    copies = {key: dict(getattr(plan, key)) for key in ("scales", "integers", "bias", "offsets")}
    made = SearchScales()(model, plan.model_copy(update=copies))
    settings = NodeSettings(measure, rounding, affine, bias_correction, descent)
    walk = _Walk(model, made, settings, sums, seed, rows, progress or _silent)
    for entry, (candidate, weight) in match_plan(model, made):
        walk.add(entry, candidate, weight, budget_bytes * _MOMENTS_SHARE)
    proto = _in_memory(model)
    beside = {name: site.added for name, site in walk.sites.items() if site.added is not None}
    segments = cut(proto.graph, walk.sites, beside)
    notes: tuple[str, ...] = ()
    if segments:
        first = next(iter(samples), None)
        if first is None:
            raise CalibrationError("calibration: there are no samples; give at least one")
        count, notes = _affordable(len(samples), live_bytes(proto, segments, first), budget_bytes)
        frontier = Frontier(proto, segments, spread(samples, count), threads)
        for name, replacement in walk.given.items():
            frontier.replace(name, replacement)
        notes += walk.run(frontier, segments)
    return made, (*notes, *walk.notes())


@dataclass(eq=False)
class _Walk:
    """Plans node after node, and keeps the reasons of what is not.

    Attributes:
        plan: filled in.
        sites: what is calibrated.
        given: nodes that have their numbers before the walk.
        left: why the others are not calibrated.
    """

    model: Model
    plan: Plan
    settings: NodeSettings
    sums: bool
    seed: int
    rows: int
    progress: Progress
    sites: dict[str, _Site] = field(default_factory=dict)
    given: dict[str, Replacement] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _shared: dict[tuple[object, ...], str] = field(default_factory=dict)

    def add(self, entry: NodePlan, candidate: Candidate, weight: Weight, most: float) -> None:
        """Take a node in, or note why not; `most` are the bytes that its moments may take."""
        rows = NodeRows.of(candidate.node, weight)
        reason = _why_not(entry, candidate, rows, most)
        if isinstance(rows, NodeRows) and reason is None:
            added = added_tensor(self.model, candidate.node) if self.sums else None
            self.sites[entry.name] = _Site(entry, weight, rows, added)
            return
        if reason is not None and entry.name not in self.plan.integers:
            self.left[entry.name] = reason
        if candidate.node.op in LINEAR and not candidate.inner:
            series = node_series(weight, entry, self.plan)
            bias = self.plan.bias.get(entry.name)
            shift = None if bias is None or isinstance(rows, str) else rows.spread(bias)
            self.given[entry.name] = _replacement(weight, series, shift)

    def run(self, frontier: Frontier, segments: Sequence[Segment]) -> tuple[str, ...]:
        """Plan every group; says so if Ctrl-C came before the end."""
        total, done = sum(len(segment.group) for segment in segments), 0
        self.progress("calibrating", 0, total)
        try:
            for group in frontier:
                for name in group:
                    self._node(frontier, self.sites[name], done)
                    done += 1
                    self.progress("calibrating", done, total)
        except KeyboardInterrupt:
            return (
                f"calibration: interrupted after {done} of {total} nodes; the others have scales "
                "found without data",
            )
        unseen = set(self.sites) - {name for segment in segments for name in segment.group}
        self.left |= dict.fromkeys(sorted(unseen), "its input is constant")
        return ()

    def _node(self, frontier: Frontier, site: _Site, index: int) -> None:
        plan, name = self.plan, site.entry.name
        fixed_offset = site.entry.offset and self.settings.rounding == "nearest"
        # a term of the centre keeps what was found for it
        given = name in plan.integers or fixed_offset or site.entry.centre
        points = plan.points.get(name)
        shared = (*site.shared_key, None if points is None else points.tobytes())
        twin = None if given else self._shared.get(shared)
        if twin is not None:
            _copy_numbers(plan, twin, name)
        series = node_series(site.weight, site.entry, plan)
        samples = self._samples(frontier, site, index)
        if samples is None:
            found = Numbers(series, np.zeros(site.weight.out))
        elif given or twin is not None:
            found = shift_only(samples, series, self.settings)
        else:
            found = plan_node(samples, site.entry, series, self.settings)
            plan.scales[name], plan.integers[name] = found.scales, found.integers
            if found.series.offset is not None:
                plan.offsets[name] = found.series.offset
            self._shared[shared] = name
        bias = plan.bias.get(name, found.bias.astype(np.float32))
        if bias.any():
            plan.bias[name] = bias
        shift = site.rows.spread(bias) if bias.any() else None
        frontier.replace(name, _replacement(site.weight, found.series, shift))

    def _samples(self, frontier: Frontier, site: _Site, index: int) -> NodeSamples | None:
        exact, quantized = frontier.inputs(site.entry.name, site.rows.slot)
        try:
            added = None if site.added is None else frontier.known(site.added)
            seed = self.seed + index
            return NodeSamples(site.rows, exact, quantized, seed, added, most_rows=self.rows)
        except ValueError as error:
            self.left[site.entry.name] = str(error)
            return None

    def notes(self) -> tuple[str, ...]:
        """One sentence per reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        return tuple(
            f"calibration: scales without data for {_listed(names)}: {reason}"
            for reason, names in by_reason.items()
        )


def _copy_numbers(plan: Plan, source: str, target: str) -> None:
    tables: tuple[dict[str, Any], ...] = (plan.scales, plan.integers, plan.offsets)
    for numbers in tables:
        if source in numbers:
            numbers[target] = numbers[source]


def _why_not(
    entry: NodePlan, candidate: Candidate, rows: NodeRows | str, most: float
) -> str | None:
    """The reason why a node's numbers are not calibrated."""
    if candidate.inner:
        return "it is inside If, Loop or Scan"
    if isinstance(rows, str):
        return rows
    if entry.granularity == "per_tensor":
        return "it has one scale for the whole tensor"
    if 8 * rows.groups * rows.inputs**2 > most:
        return f"the second moments of {rows.groups * rows.inputs} inputs take too much memory"
    return None


def _replacement(weight: Weight, series: Series, shift: Array | None) -> Replacement:
    matrix = np.asarray(series.dequantize(), np.float32)
    return Replacement(weight.slot, weight.from_matrix(matrix).reshape(weight.shape), shift)


def _affordable(count: int, per_sample: int, budget_bytes: int) -> tuple[int, tuple[str, ...]]:
    """How many samples fit into memory in two variants, and a sentence if not all do."""
    fit = max(1, min(count, budget_bytes // max(2 * per_sample, 1)))
    if fit == count:
        return count, ()
    return fit, (f"weights: {fit} of {count} samples, memory bound {budget_bytes / 2**30:.1f} GiB",)


def _in_memory(model: Model) -> ModelProto:
    try:
        return to_proto(model)
    except ModelError as error:
        raise ModelError(f"calibration of weights runs the model from memory: {error}") from None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""
