"""Models side by side: latency in turns, load time, peak memory, size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as Invalid

import onnxq
from onnxq.comparison import (
    Array,
    Progress,
    Quartiles,
    input_names,
    paired_ratios,
    quartiles,
    time_in_turns,
)
from onnxq.errors import ConfigError, ValidationError
from onnxq.feeds import Data, Feed, choose_samples, load_data, made_up_feeds
from onnxq.files import model_bytes
from onnxq.session import InputSpec, input_specs, open_session, run

DataSource = str | os.PathLike[str] | Mapping[str, Array] | None


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelBenchmark(_Report):
    """What was measured of one model. Ratios are to the first model.

    `latency_ratio` holds the ratios of each round. `load_ms` is the creation of a session in a
    process of its own; `load_memory` and `peak_memory` are the bytes that this process had resident
    at most after it and after running, above what it held before; null where the system does not
    say. `size` counts external data.
    """

    model: str
    latency_ms: Quartiles
    latency_ratio: Quartiles
    load_ms: float
    load_ratio: float
    load_memory: int | None
    peak_memory: int | None
    memory_ratio: float | None
    size: int
    size_ratio: float


class Benchmark(_Report):
    """What `bench` found; the first model is the reference. `rounds` were timed of each."""

    models: tuple[ModelBenchmark, ...]
    inputs: dict[str, tuple[int, ...]]
    made_up_inputs: bool
    warmup: int
    rounds: int
    threads: int | None = None


class _Own(_Report):
    """What the process of one model prints."""

    load_seconds: float
    load_memory: int | None
    peak_memory: int | None


def bench(
    reference: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    data: DataSource = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    threads: int | None = None,
    warmup: int = 5,
    runs: int = 100,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure models on one input: latency in turns, load time, peak memory, size.

    Args:
        reference, others: paths; the first is what the ratios refer to.
        data: samples, an .npz or a mapping input name -> array, of which the first is run; without
            it, seeded inputs.
        input_shapes: shapes for the seeded inputs.
        batch: samples per run, for inputs whose first dimension is open.
        threads: intra-op threads of each session; onnxruntime's default if not given.
        warmup: runs of each model before those that are timed.
        runs: timed runs of each model.
        seconds: no round of runs begins later than this, but for the first three.
        progress: called as progress(what, done, total).

    Raises:
        ConfigError: a file is missing, an option is out of range, or the data do not fit.
        ModelError: a file is no ONNX model.
        ValidationError: a model does not load or run, or has other inputs than the first.
    """
    _check_options(batch=batch, threads=threads, warmup=warmup, runs=runs, seconds=seconds)
    paths = [Path(path) for path in (reference, *others)]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"model {path}: no such file; check the path")
    sizes = [model_bytes(path) for path in paths]
    sessions = [open_session(path, threads=threads) for path in paths]
    for path, session in zip(paths, sessions, strict=True):
        _check_pair(paths[0], sessions[0], path, session)
    feed = _choose_feed(sessions[0], data, input_shapes or {}, batch)
    for path, session in zip(paths, sessions, strict=True):
        try:
            run(session, feed)
        except ValidationError as error:
            raise ValidationError(f"{path}: {error}") from None
    times = time_in_turns(
        [partial(run, session, feed) for session in sessions],
        warmup=warmup,
        rounds=runs,
        seconds=seconds,
        progress=progress,
    )
    del session, sessions  # their memory is not needed twice
    owns = _measure_alone(paths, feed, threads, progress)
    return Benchmark(
        models=_results(paths, times, owns, sizes),
        inputs={name: array.shape for name, array in feed.items()},
        made_up_inputs=data is None,
        warmup=warmup,
        rounds=len(times),
        threads=threads,
    )


def _check_options(**options: float | None) -> None:
    for name, value in options.items():
        least = 0 if name == "warmup" else 1
        if value is not None and name != "seconds" and value < least:
            raise ConfigError(f"--{name} {value}: must be {least} or more")
        if name == "seconds" and not (value is not None and value > 0):
            raise ConfigError(f"--{name} {value}: must be more than 0")


def _check_pair(
    first: Path, reference: ort.InferenceSession, path: Path, session: ort.InferenceSession
) -> None:
    one, other = input_names(reference), input_names(session)
    if one != other:
        raise ValidationError(
            f"{first} and {path} are no pair: their inputs are {one} and {other}; give a float "
            "model and what was made from it"
        )


def _choose_feed(
    reference: ort.InferenceSession,
    data: DataSource,
    shapes: Mapping[str, Sequence[int]],
    batch: int | None,
) -> Feed:
    source = Path(data) if isinstance(data, os.PathLike) else data
    if batch is None:
        return next(iter(choose_samples(reference, source, shapes)))
    specs = input_specs(reference)
    if not any(map(_is_open, specs)):
        raise ConfigError(
            f"--batch {batch}: no input has an open first dimension (they are "
            f"{ {spec.name: list(spec.shape) for spec in specs} }): leave it away"
        )
    if source is None:
        fixed = _fix_batch(specs, shapes, batch)
        return made_up_feeds(fixed, shapes, partial(run, reference))[0]
    if shapes:
        raise ConfigError("--input-shape is for made-up inputs: leave it away with --data")
    return _first_batch(load_data(source, specs), specs, batch)


def _is_open(spec: InputSpec) -> bool:
    return bool(spec.shape) and not isinstance(spec.shape[0], int)


def _fix_batch(
    specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]], batch: int
) -> list[InputSpec]:
    """The inputs with their open first dimensions, and others of the same symbol, filled in."""
    opened = [spec for spec in specs if _is_open(spec)]
    for spec in opened:
        shape = shapes.get(spec.name)
        if shape and shape[0] != batch:
            raise ConfigError(
                f"--batch {batch} contradicts --input-shape "
                f"{spec.name}={','.join(map(str, shape))}: leave one away"
            )
    symbols = {spec.shape[0] for spec in opened} - {None}
    return [
        replace(
            spec,
            shape=tuple(
                batch if dim in symbols or (dim is None and axis == 0) else dim
                for axis, dim in enumerate(spec.shape)
            ),
        )
        for spec in specs
    ]


def _first_batch(data: Data, specs: Sequence[InputSpec], batch: int) -> Feed:
    feed: Feed = {}
    for spec in specs:
        array = data.arrays[spec.name]
        if array.ndim > len(spec.shape):
            if _is_open(spec):
                raise ConfigError(
                    f"--batch {batch}: array {spec.name!r} holds whole inputs; leave it away, or "
                    "give samples along the input's own first axis"
                )
            feed[spec.name] = array[0, ...]
            continue
        size = spec.shape[0]
        count = size if isinstance(size, int) else batch
        if len(array) < count:
            raise ConfigError(f"--batch {batch}: the data hold only {len(array)} samples")
        feed[spec.name] = array[:count]
    return feed


def _measure_alone(
    paths: Sequence[Path], feed: Feed, threads: int | None, progress: Progress | None
) -> list[_Own]:
    owns = []
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        inputs = Path(folder) / "inputs.npz"
        try:
            np.savez(inputs, *feed.values())
        except OSError as error:
            raise ConfigError(
                f"the inputs cannot be written to {folder} ({error.strerror or error}): make room "
                "or set TMPDIR"
            ) from None
        for path in paths:
            owns.append(_measure_one(path, inputs, list(feed), threads))
            if progress is not None:
                progress("memory", len(owns), len(paths))
    return owns


def _measure_one(path: Path, inputs: Path, names: Sequence[str], threads: int | None) -> _Own:
    """Load time and memory, in a process that has seen no other model."""
    # the child finds this package in its working directory, so paths may not be relative to ours
    home = Path(onnxq.__file__).parents[1]
    command = [sys.executable, "-m", "onnxq.measure_process", str(path.absolute()), str(inputs)]
    done = subprocess.run(  # noqa: S603 - no shell; the arguments are file names and JSON
        [*command, json.dumps(names), "" if threads is None else str(threads)],
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    if done.returncode == 0:
        try:
            return _Own.model_validate_json(done.stdout.strip().splitlines()[-1])
        except (IndexError, Invalid):
            why = "it does not say what it measured"
    raise ValidationError(f"{path}: measuring it in a process of its own fails: {why}")


def _results(
    paths: Sequence[Path], times: Array, owns: Sequence[_Own], sizes: Sequence[int]
) -> tuple[ModelBenchmark, ...]:
    ratios = paired_ratios(times)
    return tuple(
        ModelBenchmark(
            model=str(path),
            latency_ms=quartiles(times[:, i] * 1e3),
            latency_ratio=quartiles(ratios[:, i]),
            load_ms=owns[i].load_seconds * 1e3,
            load_ratio=owns[i].load_seconds / owns[0].load_seconds,
            load_memory=owns[i].load_memory,
            peak_memory=owns[i].peak_memory,
            memory_ratio=_ratio(owns[i].peak_memory, owns[0].peak_memory),
            size=sizes[i],
            size_ratio=sizes[i] / sizes[0],
        )
        for i, path in enumerate(paths)
    )


def _ratio(value: int | None, reference: int | None) -> float | None:
    return None if value is None or not reference else value / reference
