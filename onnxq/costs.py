"""What candidates of nodes cost, and the weights and activations that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.candidates import (
    Candidate,
    Unit,
    applicable,
    partial_bytes,
    products,
    stored_bytes,
    units,
)
from onnxq.kernels_ref import Series
from onnxq.kernels_ref.multipoint import most_gained
from onnxq.kernels_ref.partial import Coverage, partial_scales
from onnxq.model import Model
from onnxq.passes.probe_activations import (
    Modes,
    SwitchedUnit,
    activation_mode,
    products_of,
)
from onnxq.passes.search_scales import node_series
from onnxq.passes.stored_scales import storable
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]


class Costs:
    """What a table of units × candidates holds beside the errors, and what to find those with.

    Args:
        model: canonical; only read.
        plan: entries as selected, with outlier columns.
        candidates: what each unit may be.

    Attributes:
        units, candidates, shape: rows and columns, and how many of them.
        entries, bytes, products: see `sensitivity.Table`.
        scales, points: filled in by `weights`; points only of candidates that have them.
        modes: of each unit, what it may read instead of its activation, and the options in which
            it does.
    """

    def __init__(self, model: Model, plan: Plan, candidates: Sequence[Candidate]) -> None:
        self.units = units(model, plan)
        self.candidates = tuple(candidates)
        self.shape = (len(self.units), len(self.candidates))
        self.entries: dict[tuple[int, int], tuple[NodePlan, ...]] = {}
        self.scales: dict[tuple[int, int], tuple[Array, ...]] = {}
        self.points: dict[tuple[int, int], Array] = {}
        self.modes: list[dict[Modes, list[int]]] = []
        # relative energies of what the first terms of a parallel series leave of the weight
        self._left: dict[tuple[int, int], list[float]] = {}
        self.bytes = np.full(self.shape, np.inf)
        self.products = np.full(self.shape, np.inf)
        for unit, what in enumerate(self.units):
            self.modes.append({})
            for option, entries in applicable(what, self.candidates):
                self.entries[unit, option] = entries
                self.bytes[unit, option] = _bytes(self.candidates[option], entries[0], what.weight)
                self.products[unit, option] = sum(products(e, what.weight) for e in entries)
                modes = tuple(map(activation_mode, entries))
                if any(modes):
                    self.modes[unit].setdefault(modes, []).append(option)

    def switched(self) -> list[SwitchedUnit]:
        """What a session must be able to switch."""
        return [
            SwitchedUnit(tuple(e.name for e in unit.entries), tuple(modes))
            for unit, modes in zip(self.units, self.modes, strict=True)
        ]

    def exact_activations(self, unit: int) -> list[int]:
        """The options in which a unit reads its activation as it is."""
        quantized = {option for options in self.modes[unit].values() for option in options}
        return [
            option
            for option in range(self.shape[1])
            if (unit, option) in self.entries and option not in quantized
        ]

    def dropped(self, unit: int, option: int) -> float:
        """Error energy of the products left out, relative to that of the activation.

        Weight term i is what those before it leave of the weight. Where it meets what j terms
        leave of the activation, it stands for the whole weight.
        """
        entry = self.entries[unit, option][0]
        mode = activation_mode(entry)
        if mode is None:
            return 0.0
        kept = products_of(entry)
        return sum(
            left * (mode._replace(terms=j).step / mode.step) ** 2
            for i, left in enumerate(self._left.get((unit, option), ()), start=1)
            for j in range(1, mode.terms)
            if (i, j) not in kept
        )

    def weights(self, unit: int) -> list[tuple[list[int], Array, float]]:
        """Of each weight that a unit may have: (options, weight, relative energy of its error).

        The weights, of the stored shape, have the coarsest first. The scales are kept.
        """
        what = self.units[unit]
        exact = what.weight.matrix()
        signal = float(np.sum(np.square(exact, dtype=np.float64)))
        alike: dict[str, list[int]] = {}
        for option in range(self.shape[1]):
            if (unit, option) in self.entries:
                entry = self.entries[unit, option][0]
                share = self.candidates[option].share
                key = f"{entry.scales_key()} {entry.form} {share}" if entry.quantized else ""
                alike.setdefault(key, []).append(option)
        found = []
        for options in alike.values():
            made = self._dequantized(unit, options, exact)
            noise = float(np.sum(np.square(made - exact, dtype=np.float64)))
            found.append((options, _stored(what, made), noise / signal if signal else 0.0))
        return sorted(found, key=lambda one: -one[2])

    def _dequantized(self, unit: int, options: Sequence[int], exact: Array) -> Array:
        entry = self.entries[unit, options[0]][0]
        if not entry.quantized:
            return exact
        known = Plan(nodes=[entry])
        candidate = self.candidates[options[0]]
        if candidate.share < 1:
            known.points[entry.name] = self._points(unit, entry, candidate, exact)
            self.points.update({(unit, option): known.points[entry.name] for option in options})
        _, found = partial_scales(
            entry.series,
            exact,
            Coverage(known.points.get(entry.name)),
            bits=entry.bits,
            terms=entry.terms,
            granularity=entry.matrix_granularity(),
        )
        scales = storable(found, entry)
        self.scales.update({(unit, option): scales for option in options})
        known.scales[entry.name] = scales
        series = node_series(self.units[unit].weight, entry, known)
        if entry.layout == "parallel":
            left = _left_by_terms(series, exact)
            self._left.update({(unit, option): left for option in options})
        return series.dequantize()

    def _points(self, unit: int, entry: NodePlan, candidate: Candidate, exact: Array) -> Array:
        """Further terms for the channels in which these take away most error, int8 [out]."""
        chosen = most_gained(
            entry.series,
            exact,
            bits=entry.bits,
            terms=entry.terms,
            granularity=entry.matrix_granularity(),
            count=candidate.further(self.units[unit].weight),
        )
        return np.where(chosen, entry.terms, 1).astype(np.int8)


def _bytes(candidate: Candidate, entry: NodePlan, weight: Weight) -> float:
    if candidate.share < 1:
        return partial_bytes(entry, weight, candidate.further(weight))
    return stored_bytes(entry, weight)


def _left_by_terms(series: Series, exact: Array) -> list[float]:
    """Relative energies of the error of the first term, the first two, … but not of all."""
    signal = float(np.sum(np.square(exact, dtype=np.float64)))
    rest, found = exact, []
    for term in series.terms[:-1]:
        rest = rest - term.dequantize()
        noise = float(np.sum(np.square(rest, dtype=np.float64)))
        found.append(noise / signal if signal else 0.0)
    return found


def _stored(unit: Unit, matrix: Array) -> Array:
    turned = unit.weight.from_matrix(matrix).reshape(unit.weight.shape)
    return np.ascontiguousarray(turned, np.float32)
