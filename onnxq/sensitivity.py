"""What each node's candidates cost, and how much error each puts on the outputs on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.candidates import FLOAT_BYTES, Candidate, Unit
from onnxq.costs import Costs
from onnxq.feeds import Feed
from onnxq.model import Model
from onnxq.outliers import Outliers
from onnxq.plan import NodePlan, Plan
from onnxq.probing import Probe

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

SAMPLES = 8
# Relative error of a weight, or of the output due to an activation, from which on the output's
# error is proportional to what is rounded: finer candidates of a node are scaled from its first one
# below. (Σ of both squares, in energy.)
LINEAR = 0.02


@dataclass(frozen=True, eq=False)
class Table:
    """Units × candidates, float64 each; inf where a unit cannot have a candidate.

    Attributes:
        units, candidates: what rows and columns are.
        error: error energy that the candidate alone puts on the worst output, relative to the
            output's own energy. Those of all units add up where errors are independent.
        bytes: in the file. products: see `candidates.products`.
        entries: the entries of a unit with a candidate.
        scales: their scales, one array per term.
        points: their terms per output channel, where these differ.
        stated: where `error` comes from.
        activation_error: the part of `error` that is due to quantized activations; 0 where they
            are not modelled.
    """

    units: Sequence[Unit]
    candidates: Sequence[Candidate]
    error: Array
    bytes: Array
    products: Array
    entries: Mapping[tuple[int, int], tuple[NodePlan, ...]]
    scales: Mapping[tuple[int, int], tuple[Array, ...]] = field(repr=False)
    stated: str = "measured"
    activation_error: Array | float = 0.0
    points: Mapping[tuple[int, int], Array] = field(default_factory=dict, repr=False)

    @property
    def weight_error(self) -> Array:
        """The part of `error` that is due to the weights, float64 [units, candidates]."""
        there = np.isfinite(self.error)
        left = np.where(there, self.error, 0.0) - np.where(there, self.activation_error, 0.0)
        return np.where(there, left, np.inf)

    def with_weight_error(self, weight_error: Array) -> Table:
        """The table with another error of the weights, e.g. after rounding to data."""
        return replace(self, error=weight_error + self.activation_error)

    def with_overhead(self, plan: Plan, size: Callable[[Plan], int], rest: int) -> Table:
        """The table with what names and nodes really take in the file, for each candidate.

        Args:
            plan: what the table was made for.
            size: bytes of the file that a plan makes.
            rest: bytes of the file without the units' weights.
        """
        corrected = self.bytes.copy()
        for option, candidate in enumerate(self.candidates):
            there = [u for u in range(len(self.units)) if (u, option) in self.entries]
            if not candidate.quantized or not there:
                continue
            changed = {e.name: e for unit in self.units for e in map(_left, unit.entries)}
            scales: dict[str, tuple[Array, ...]] = {}
            points: dict[str, Array] = {}
            said = float(rest)
            for u, unit in enumerate(self.units):
                if u not in there:
                    said += FLOAT_BYTES * unit.weight.size
                    continue
                said += self.bytes[u, option]
                for entry in self.entries[u, option]:
                    changed[entry.name] = entry
                    scales[entry.name] = self.scales[u, option]
                    if (u, option) in self.points:
                        points[entry.name] = self.points[u, option]
            nodes = [changed.get(node.name, node) for node in plan.nodes]
            numbers = {"scales": {**plan.scales, **scales}, "points": {**plan.points, **points}}
            alone = plan.model_copy(update={"nodes": nodes, **numbers})
            corrected[there, option] += (size(alone) - said) / len(there)
        return replace(self, bytes=corrected)

    def plan(self, plan: Plan, chosen: Sequence[int]) -> Plan:
        """The plan with one candidate per unit; entries that are no unit's stay as they are."""
        entries: dict[str, NodePlan] = {}
        scales, points = dict(plan.scales), dict(plan.points)
        for unit, option in enumerate(chosen):
            for entry in self.entries[unit, option]:
                entries[entry.name] = entry
                scales.pop(entry.name, None)
                points.pop(entry.name, None)
                if entry.quantized:
                    scales[entry.name] = self.scales[unit, option]
                if (unit, option) in self.points:
                    points[entry.name] = self.points[unit, option]
        nodes = [entries.get(node.name, node) for node in plan.nodes]
        numbers = {"scales": scales, "points": points, "integers": {}, "bias": {}}
        return plan.model_copy(update={"nodes": nodes, **numbers})


def estimate(model: Model, plan: Plan, candidates: Sequence[Candidate]) -> Table:
    """The table from the weights alone: the relative energy of the weight's own error.

    It states how much error a node puts on its own output where inputs are uncorrelated, and takes
    the rest of the model to pass errors on as it passes on signals. Of activations weights say
    nothing (their outliers least of all), so candidates that change them are left out.

    Raises:
        ConfigError: the plan was made for another model.
    """
    table = Costs(model, plan, [one for one in candidates if not one.reads])
    error = np.full(table.shape, np.inf)
    for unit in range(len(table.units)):
        for options, _, energy in table.weights(unit):
            error[unit, options] = energy
    return _table(table, error, 0.0, "estimated from the weights")


def measure(
    model: Model,
    plan: Plan,
    candidates: Sequence[Candidate],
    feeds: Iterable[Feed],
    *,
    samples: int = SAMPLES,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Table:
    """The table from runs in which one unit is changed, the others float.

    A unit's weight and its activation are changed one after the other, and their error energies
    added: their roundings know nothing of each other. So each weight and each way to quantize the
    activation is run once, not each pair. Only dynamic activations are looked at: those of static
    compute have no ranges yet, and show when the whole model is measured.

    Args:
        model: canonical; only read.
        plan: entries as selected; those that are not quantized stay so. Outlier columns are looked
            for where candidates may have them.
        candidates: what each unit may be.
        feeds: at least one.
        samples: how many of the feeds are run.
        threads: of onnxruntime.
        progress: called with ("sensitivity", done, total).

    Raises:
        ConfigError: the plan was made for another model.
        ModelError: what the model holds beside the planned weights passes 2 GiB.
        ValidationError: the model does not load or run.
    """
    kept = list(islice(feeds, samples))
    columns = max((one.columns for one in candidates), default=0)
    if columns:
        plan, _ = Outliers(kept, columns)(model, plan)
    table = Costs(model, plan, candidates)
    probe = Probe(model, plan, table.switched(), kept, threads)
    of_weights, of_activations = np.full((2, *table.shape), np.inf)
    for unit in range(len(table.units)):
        if progress is not None:
            progress("sensitivity", unit, table.shape[0])
        for options, error in _weight_errors(table, probe, unit):
            of_weights[unit, options] = error
        for options, error in _activation_errors(table, probe, unit):
            dropped = [table.dropped(unit, option) for option in options]
            of_activations[unit, options] = error * (1 + np.array(dropped))
    if progress is not None:
        progress("sensitivity", table.shape[0], table.shape[0])
    stated = f"measured on {len(kept)} samples"
    return _table(table, of_weights + of_activations, of_activations, stated)


def _weight_errors(table: Costs, probe: Probe, unit: int) -> Iterator[tuple[list[int], float]]:
    """Of each weight that the unit may have: the options with it, and the output's error energy."""
    names = [entry.name for entry in table.units[unit].entries]
    anchor: tuple[float, float] | None = None  # energy of (weight error, output error)
    for options, weight, energy in table.weights(unit):
        if energy == 0:
            error = 0.0
        elif anchor is not None:
            error = anchor[1] * energy / anchor[0]
        else:
            error = probe.weight_error(names, weight)
            if energy <= LINEAR**2 and np.isfinite(error):
                anchor = energy, error
        yield options, error


def _activation_errors(table: Costs, probe: Probe, unit: int) -> Iterator[tuple[list[int], float]]:
    """The same of each way to read the activation.

    What a series leaves is uniform over one step of its last term, so that with the same columns
    the error energy goes with the step's square.
    """
    yield table.exact_activations(unit), 0.0
    anchors: dict[tuple[object, ...], tuple[float, float]] = {}  # (step, output error)
    for index, (modes, options) in enumerate(table.modes[unit].items()):
        step = max(mode.step for mode in modes if mode is not None)
        columns = tuple(None if mode is None else mode.columns for mode in modes)
        anchor = anchors.get(columns)
        if anchor is not None and step <= anchor[0]:
            yield options, anchor[1] * (step / anchor[0]) ** 2
            continue
        error = probe.activation_error(unit, index)
        if error <= LINEAR**2:
            anchors[columns] = step, error
        yield options, error


def _left(entry: NodePlan) -> NodePlan:
    return entry.model_copy(update={"reason": "left in float"})


def _table(costs: Costs, error: Array, activation_error: Array | float, stated: str) -> Table:
    return Table(
        costs.units,
        costs.candidates,
        error,
        costs.bytes,
        costs.products,
        costs.entries,
        costs.scales,
        stated,
        activation_error,
        costs.points,
    )
