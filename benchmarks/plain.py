"""What plain `onnxq quantize IN OUT`, without data, makes of each model: size and error.

python benchmarks/plain.py [--activations none] [--only squeezenet] [--latency]

The relative error is that of every output, on 12 real samples; the latency that of one sample and
one thread, relative to the float model's: median (quartiles) of runs in turns.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from real import MODELS, samples
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.feeds import choose_samples
from onnxq.session import open_session, run

SAMPLES = 12
ROUNDS, SECONDS = 100, 30.0


def main(
    activations: Annotated[
        Literal["auto", "none", "dynamic"], typer.Option(help="As of quantize.")
    ] = "auto",
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    latency: Annotated[bool, typer.Option("--latency", help="Also measure the latency.")] = False,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    table = Table("model", "size", "relative error", "latency")
    with tempfile.TemporaryDirectory() as folder:
        for path in (p for p in sorted(MODELS.glob("*.onnx")) if only in p.stem):
            made = Path(folder) / path.name
            onnxq.quantize(path, made, activations=activations)
            data = samples(path.stem, SAMPLES)
            found = onnxq.compare(path, made, data=data, latency=False)
            errors = " ".join(f"{100 * output.relative_error:.3g}%" for output in found.outputs)
            ratio = _latency(path, made, data) if latency else "–"
            size = f"{made.stat().st_size / path.stat().st_size:.3f}"
            table.add_row(path.stem, size, errors, ratio)
    Console(width=100).print(table)


def _latency(path: Path, made: Path, data: dict[str, np.ndarray]) -> str:
    sessions = [open_session(file, threads=1) for file in (path, made)]
    feed = next(iter(choose_samples(sessions[0], data, {})))
    runs = [partial(run, session, feed) for session in sessions]
    times = time_in_turns(runs, warmup=3, rounds=ROUNDS, seconds=SECONDS)
    found = quartiles(paired_ratios(times).T[1])
    return f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


if __name__ == "__main__":
    typer.run(main)
