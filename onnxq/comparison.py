"""A quantized model against its float model: errors per output, accuracy, size, latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict

from onnxq.errors import ConfigError, ValidationError
from onnxq.feeds import Samples, choose_samples
from onnxq.files import model_bytes
from onnxq.kernels_ref import ErrorSums
from onnxq.session import open_session, run

Array = npt.NDArray[Any]
ModelSource = str | Path | bytes
Progress = Callable[[str, int, int], None]

_LATENCY_RUNS = 30
_LATENCY_SECONDS = 4.0
_FEWEST_ROUNDS = 3  # a median of less says nothing
_CLOCK_TICK = 1e-9  # seconds; a coarse clock may stand still during a run


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class OutputError(_Report):
    """Error measures of one output, over all samples; of the quantized model against the float.

    `cosine` is the mean over samples; `top1_agreement` is there for outputs [batch, classes].
    """

    name: str
    sqnr_db: float
    mae: float
    max_abs_error: float
    relative_error: float
    cosine: float
    top1_agreement: float | None


class Quartiles(_Report):
    """Half of all values lie between `low` and `high`."""

    low: float
    median: float
    high: float


class Comparison(_Report):
    """What `compare` found. Ratios are quantized / float."""

    samples: int
    made_up_inputs: bool
    outputs: tuple[OutputError, ...]
    float_accuracy: float | None = None
    quantized_accuracy: float | None = None
    size_ratio: float
    latency_ratio: float | None = None
    threads: int | None = None


def compare(
    float_model: str | Path,
    quantized_model: str | Path,
    *,
    data: str | Path | Mapping[str, Array] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    latency: bool = True,
    threads: int | None = None,
) -> Comparison:
    """Run both models on the same inputs and measure.

    Args:
        float_model, quantized_model: paths.
        data: samples, an .npz or a mapping input name -> array; without it, seeded inputs.
        input_shapes: shapes for the seeded inputs.
        latency: also time both in turns on the first sample; the median of the ratios of runs
            that were neighbours.
        threads: intra-op threads of both sessions; onnxruntime's default if not given.

    Raises:
        ConfigError: a file is missing, or the data do not fit.
        ValidationError: a model does not load or run, or the outputs differ in number or shape, or
            the quantized ones are not finite.
    """
    for path in (float_model, quantized_model):
        if not Path(path).is_file():
            raise ConfigError(f"model {path}: no such file; check the path")
    reference = open_session(float_model, threads=threads)
    actual = open_session(quantized_model, threads=threads)
    samples = choose_samples(reference, data, input_shapes or {})
    result = compare_sessions(reference, actual, samples)
    sizes = model_bytes(Path(float_model)), model_bytes(Path(quantized_model))
    update: dict[str, Any] = {"size_ratio": sizes[1] / sizes[0], "threads": threads}
    if latency:
        feed = next(iter(samples))
        times = time_in_turns(
            [partial(run, session, feed) for session in (reference, actual)],
            warmup=1,
            rounds=_LATENCY_RUNS,
            seconds=_LATENCY_SECONDS,
        )
        update["latency_ratio"] = quartiles(paired_ratios(times)[:, 1]).median
    return result.model_copy(update=update)


def compare_sessions(
    reference: ort.InferenceSession, actual: ort.InferenceSession, samples: Samples
) -> Comparison:
    """The error part of `compare`; size_ratio is left at 1.

    Raises: as `compare`.
    """
    names = [output.name for output in reference.get_outputs()]
    for what, one, other in (
        ("outputs", names, [output.name for output in actual.get_outputs()]),
        ("inputs", input_names(reference), input_names(actual)),
    ):
        if one != other:
            raise ValidationError(
                f"the two models are no pair: their {what} are {one} and {other}; give a float "
                "model and what was made from it"
            )
    sums, hits = _measure(reference, actual, samples, names)
    accuracy = (None, None) if samples.label is None else tuple(hit / len(samples) for hit in hits)
    return Comparison(
        samples=len(samples),
        made_up_inputs=samples.made_up,
        outputs=tuple(_output_error(name, total) for name, total in sums.items()),
        float_accuracy=accuracy[0],
        quantized_accuracy=accuracy[1],
        size_ratio=1.0,
    )


def _measure(
    reference: ort.InferenceSession,
    actual: ort.InferenceSession,
    samples: Samples,
    names: Sequence[str],
) -> tuple[dict[str, ErrorSums], list[int]]:
    sums: dict[str, ErrorSums] = {}
    hits, seen = [0, 0], 0
    for feed in samples:
        wanted, got = run(reference, feed), run(actual, feed)
        for name, r, a in zip(names, wanted, got, strict=True):
            if isinstance(r, np.ndarray) and r.dtype.kind in "fiub":
                _check_output(name, r, a)
                if r.size:
                    sums.setdefault(name, ErrorSums()).add(r, a)
        if samples.label is not None:
            batch = samples.label[seen : seen + samples.step]
            seen += len(batch)
            for i, outputs in enumerate((wanted, got)):
                hits[i] += int(np.sum(_classes(outputs[0], len(batch)) == batch))
    return sums, hits


def input_names(session: ort.InferenceSession) -> list[str]:
    """Names of the inputs, sorted."""
    return sorted(value.name for value in session.get_inputs())


def _classes(output: Any, samples: int) -> Array:
    if not isinstance(output, np.ndarray) or output.ndim != 2 or len(output) != samples:
        shape = list(output.shape) if isinstance(output, np.ndarray) else type(output).__name__
        raise ConfigError(
            f"data: `label` needs a classifier whose first output is [{samples}, classes] for "
            f"{samples} samples, not {shape}: leave `label` away"
        )
    return np.asarray(np.argmax(output, axis=1))


def _check_output(name: str, reference: Array, actual: Any) -> None:
    kind = actual.dtype.name if isinstance(actual, np.ndarray) else type(actual).__name__
    if kind != reference.dtype.name:
        raise ValidationError(
            f"output {name!r} is {kind}, the float model's {reference.dtype.name}"
        )
    if reference.shape != actual.shape:
        raise ValidationError(
            f"output {name!r} has shape {list(actual.shape)}, the float model's "
            f"{list(reference.shape)}"
        )
    if not np.isfinite(actual[np.isfinite(reference)]).all():
        raise ValidationError(f"output {name!r} has NaN or Inf where the float model has none")


def _output_error(name: str, sums: ErrorSums) -> OutputError:
    return OutputError(
        name=name,
        sqnr_db=sums.sqnr_db,
        mae=sums.mae,
        max_abs_error=sums.max_abs_error,
        relative_error=sums.relative_error,
        cosine=sums.cosine,
        top1_agreement=sums.top1_agreement,
    )


def time_in_turns(
    runs: Sequence[Callable[[], object]],
    *,
    warmup: int,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> Array:
    """Time what may not be timed one after the other, since a machine changes its speed.

    Each round calls every one of `runs` once; which one begins moves on by one each round.

    Args:
        runs: what to time, the reference first.
        warmup: rounds before, not timed.
        rounds: how many to time.
        seconds: no round begins later than this after the first one, but for the first three.
        clock: seconds.
        progress: called as progress("rounds", done, rounds).

    Returns:
        Seconds, float64 [rounds taken, len(runs)], columns in the order of `runs`.
    """
    for _ in range(warmup):
        for call in runs:
            call()
    taken: list[list[float]] = []
    end = clock() + seconds
    while len(taken) < rounds and (len(taken) < _FEWEST_ROUNDS or clock() < end):
        row = [0.0] * len(runs)
        for turn in range(len(runs)):
            index = (len(taken) + turn) % len(runs)
            start = clock()
            runs[index]()
            row[index] = clock() - start
        taken.append(row)
        if progress is not None:
            progress("rounds", len(taken), rounds)
    return np.array(taken, np.float64)


def paired_ratios(times: Array) -> Array:
    """Each time over the reference's time of the same round; column 0 is the reference."""
    ticked = np.maximum(times, _CLOCK_TICK)
    return np.asarray(ticked / ticked[:, :1])


def quartiles(values: Array) -> Quartiles:
    """Median, and the quartiles around it (linear interpolation)."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return Quartiles(low=float(low), median=float(median), high=float(high))
