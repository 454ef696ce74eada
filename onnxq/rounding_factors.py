"""How much less error a node's output has when its weight is rounded to samples, not to nearest.

Sensitivities are measured with weights rounded to nearest. A plan that is rounded to samples
afterwards errs less, and not everywhere by the same factor: much less where the inputs of a node
are correlated, hardly less in depthwise convolutions. The factor of each unit and candidate is
found from the second moments H of the node's inputs alone: dᵀHd of both roundings, H of samples
that the rounding has not seen, with the float model before the node. What later nodes make up for
is not in it; that is alike for all candidates, and the trials of whole models tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import CalibrationError, ValidationError
from onnxq.feeds import Feeds, spread
from onnxq.kernels_ref import InputMoments
from onnxq.kernels_ref.second_order import Prepared
from onnxq.model import Model
from onnxq.observing import observer
from onnxq.passes.node_rows import NodeRows
from onnxq.passes.rounded_clip import rounded_trials
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.passes.weights import Weight
from onnxq.plan import Plan
from onnxq.sensitivity import LINEAR, Table

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

SAMPLES = 64  # evenly spread ones; fewer have too few rows where images have become small
_HELD_EVERY = 4
# Rows that moments are summed over, from all samples together.
_ROWS_PER_INPUT, _FEWEST_ROWS, _MOST_ROWS = 16, 2048, 16384
_MOMENT_BYTES = 1 << 28  # of the second moments that are held at once
_ELEMENTS = 1 << 22  # of the weights that are rounded at once
# Clip ratios, of which a channel keeps the best: one in three of those of the rounding itself.
_RATIOS = (1.0, 0.9, 0.8, 0.7)
_GRANULARITIES = ("per_channel", "per_block")


def with_rounding(
    model: Model,
    plan: Plan,
    table: Table,
    feeds: Feeds,
    *,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Table:
    """The table with what errors of weights are when they are rounded to samples.

    Args:
        model: canonical; only read.
        plan: what the table was made for.
        table: with errors of weights rounded to nearest.
        feeds: at least one, re-iterable; those that plans will be rounded to.
        samples: how many of the feeds are run, at most.
        progress: called with ("rounding", done, total).

    Raises:
        CalibrationError: the model fails on a sample.
        ConfigError: the plan was made for another model.
        ModelError: the model is larger than 2 GiB.
    """
    factors = rounding_factors(model, plan, table, feeds, samples=samples, progress=progress)
    changed = table.with_weight_error(table.weight_error * factors)
    return replace(changed, stated=f"{table.stated}, rounded to samples")


def rounding_factors(
    model: Model,
    plan: Plan,
    table: Table,
    feeds: Feeds,
    *,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Array:
    """Of each unit and candidate, float64 in (0, 1]: error energy rounded to samples ÷ to nearest.

    Arguments and errors as for `with_rounding`. 1 where a weight is not rounded to samples: inside
    If, Loop and Scan, with one scale for the whole tensor, and where nothing is gained. Nodes that
    share a weight have the factor of the first of them. Finer candidates than one whose relative
    weight error is below `LINEAR` have its factor.
    """
    factors = np.ones(table.error.shape)
    sites = _sites(model, plan, table)
    observe = observer(model, spread(feeds, samples), _failing)
    done = 0
    for part in _portions(sites):
        for values in observe(sorted({site.tensor for site in part})):
            for site in part:
                if site.tensor in values:
                    site.take(values[site.tensor])
        for site in part:
            factors[site.unit] = site.factors(table)
            site.forget()
            done += 1
            if progress is not None:
                progress("rounding", done, len(sites))
    return factors


@dataclass(eq=False)
class _Site:
    """The first node of a unit, and the moments of its inputs on samples to fit and to judge."""

    unit: int
    weight: Weight
    rows: NodeRows
    tensor: str
    limit: int
    fit: InputMoments | None = None
    held: InputMoments | None = None
    _taken: int = 0
    _wrong: bool = field(default=False)

    @property
    def moment_bytes(self) -> int:
        """Of both kinds of moments."""
        return 2 * 8 * self.rows.groups * self.rows.inputs**2

    def take(self, x: Array) -> None:
        """Add one sample."""
        if self.fit is None or self.held is None:
            self.fit, self.held = (
                InputMoments(self.rows.groups, self.rows.inputs) for _ in range(2)
            )
        number, self._taken = self._taken, self._taken + 1
        try:
            rows = self.rows.read(x, self.limit, np.random.default_rng(number))
        except ValueError:  # its shape does not fit: not rounded to samples either
            self._wrong = True
            return
        into = self.held if number % _HELD_EVERY == _HELD_EVERY - 1 else self.fit
        into.add(rows, rows)

    def forget(self) -> None:
        self.fit = self.held = None

    def factors(self, table: Table) -> Array:
        """Float64 [candidates]."""
        found = np.ones(len(table.candidates))
        if self._wrong or self.fit is None or self.held is None:
            return found
        held = self.held if self.held.count else self.fit
        if not (np.isfinite(self.fit.hessian).all() and np.isfinite(held.hessian).all()):
            return found
        matrix = self.weight.matrix()
        plain = [self._plain(table, option, matrix) for option in range(len(found))]
        sizes = [np.inf if p is None else float(np.sum(np.square(p))) for p in plain]
        fine: float | None = None
        prepared: Prepared | None = None
        for option in sorted(range(len(found)), key=lambda o: -sizes[o]):
            error = plain[option]
            if error is None or sizes[option] == 0:
                continue
            if fine is None:
                prepared = prepared or Prepared.of(matrix, self.fit.centred()[0])
                rounded = self._rounded(table, option, matrix, prepared)
                # the bias, too, is that of the samples to fit
                before, centred = _energy(error, held.hessian), held.about(self.fit.mean_hat)
                after = min(_energy(rounded, centred), _energy(error, centred))
                found[option] = min(after / before, 1.0) if before > 0 else 1.0
                if sizes[option] <= LINEAR**2 * float(np.sum(np.square(matrix))):
                    fine = found[option]
            else:
                found[option] = fine
        return found

    def _plain(self, table: Table, option: int, matrix: Array) -> Array | None:
        """The weight's error when rounded to nearest; None where it is not rounded to samples."""
        entries = table.entries.get((self.unit, option))
        if entries is None or not entries[0].quantized:
            return None
        if entries[0].granularity not in _GRANULARITIES:
            return None
        known = Plan(nodes=[entries[0]])
        known.scales[entries[0].name] = table.scales[self.unit, option]
        if (self.unit, option) in table.points:
            known.points[entries[0].name] = table.points[self.unit, option]
        return matrix - node_series(self.weight, entries[0], known).dequantize()

    def _rounded(self, table: Table, option: int, matrix: Array, prepared: Prepared) -> Array:
        """The weight's error with second-order rounding, each channel with its best clip ratio."""
        entry = table.entries[self.unit, option][0]
        best, least = np.zeros_like(matrix), np.full(len(matrix), np.inf)
        rows = np.arange(len(matrix))
        for trial in rounded_trials(
            matrix,
            [np.asarray(scale, np.float32) for scale in table.scales[self.unit, option]],
            prepared,
            _RATIOS,
            bits=entry.bits,
            kind=entry.series,
            block_size=entry.block_size,
            points=table.points.get((self.unit, option)),
            elements=_ELEMENTS,
        ):
            error = np.ascontiguousarray(trial.error.swapaxes(0, 1)).reshape(-1, *matrix.shape)
            cost = _by_row(error, prepared.h)
            winner = cost.argmin(axis=0)
            better = cost[winner, rows] < least
            best[better] = error[winner, rows][better]
            least = np.minimum(least, cost[winner, rows])
        return best


def _by_row(error: Array, hessian: Array) -> Array:
    """The output error dᵀHd of each row, [ratios, out]; error [ratios, out, in]."""
    split = error.reshape(len(error), len(hessian), -1, error.shape[-1])
    found = np.einsum("cgri,cgri->cgr", np.matmul(split, hessian), split)
    return np.asarray(found.reshape(len(error), -1))


def _energy(error: Array, hessian: Array) -> float:
    return float(_by_row(error[None], hessian).sum())


def _sites(model: Model, plan: Plan, table: Table) -> list[_Site]:
    places = {entry.name: place for entry, place in match_plan(model, plan)}
    found = []
    for unit, what in enumerate(table.units):
        candidate, weight = places[what.name]
        rows = NodeRows.of(candidate.node, weight)
        if candidate.inner or isinstance(rows, str) or 8 * rows.inputs**2 > _MOMENT_BYTES:
            continue
        wanted = min(max(_ROWS_PER_INPUT * rows.inputs, _FEWEST_ROWS), _MOST_ROWS)
        tensor = candidate.node.inputs[rows.slot].name
        found.append(_Site(unit, weight, rows, tensor, max(1, wanted // SAMPLES)))
    return found


def _portions(sites: Sequence[_Site]) -> Iterator[list[_Site]]:
    """In order, as many at once as memory allows."""
    filled = 0

    def portion(site: _Site) -> int:
        nonlocal filled
        filled += site.moment_bytes
        return filled // (2 * _MOMENT_BYTES)

    for _, part in groupby(sites, portion):
        yield list(part)


def _failing(index: int, error: ValidationError) -> CalibrationError:
    return CalibrationError(f"calibration: sample {index}: the float model fails on it ({error})")
