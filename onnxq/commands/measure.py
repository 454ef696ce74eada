"""`onnxq compare` and `onnxq bench`: models beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.benchmarking import bench as run_bench
from onnxq.commands.shared import AsJson, DataFile, Shapes, Threads, parse_shapes, say
from onnxq.comparison import compare as run_compare
from onnxq.show import make_console, progress_bar, show_benchmark, show_comparison


def compare(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT.onnx")],
    quantized_model: Annotated[Path, typer.Argument(metavar="QUANT.onnx")],
    data: DataFile = None,
    input_shape: Shapes = None,
    latency: Annotated[bool, typer.Option(help="Also measure the ratio of latencies.")] = True,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run both models on the same inputs: errors per output, ratios of size and latency."""
    found = run_compare(
        float_model,
        quantized_model,
        data=data,
        input_shapes=parse_shapes(input_shape),
        latency=latency,
        threads=threads,
    )
    say(found, show_comparison, as_json=as_json)


def bench(
    float_model: Annotated[
        Path, typer.Argument(metavar="FLOAT.onnx", help="What the ratios refer to.")
    ],
    models: Annotated[
        list[Path], typer.Argument(metavar="QUANT.onnx", help="One or more beside it.")
    ],
    data: DataFile = None,
    input_shape: Shapes = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Samples per run, where the inputs leave their first dimension open."),
    ] = None,
    threads: Threads = None,
    warmup: Annotated[int, typer.Option(help="Runs of each model that are not timed.")] = 5,
    runs: Annotated[int, typer.Option(help="Timed runs of each model, in turns.")] = 100,
    seconds: Annotated[
        float, typer.Option(help="Fewer runs if they take longer than this (3 at least).")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side: latency, load time, peak memory, size; ratios to the first."""
    bar, progress = progress_bar(make_console(stderr=True))
    with bar:
        found = run_bench(
            float_model,
            *models,
            data=data,
            input_shapes=parse_shapes(input_shape),
            batch=batch,
            threads=threads,
            warmup=warmup,
            runs=runs,
            seconds=seconds,
            progress=progress,
        )
    say(found, show_benchmark, as_json=as_json)
