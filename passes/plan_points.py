"""Planning: how many terms each output channel of a node gets (multipoint, arXiv 2002.09049)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import ConfigError
from onnxq.kernels_ref import InputMoments
from onnxq.kernels_ref.multipoint import point_errors, points_for_tolerance
from onnxq.model import Model
from onnxq.passes.node_rows import NodeRows
from onnxq.passes.observation import Observe
from onnxq.passes.search_scales import Progress, match_plan, no_progress, node_coverage
from onnxq.passes.share_budget import share_budget
from onnxq.passes.stored_terms import stored_bits
from onnxq.passes.weights import Candidate, Weight
from onnxq.passes.whole_terms import compact_indices
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]
_Site = tuple[NodePlan, tuple[Candidate, Weight]]

# Moments that are summed at once, in float64.
MOMENT_BYTES = 512 * 2**20
# Rows of inputs that a node's moments are made of: enough for a full rank, and then some.
ROWS_PER_INPUT, FEWEST_ROWS = 4, 4096
SCALE_BYTES = 4


@dataclass(frozen=True)
class PlanPoints:
    """Give each output channel as many terms as its output error asks for.

    Given:   nodes with `terms` >= 2, the most that a channel may get, and no scales yet
    Result:  plan.points[name]; nodes whose channels all get the same number have that as `terms`

    The error of a channel is that of its output, squared, as a share of the output itself: over the
    samples of `observe`, or, without, for white inputs. Either `tolerance`, the error that is
    allowed to a channel, or `budget`, the bytes that the terms beyond the first may take in all,
    given to the channels with the largest fall of error per byte; `setup` are the bytes that each
    node with such terms takes besides. Nodes that share a weight get the same points.
    """

    tolerance: float | None = None
    budget: int | None = None
    setup: float = 0.0
    observe: Observe | None = None
    samples: int = 1
    progress: Progress = no_progress

    def __call__(self, model: Model, plan: Plan) -> Plan:
        """A plan with points; `model`, canonical and float, and the given plan are only read.

        Raises:
            ConfigError: neither or both of tolerance and budget are given, or are negative; or the
                plan was made for another model.
            CalibrationError: the model fails on a sample.
        """
        self._check()
        return self.choose(model, plan, self.errors(model, plan))

    def choose(self, model: Model, plan: Plan, errors: Mapping[str, Array]) -> Plan:
        """The same from errors that are known, as `errors` gives them.

        Raises:
            ConfigError: as above.
        """
        self._check()
        sites = [site for site in match_plan(model, plan) if site[0].name in errors]
        shared = _shared(sites)
        joined = [np.maximum.reduce([errors[name] for name in names]) for names in shared]
        first = {names[0] for names in shared}
        chosen = self._chosen(joined, [site for site in sites if site[0].name in first])
        points = {
            name: found for names, found in zip(shared, chosen, strict=True) for name in names
        }
        return with_points(plan, points)

    def errors(self, model: Model, plan: Plan) -> dict[str, Array]:
        """The errors with 1, 2, … terms, float64 [out, terms], of each node that can have points.

        Raises:
            ConfigError: the plan was made for another model.
            CalibrationError: the model fails on a sample.
        """
        sites = [site for site in match_plan(model, plan) if _can_have(site[0])]
        found = {}
        for done, (entry, errors) in enumerate(self._errors(sites, plan)):
            self.progress("choosing terms", done, len(sites))
            found[entry.name] = errors
        self.progress("choosing terms", len(sites), len(sites))
        return found

    def _check(self) -> None:
        if (self.tolerance is None) == (self.budget is None):
            raise ConfigError("points: give either a tolerance or a budget")
        given = self.tolerance if self.budget is None else self.budget
        if given is None or not given >= 0:
            raise ConfigError(f"points: tolerance or budget is {given}; give a number >= 0")

    def _chosen(self, errors: list[Array], sites: list[_Site]) -> list[Array]:
        if self.tolerance is not None:
            return [points_for_tolerance(found, self.tolerance) for found in errors]
        costs = [point_bytes(weight, entry) for entry, (_, weight) in sites]
        return share_budget(errors, costs, float(self.budget or 0), self.setup)

    def _errors(self, sites: list[_Site], plan: Plan) -> Iterator[tuple[NodePlan, Array]]:
        """The errors [out, terms] of each node."""
        for group in _portions(sites) if self.observe else [sites]:
            hessians = self._hessians(group) if self.observe else {}
            for entry, (_, weight) in group:
                yield (
                    entry,
                    point_errors(
                        entry.series,
                        weight.matrix(),
                        node_coverage(weight, entry, plan),
                        bits=entry.bits,
                        terms=entry.terms,
                        granularity=entry.matrix_granularity(),
                        hessian=hessians.get(entry.name),
                    ),
                )

    def _hessians(self, sites: list[_Site]) -> Mapping[str, Array]:
        """Second moments of the nodes' inputs, where they are known."""
        readers: dict[str, list[tuple[str, NodeRows, InputMoments]]] = {}
        for entry, (candidate, weight) in sites:
            rows = _rows(candidate, weight)
            if rows is not None:
                moments = InputMoments(rows.groups, rows.inputs)
                tensor = candidate.node.inputs[rows.slot].name
                readers.setdefault(tensor, []).append((entry.name, rows, moments))
        seen: dict[str, int] = {}
        for values in self.observe(list(readers)) if self.observe and readers else ():
            for tensor, array in values.items():
                sample = seen[tensor] = seen.get(tensor, -1) + 1
                for _, rows, moments in readers[tensor]:
                    _take(moments, rows, array, sample, self.samples)
        return {
            name: moments.hessian
            for all_of_one in readers.values()
            for name, _, moments in all_of_one
            if moments.count
        }


def point_bytes(weight: Weight, entry: NodePlan, channels: int | None = None) -> float:
    """Bytes in the file of one more term of one output channel: integers, scales, and its index.

    channels: how many have that term; nearly all if not given.
    """
    inputs = weight.size // weight.out
    count = weight.size if channels is None else channels * inputs
    scales = 1 if entry.block_size is None else -(-inputs // entry.block_size)
    index = compact_indices(np.zeros(1, np.int64), weight.out).itemsize
    return inputs * stored_bits(entry, count) / 8 + scales * SCALE_BYTES + index


def _can_have(entry: NodePlan) -> bool:
    return entry.terms > 1 and entry.granularity != "per_tensor"


def _rows(candidate: Candidate, weight: Weight) -> NodeRows | None:
    if candidate.inner:
        return None
    rows = NodeRows.of(candidate.node, weight)
    return None if isinstance(rows, str) else rows


def _take(moments: InputMoments, rows: NodeRows, array: Array, sample: int, samples: int) -> None:
    limit = max(ROWS_PER_INPUT * rows.inputs, FEWEST_ROWS) // max(samples, 1) + 1
    try:
        x = rows.read(array, limit, np.random.default_rng(sample))
    except ValueError:  # an input that the rows are not known of: judged without samples
        return
    moments.add(x, x)


def _portions(sites: list[_Site]) -> Iterator[list[_Site]]:
    part: list[_Site] = []
    filled = 0
    for site in sites:
        rows = _rows(*site[1])
        size = 0 if rows is None else 8 * rows.groups * rows.inputs**2
        if part and filled + size > MOMENT_BYTES:
            yield part
            part, filled = [], 0
        part.append(site)
        filled += size
    if part:
        yield part


def _shared(sites: list[_Site]) -> list[list[str]]:
    """Names of the nodes, those together whose terms are the same."""
    found: dict[tuple[object, ...], list[str]] = {}
    for entry, (_, weight) in sites:
        key = (id(weight.tensor), weight.split, weight.out_axes, entry.scales_key())
        found.setdefault(key, []).append(entry.name)
    return list(found.values())


def with_points(plan: Plan, points: Mapping[str, Array]) -> Plan:
    """The plan with so many terms per channel, int8 [out] by node, without numbers made before."""
    nodes, kept, changed = [], dict(plan.points), set()
    for node in plan.nodes:
        found = points.get(node.name)
        if found is None:
            nodes.append(node)
            continue
        changed.add(node.name)
        most = max(int(found.max()), 2 if node.centre else 1)
        nodes.append(node.model_copy(update={"terms": most}))
        kept.pop(node.name, None)
        if (found != most).any():
            kept[node.name] = found
    numbers: dict[str, Any] = {"points": kept}
    for what in ("scales", "integers", "offsets"):  # made for other points
        made = getattr(plan, what)
        numbers[what] = {name: value for name, value in made.items() if name not in changed}
    return plan.model_copy(update={"nodes": nodes, **numbers})
