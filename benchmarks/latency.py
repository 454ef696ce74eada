"""Latency of every form of onnxq against float, at one and two threads.

python benchmarks/latency.py [--only squeezenet] [--threads 1,2] [--rounds 20]
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from peers import CALIBRATION, EFFORT, PEERS, sources
from rich.console import Console
from rich.table import Table

from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.feeds import choose_samples
from onnxq.session import open_session, run


def main(
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    threads: Annotated[str, typer.Option(help="Threads of onnxruntime, by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 20,
) -> None:
    EFFORT.append("fast")  # rounding changes no latency
    forms = {name: make for name, make in PEERS.items() if name.startswith("onnxq")}
    counts = [int(text) for text in threads.split(",")]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for name, source, arrays in sources(folder, only):
            calibration = {key: value[:CALIBRATION] for key, value in arrays.items()}
            made = [source]
            for i, make in enumerate(forms.values()):
                made.append(folder / f"{i}.onnx")
                make(source, made[-1], calibration)
            table = Table(title=f"{name}, latency / float", title_justify="left")
            table.add_column("form")
            columns = []
            for count in counts:
                table.add_column(f"{count} thread{'s' * (count > 1)}", justify="right")
                sessions = [open_session(path, threads=count) for path in made]
                feed = next(iter(choose_samples(sessions[0], calibration, {})))
                runs = [partial(run, session, feed) for session in sessions]
                times = time_in_turns(runs, warmup=3, rounds=rounds, seconds=300)
                columns.append([quartiles(c) for c in paired_ratios(times).T[1:]])
            for form, *cells in zip(forms, *columns, strict=True):
                table.add_row(form, *(f"{c.median:.2f} ({c.low:.2f}–{c.high:.2f})" for c in cells))
            Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
