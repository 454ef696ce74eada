"""How long each node takes with each candidate, as shares of the float model's latency."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.errors import CalibrationError, ConfigError, ValidationError
from onnxq.excerpts import Excerpts, Place
from onnxq.feeds import Feed
from onnxq.model import Model
from onnxq.observing import observer
from onnxq.passes.search_scales import match_plan
from onnxq.plan import Plan
from onnxq.sensitivity import Table
from onnxq.session import open_session
from onnxq.stopwatch import Runner, Timer
from onnxq.trial import Trial

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
Clock = Callable[[], float]

ROUNDS = 15
SECONDS = 60.0
_FOR_SHARES = 0.25  # of the time, for what each float node has in the whole model
_TICK = 1e-9  # seconds
_RATIO = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*x\s*", re.IGNORECASE)


def parse_latency(text: str) -> float:
    """`0.5x`, half of the float model's latency, as 0.5: what `Goal.max_latency` takes.

    Raises:
        ConfigError: the text is not of this form, or 0.
    """
    found = _RATIO.fullmatch(text)
    ratio = float(found[1]) if found else 0.0
    if ratio <= 0:
        raise ConfigError(f"--max-latency {text!r}: give it relative to the float model's, as 0.5x")
    return ratio


@dataclass(frozen=True, eq=False)
class Latencies:
    """Of the units and candidates of a table; all relative to the whole float model's latency.

    Attributes:
        nodes: float64 [units, candidates]; inf where a unit cannot have a candidate.
        rest: what the float model does beside these nodes.
        float_seconds: of one run of the float model, median.
        notes: what was not measured, one line each, for the user.
    """

    nodes: Array
    rest: float
    float_seconds: float
    notes: tuple[str, ...] = ()

    def table(self) -> Array:
        """The latencies whose sum over the units is that of the whole model, the rest included.

        The rest is spread evenly: it is the same whatever is chosen. So the bound of
        `Goal.max_latency` and what `Allocation.latency` says are ratios to the float model.
        """
        return self.nodes + self.rest / max(len(self.nodes), 1)


@dataclass(eq=False)
class MeasureLatencies:
    """What `allocate` takes as `latency`, and its `whole` as `timed`; keeps what it found.

    Args: as for `node_latencies`.
    """

    model: Model
    feed: Feed
    threads: int | None = None
    rounds: int = ROUNDS
    seconds: float = SECONDS
    clock: Clock = time.perf_counter
    progress: Progress | None = None
    found: Latencies | None = field(default=None, init=False)

    def __call__(self, table: Table) -> Array:
        """`Latencies.table` of a table."""
        self.found = node_latencies(
            self.model,
            table,
            self.feed,
            threads=self.threads,
            rounds=self.rounds,
            seconds=self.seconds,
            clock=self.clock,
            progress=self.progress,
        )
        return self.found.table()

    def whole(self, trial: Trial, plan: Plan) -> float:
        """What `allocate` takes as `timed`: the whole model, run in turns with the float one."""
        made = open_session(trial.write(plan), threads=self.threads)
        times = time_in_turns(
            [Runner(session, self.feed) for session in (trial.reference, made)],
            warmup=2,
            rounds=2 * self.rounds,
            seconds=_FOR_SHARES * self.seconds,
            clock=self.clock,
        )
        return quartiles(paired_ratios(times)[:, 1]).median


def node_latencies(
    model: Model,
    table: Table,
    feed: Feed,
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Latencies:
    """Time each node with each candidate, cut out of the model that the candidate makes.

    A node is cut out with the bias and the activation that onnxruntime fuses with it, and runs on
    the shapes that `feed` gives it. Shares of the float nodes in the float model's latency come
    from rounds that run the whole model and each of its nodes; the candidate's ratio to the float
    node from rounds that run the two. What a call takes by itself is subtracted. What differs in
    weights alone, also after onnxruntime's optimization, is timed once: of float compute hardly
    anything is left to time.

    Activations that several nodes quantize together, or take outlier columns out of, count for
    each of them, and so do changes of layout that onnxruntime makes once for neighbours. If the
    nodes alone take longer than the model, all are made shorter alike. Nodes in bodies of If, Loop
    and Scan and nodes that do not run alone are taken to need the mean time per product.

    Args:
        model: canonical; only read.
        table: made from it.
        feed: one sample.
        threads: of onnxruntime.
        rounds: of each comparison.
        seconds: for all comparisons together, about; each has at least three rounds.
        clock: seconds.
        progress: called with ("latency", done, total).

    Raises:
        CalibrationError: the model does not run on the feed.
        ValidationError: the model does not load.
        ConfigError: the table was made for another model, or holds static activations.
    """
    if any(e.activations == "static" for unit in table.units for e in unit.entries):
        raise ConfigError(
            "latencies of static activations cannot be measured before ranges are calibrated: use "
            "--activations dynamic or none with --max-latency and --minimize latency"
        )
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder, Trial(model, (), threads) as trial:
        timer = Timer(Path(folder) / "optimized.onnx", threads, rounds, clock)
        nodes = _Nodes(model, table, feed, trial.write(Plan(nodes=[])), timer)
        steps = len(table.candidates) + 1
        if progress is not None:
            progress("latency", 0, steps)
        whole = Runner(trial.reference, feed)
        float_seconds = nodes.measure_shares(whole, _FOR_SHARES * seconds)
        found = np.where(np.isfinite(table.products), np.nan, np.inf)
        each = (1 - _FOR_SHARES) * seconds / max(nodes.distinct * (len(table.candidates) - 1), 1)
        for option, candidate in enumerate(table.candidates):
            if progress is not None:
                progress("latency", option + 1, steps)
            there = [u for u in range(len(table.units)) if (u, option) in table.entries]
            if not candidate.quantized:
                found[there, option] = [nodes.share(u) for u in there]
                continue
            made = Excerpts(trial.write(_alone(table, option, there)))
            for unit in there:
                found[unit, option] = nodes.time(unit, made, each)
        if progress is not None:
            progress("latency", steps, steps)
    base = np.array([nodes.share(u) for u in range(len(table.units))])
    return _scaled(table, found, base, float_seconds)


def _alone(table: Table, option: int, there: Sequence[int]) -> Plan:
    """Every unit that can have it with one candidate.

    Of outlier columns, the first ones: which they are makes no difference to the time, so that
    nodes that differ in nothing else are timed once.
    """
    plan = Plan(
        nodes=[
            entry.model_copy(update={"outliers": tuple(range(len(entry.outliers)))})
            for unit in there
            for entry in table.entries[unit, option]
        ]
    )
    for unit in there:
        for entry in table.entries[unit, option]:
            if entry.quantized:
                plan.scales[entry.name] = table.scales[unit, option]
    return plan


def _scaled(table: Table, found: Array, base: Array, float_seconds: float) -> Latencies:
    """With estimates for what could not be timed, and no more than the whole in sum."""
    float_products = np.array(
        [4.0 * unit.weight.size * len(unit.entries) for unit in table.units], np.float64
    )
    known = np.isfinite(base) & (base > 0)
    per_product = float(base[known].sum() / float_products[known].sum()) if known.any() else 0.0
    if not known.any() and len(base):
        per_product = 1.0 / float(float_products.sum())
    missing = np.isnan(found)
    found = np.where(missing, table.products * per_product, found)
    base = np.where(np.isfinite(base), base, float_products * per_product)
    factor = 1.0 / max(float(base.sum()), 1.0)
    names = [unit.name for unit, row in zip(table.units, missing, strict=True) if row.any()]
    notes = []
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"latency estimated from products, not measured: {', '.join(names[:3])}{more}")
    rest = max(1.0 - float(base.sum()) * factor, 0.0)
    return Latencies(found * factor, rest, float_seconds, tuple(notes))


class _Share(NamedTuple):
    """A float node's part of the float model's latency, without and with what a call takes."""

    alone: float
    called: float


class _Nodes:
    """The float nodes of a table's units, each distinct one opened once."""

    def __init__(
        self, model: Model, table: Table, feed: Feed, written: bytes | Path, timer: Timer
    ) -> None:
        self._table, self._timer = table, timer
        sites = match_plan(model, Plan(nodes=[e for unit in table.units for e in unit.entries]))
        self._names = {entry.name: where.node.name for entry, (where, _) in sites}
        self._sharing = Counter(self._names.values())  # recurrent nodes are two entries each
        inner = {entry.name for entry, (where, _) in sites if where.inner}
        excerpts = Excerpts(written)
        places = {e: excerpts.place(n) for e, n in self._names.items() if e not in inner}
        self._places = {name: place for name, place in places.items() if place is not None}
        inputs = dict.fromkeys(i for place in self._places.values() for i in place.inputs)
        observe = observer(model, [feed], _fails)
        self._values = dict(next(iter(observe(list(inputs))))) if inputs else {}
        self._floats: dict[Hashable, Runner] = {}
        self._kinds: dict[str, Hashable] = {}
        for name, place in self._places.items():
            cut = excerpts.cut(place, self._values)
            kind = None if cut is None else timer.kind(cut, self._of(place))
            if kind is None or cut is None:
                continue
            self._kinds[name] = kind
            if kind not in self._floats:
                self._floats[kind] = timer.runner(cut, self._of(place))

    def _of(self, place: Place) -> dict[str, Array]:
        return {name: self._values[name] for name in place.inputs}

    @property
    def distinct(self) -> int:
        """How many nodes differ."""
        return len(self._floats)

    def measure_shares(self, whole: Runner, seconds: float) -> float:
        """Find what part of the whole model each node takes; returns the seconds of the whole."""
        runs = [whole, self._timer.empty(), *self._floats.values()]
        times = self._timer.times(runs, seconds)
        empty = float(np.median(times[:, 1]))
        exact = np.maximum(times[:, :1] - empty, _TICK)
        called = np.median(times[:, 2:] / exact, axis=0)
        alone = np.median(np.maximum(times[:, 2:] - empty, 0.0) / exact, axis=0)
        self._shares = {
            kind: _Share(float(one), float(other))
            for kind, one, other in zip(self._floats, alone, called, strict=True)
        }
        return float(np.median(exact))

    def share(self, unit: int) -> float:
        """A unit's part of the float model's latency; nan if it cannot be timed."""
        return float(
            sum(self._time(e.name, lambda _: 1.0) for e in self._table.units[unit].entries)
        )

    def time(self, unit: int, made: Excerpts, seconds: float) -> float:
        """The same of a unit as it is in another model."""

        def ratio(name: str) -> float:
            place, kind = self._places[name], self._kinds[name]
            cut = made.cut(place, self._values)
            if cut is None:
                return np.nan
            reference = kind, self._floats[kind]
            return self._timer.ratio(reference, cut, self._of(place), seconds)

        return float(sum(self._time(e.name, ratio) for e in self._table.units[unit].entries))

    def _time(self, name: str, ratio: Callable[[str], float]) -> float:
        """By the ratio of both calls: what a call takes by itself falls out of the difference."""
        kind = self._kinds.get(name)
        if kind is None:
            return np.nan
        share = self._shares[kind]
        found = share.alone + (ratio(name) - 1.0) * share.called
        return float(np.maximum(found, 0.0)) / self._sharing[self._names[name]]


def _fails(_index: int, error: ValidationError) -> CalibrationError:
    return CalibrationError(f"latencies: the float model fails on the sample: {error}")
