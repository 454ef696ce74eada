"""What a split model costs: parts as threads and as processes against the single file.

python benchmarks/parts.py [--only squeezenet] [--seconds 10]

All sessions have one thread, all run on this machine. `one part` is part 0 with nobody to wait
for, in processor time: what a machine of its own would compute, without the transport. The others
are latencies. All are medians (and quartiles) of ratios to the single file, taken in turns.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from real import MODELS, samples
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.files import model_bytes
from onnxq.parts.part import Part
from onnxq.parts.runner import PartsRunner
from onnxq.parts.splitting import split
from onnxq.session import open_session, run

DEMO = Path(__file__).parents[1] / "models" / "digits_repvgg.onnx"
NAMES = ("squeezenet1.1", "mobilenet_v1_0.75_224", "minilm_l6_v2")
COLUMNS = ("parts", "stages", "all-reduces", "KiB each", "part size", "one part", "threads")


class Alone:
    """A rank that takes its own share for the sum."""

    rank, size = 0, 1

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        return array

    def abort(self, reason: str) -> None:
        raise RuntimeError(reason)

    def close(self) -> None:
        pass


def measure(path: Path, feed: dict[str, np.ndarray], parts: int, seconds: float) -> list[str]:
    """A row of the table, but for the name."""
    with tempfile.TemporaryDirectory() as name:
        single, folder = Path(name) / "single.onnx", Path(name) / "parts"
        first = {k: v[:1] for k, v in feed.items()}
        onnxq.quantize(path, single, terms=parts, activations="dynamic", data=first)
        report = split(single, folder, parts=parts)
        session = open_session(single, threads=1)
        with (
            PartsRunner(folder) as threads,
            PartsRunner(folder, backend="processes") as processes,
        ):
            alone = Part(folder, threads.manifest, 0, 1)
            turns = partial(time_in_turns, warmup=2, rounds=500, seconds=seconds / 2)
            whole = partial(run, session, feed)
            work = turns([whole, partial(alone.run, feed, Alone())], clock=time.process_time)
            times = turns([whole, partial(threads.run, feed), partial(processes.run, feed)])
            reduced = threads.reduced_bytes
        ratios = [paired_ratios(work)[:, 1], *paired_ratios(times)[:, 1:].T]
        spread = [quartiles(each) for each in ratios]
        return [
            str(parts),
            str(report.stages),
            str(report.all_reduces),
            f"{reduced / 1024:.0f}",
            f"{report.part_bytes[0] / model_bytes(single):.2f}",
            *(f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})" for found in spread),
        ]


def main(
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    seconds: Annotated[float, typer.Option(help="For each row.")] = 10.0,
) -> None:
    table = Table(title=f"Parts on one machine, {os.cpu_count()} cores", title_justify="left")
    for column in ("model", *COLUMNS, "processes"):
        table.add_column(column, justify="left" if column == "model" else "right")
    feeds = {"digits_repvgg": (DEMO, _digits())}
    feeds |= {
        name: (MODELS / f"{name}.onnx", samples(name, 1))
        for name in NAMES
        if (MODELS / f"{name}.onnx").exists()
    }
    for name, (path, feed) in feeds.items():
        if only in name:
            for parts in (2, 3):
                table.add_row(name, *measure(path, feed, parts, seconds))
    Console(width=150).print(table)


def _digits() -> dict[str, np.ndarray]:
    with np.load(DEMO.with_name("digits_test.npz")) as archive:
        return {name: archive[name][:1] for name in archive.files if name != "label"}


if __name__ == "__main__":
    typer.run(main)
