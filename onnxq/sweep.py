"""The whole front of a model: for each size the least error, each point with its plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from onnxq.allocate import split
from onnxq.candidates import EFFICIENT, Candidate
from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.errors import ConfigError
from onnxq.feeds import Feed
from onnxq.files import write_whole
from onnxq.goal import Allocation, Goal, Infeasible
from onnxq.meter import Measured
from onnxq.model import Model
from onnxq.plan import Plan
from onnxq.report import weight_bits
from onnxq.search import Progress, Refine, Search
from onnxq.sensitivity import Table, measure
from onnxq.session import open_session, run
from onnxq.trial import Trial

POINTS = 9
_ROUNDS = 30
_SECONDS = 10.0


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Point(_Report):
    """One plan. Ratios are to the float model; `latency_ratio` is a median of neighbouring runs.

    `on_front` says that no other point is both smaller and more exact. `plan` is the file of the
    plan, for `--plan`.
    """

    name: str
    size: int
    size_ratio: float
    weight_bits: float
    measured: Measured
    chosen: dict[str, int]
    latency_ratio: float | None = None
    on_front: bool = True
    plan: str | None = None


class Sweep(_Report):
    """The points, the smallest first, and what they were found with."""

    float_bytes: int
    stated: str
    points: tuple[Point, ...]


def sweep(
    model: Model,
    plan: Plan,
    samples: Iterable[Feed],
    *,
    folder: str | Path | None = None,
    points: int = POINTS,
    candidates: Sequence[Candidate] | None = None,
    refine: Refine | None = None,
    judge: Iterable[Feed] | None = None,
    latency: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Find the most exact plan for each of several sizes.

    The sizes lie at equal ratios between the smallest and the most exact quantized model.

    Args:
        model: canonical; only read.
        plan: entries as selected.
        samples: at least one, re-iterable.
        folder: where each point's plan is written, `<name>.json` and `.npz`; made if missing.
        points: how many sizes, at least 2.
        candidates, refine, judge, threads: as for `allocate`.
        latency: also time all points and the float model in turns, on the first sample to judge on.
        progress: called with (what, done, total).

    Raises:
        ConfigError: too few points, or the folder cannot be written.
        ModelError, ValidationError: the model is too large, or does not run.
    """
    if points < 2:
        raise ConfigError(f"--points {points}: give 2 or more")
    if judge is None:
        samples, judge = split(samples, refined=refine is not None)
    table = measure(
        model, plan, candidates or EFFICIENT, samples, threads=threads, progress=progress
    )
    with Trial(model, judge, threads) as trial:
        table = trial.exact_bytes(table, plan)
        found: dict[int, Allocation] = {}
        for done, size in enumerate(_sizes(table, trial, points)):
            if progress is not None:
                progress("sweep", done, points)
            goal = Goal(max_bytes=size, minimize="error")
            search = Search(model, plan, goal, table, trial, refine=refine)
            try:
                made = search.least_error()
            except Infeasible as error:
                made = error.closest
            found.setdefault(made.size, made)
        kept = [found[size] for size in sorted(found)]
        ratios = _latencies(trial, kept, judge, progress) if latency else [None] * len(kept)
        return Sweep(
            float_bytes=trial.float_bytes,
            stated=table.stated,
            points=_points(kept, ratios, trial.float_bytes, folder),
        )


def picture(found: Sweep, path: str | Path) -> None:
    """Draw the front, error over size, as .svg, .png or .pdf.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        figure_of = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'onnxq[plot]'") from None
    figure = figure_of(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for front, style in ((True, "o-"), (False, "x")):
        shown = [point for point in found.points if point.on_front == front]
        axes.plot(
            [point.size_ratio for point in shown],
            [100 * point.measured.relative_error for point in shown],
            style,
            label="front" if front else "smaller or more exact exists",
        )
    for point in found.points:
        error = 100 * point.measured.relative_error
        axes.annotate(f"{point.weight_bits:.1f} bits", (point.size_ratio, error), fontsize=7)
    axes.set(xlabel="size / float size", ylabel="relative error of the output, %", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"picture {path}: cannot be written ({error})") from None


def save_json(found: Sweep, path: str | Path) -> None:
    """Write the sweep as JSON.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_whole({Path(path): (found.model_dump_json(indent=1) + "\n").encode()})


def _sizes(table: Table, trial: Trial, points: int) -> list[int]:
    rest = trial.float_bytes - sum(4 * unit.weight.size for unit in table.units)
    quantized = np.array([c.quantized for c in table.candidates])
    there = np.where(np.isfinite(table.bytes) & quantized, table.bytes, np.nan)
    least, most = np.nanmin(there, axis=1).sum() + rest, np.nanmax(there, axis=1).sum() + rest
    sizes = np.geomspace(least, max(most, least), points)
    sizes[0] *= 1.01  # what is beside the weights is only known once a model is written
    return [int(size) for size in sizes]


def _points(
    found: Sequence[Allocation],
    ratios: Sequence[float | None],
    float_bytes: int,
    folder: str | Path | None,
) -> tuple[Point, ...]:
    target = None if folder is None else Path(folder)
    if target is not None:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"folder {target}: cannot be made ({error.strerror})") from None
    made = []
    for i, (one, ratio) in enumerate(zip(found, ratios, strict=True)):
        assert one.measured is not None
        name = f"point-{i:02}"
        path = None if target is None else target / f"{name}.json"
        if path is not None:
            one.plan.save(path)
        better = (o.measured for o in found[:i] if o.measured is not None)
        made.append(
            Point(
                name=name,
                size=one.size,
                size_ratio=one.size / float_bytes,
                weight_bits=weight_bits(one.plan),
                measured=one.measured,
                chosen=one.chosen,
                latency_ratio=ratio,
                on_front=all(m.energy.value > one.measured.energy.value for m in better),
                plan=None if path is None else str(path),
            )
        )
    return tuple(made)


def _latencies(
    trial: Trial,
    found: Sequence[Allocation],
    feeds: Iterable[Feed],
    progress: Progress | None,
) -> list[float | None]:
    feed = next(iter(feeds))
    sessions = [trial.reference]
    sessions += [open_session(trial.write(one.plan), threads=trial.threads) for one in found]
    runs: list[Callable[[], Any]] = [partial(run, session, feed) for session in sessions]
    times = time_in_turns(runs, warmup=3, rounds=_ROUNDS, seconds=_SECONDS, progress=progress)
    return [quartiles(column).median for column in paired_ratios(times).T[1:]]
