"""What each node's candidates cost, and how much error each puts on the outputs on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.candidates import FLOAT_BYTES, Candidate, Unit, applicable, products, stored_bytes, units
from onnxq.feeds import Feed
from onnxq.kernels_ref import series_scales
from onnxq.meter import is_error_output
from onnxq.model import Model
from onnxq.passes.probe import open_weights
from onnxq.passes.search_scales import node_series
from onnxq.plan import NodePlan, Plan
from onnxq.session import open_session, run

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

SAMPLES = 8
# Relative error of a weight from which on the output's error is proportional to it: finer
# candidates of a node are scaled from its first one below. (Σ of both squares, in energy.)
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
        stated: where `error` comes from.
    """

    units: Sequence[Unit]
    candidates: Sequence[Candidate]
    error: Array
    bytes: Array
    products: Array
    entries: Mapping[tuple[int, int], tuple[NodePlan, ...]]
    scales: Mapping[tuple[int, int], tuple[Array, ...]] = field(repr=False)
    stated: str = "measured"

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
            said = float(rest)
            for u, unit in enumerate(self.units):
                if u not in there:
                    said += FLOAT_BYTES * unit.weight.size
                    continue
                said += self.bytes[u, option]
                for entry in self.entries[u, option]:
                    changed[entry.name] = entry
                    scales[entry.name] = self.scales[u, option]
            nodes = [changed.get(node.name, node) for node in plan.nodes]
            alone = plan.model_copy(update={"nodes": nodes, "scales": {**plan.scales, **scales}})
            corrected[there, option] += (size(alone) - said) / len(there)
        return replace(self, bytes=corrected)

    def plan(self, plan: Plan, chosen: Sequence[int]) -> Plan:
        """The plan with one candidate per unit; entries that are no unit's stay as they are."""
        entries: dict[str, NodePlan] = {}
        scales = dict(plan.scales)
        for unit, option in enumerate(chosen):
            for entry in self.entries[unit, option]:
                entries[entry.name] = entry
                scales.pop(entry.name, None)
                if entry.quantized:
                    scales[entry.name] = self.scales[unit, option]
        nodes = [entries.get(node.name, node) for node in plan.nodes]
        return plan.model_copy(
            update={"nodes": nodes, "scales": scales, "integers": {}, "bias": {}}
        )


def estimate(model: Model, plan: Plan, candidates: Sequence[Candidate]) -> Table:
    """The table from the weights alone: the relative energy of the weight's own error.

    It states how much error a node puts on its own output where inputs are uncorrelated, and takes
    the rest of the model to pass errors on as it passes on signals.

    Raises:
        ConfigError: the plan was made for another model.
    """
    table = _Costs(model, plan, candidates)
    error = np.full(table.shape, np.inf)
    for unit, option, _, energy in table.weights():
        error[unit, option] = energy
    return table.table(error, "estimated from the weights")


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
    """The table from runs in which one unit's weight is a candidate's, the others float.

    Only weights are changed: that activations are quantized, too, shows when the whole model is
    measured.

    Args:
        model: canonical; only read.
        plan: entries as selected; those that are not quantized stay so.
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
    table = _Costs(model, plan, candidates)
    probe = _Probe(model, plan, list(islice(feeds, samples)), threads)
    error = np.full(table.shape, np.inf)
    anchors: dict[int, tuple[float, float]] = {}  # unit -> energy of (weight error, output error)
    for unit, option, weight, energy in table.weights(coarse_first=True):
        if progress is not None and unit not in anchors:
            progress("sensitivity", unit, table.shape[0])
        if energy == 0:
            error[unit, option] = 0.0
        elif unit in anchors:
            of_weight, of_output = anchors[unit]
            error[unit, option] = of_output * energy / of_weight
        else:
            names = [entry.name for entry in table.units[unit].entries]
            error[unit, option] = probe.error(names, weight())
            if energy <= LINEAR**2 and np.isfinite(error[unit, option]):
                anchors[unit] = energy, error[unit, option]
    if progress is not None:
        progress("sensitivity", table.shape[0], table.shape[0])
    return table.table(error, f"measured on {len(probe)} samples")


def _left(entry: NodePlan) -> NodePlan:
    return entry.model_copy(update={"reason": "left in float"})


class _Costs:
    """What a table holds beside the errors, and the weights to find those with."""

    def __init__(self, model: Model, plan: Plan, candidates: Sequence[Candidate]) -> None:
        self.units = units(model, plan)
        self.candidates = tuple(candidates)
        self.shape = (len(self.units), len(self.candidates))
        self.entries: dict[tuple[int, int], tuple[NodePlan, ...]] = {}
        self.scales: dict[tuple[int, int], tuple[Array, ...]] = {}
        self._bytes = np.full(self.shape, np.inf)
        self._products = np.full(self.shape, np.inf)
        for unit, what in enumerate(self.units):
            for option, entries in applicable(what, self.candidates):
                self.entries[unit, option] = entries
                self._bytes[unit, option] = stored_bytes(entries[0], what.weight)
                self._products[unit, option] = sum(products(e, what.weight) for e in entries)

    def weights(
        self, *, coarse_first: bool = False
    ) -> Iterator[tuple[int, int, Callable[[], Array], float]]:
        """Of each unit and candidate: (unit, option, weight, relative energy of its error).

        The weight, of the stored shape, is given by a call. The scales are kept.
        """
        for unit, what in enumerate(self.units):
            exact = what.weight.matrix()
            signal = float(np.sum(np.square(exact, dtype=np.float64)))
            found: list[tuple[int, Array, float]] = []
            for option in range(len(self.candidates)):
                entries = self.entries.get((unit, option))
                if entries is None:
                    continue
                made = self._dequantized(unit, option, entries[0], exact)
                noise = float(np.sum(np.square(made - exact, dtype=np.float64)))
                found.append((option, made, noise / signal if signal else 0.0))
            if coarse_first:
                found.sort(key=lambda one: -one[2])
            for option, made, energy in found:
                yield unit, option, partial(_stored, what, made), energy

    def _dequantized(self, unit: int, option: int, entry: NodePlan, exact: Array) -> Array:
        if not entry.quantized:
            return exact
        self.scales[unit, option] = series_scales(
            entry.series,
            exact,
            bits=entry.bits,
            terms=entry.terms,
            granularity=entry.matrix_granularity(),
        )
        known = Plan(nodes=[entry])
        known.scales[entry.name] = self.scales[unit, option]
        return node_series(self.units[unit].weight, entry, known).dequantize()

    def table(self, error: Array, stated: str) -> Table:
        return Table(
            self.units,
            self.candidates,
            error,
            self._bytes,
            self._products,
            self.entries,
            self.scales,
            stated,
        )


def _stored(unit: Unit, matrix: Array) -> Array:
    turned = unit.weight.from_matrix(matrix).reshape(unit.weight.shape)
    return np.ascontiguousarray(turned, np.float32)


class _Probe:
    """The float model in a session whose planned weights are fed."""

    def __init__(
        self, model: Model, plan: Plan, feeds: Sequence[Feed], threads: int | None
    ) -> None:
        opened = open_weights(model, plan)
        self._inputs = opened.inputs
        self._session = open_session(opened.proto.SerializeToString(), threads=threads)
        exact = {
            opened.inputs[name]: weight.from_matrix(weight.matrix()).reshape(weight.shape)
            for name, weight in opened.weights.items()
        }
        self._feeds = [{**exact, **feed} for feed in feeds]
        self._wanted = [run(self._session, feed) for feed in self._feeds]

    def __len__(self) -> int:
        return len(self._feeds)

    def error(self, names: Sequence[str], weight: Array) -> float:
        """Energy of the worst output's error, relative to the output's own, inf if not finite."""
        changed = {self._inputs[name]: weight for name in names}
        noise: dict[int, float] = {}
        signal: dict[int, float] = {}
        for feed, wanted in zip(self._feeds, self._wanted, strict=True):
            got = run(self._session, {**feed, **changed})
            for i, (w, g) in enumerate(zip(wanted, got, strict=True)):
                if not is_error_output(w):
                    continue
                finite = np.isfinite(w)
                exact = w[finite].astype(np.float64)
                difference = g[finite].astype(np.float64) - exact
                noise[i] = noise.get(i, 0.0) + float(difference @ difference)
                signal[i] = signal.get(i, 0.0) + float(exact @ exact)
        energies = [noise[i] / signal[i] for i in noise if signal[i] > 0]
        worst = max(energies, default=0.0)
        return worst if np.isfinite(worst) else float("inf")
