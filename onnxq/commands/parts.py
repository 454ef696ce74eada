"""`onnxq split` and `onnxq run-parts`: basis models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import onnxq
from onnxq.commands.shared import AsJson, DataFile, Shapes, parse_shapes, say
from onnxq.parts import run_parts_file
from onnxq.parts.runner import TIMEOUT
from onnxq.show import show_split


def split(
    model: Annotated[
        Path, typer.Argument(metavar="QUANT.onnx", help="Written by quantize, layout parallel.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUTDIR", help="A folder to be made.")],
    parts: Annotated[int, typer.Option(help="How many; at most as many as terms.")] = 2,
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
) -> None:
    """Split a model into basis models that run side by side and sum before every nonlinearity."""
    found = onnxq.split(
        model, folder, parts=parts, data=data, input_shapes=parse_shapes(input_shape)
    )
    say(found, show_split, as_json=as_json, wrote=folder)


def run_parts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What split made.")],
    data: Annotated[Path, typer.Option(help="Inputs: an .npz, one array per input name.")],
    output: Annotated[Path, typer.Option(help="Where the outputs go, an .npz.")],
    backend: Annotated[
        Literal["threads", "processes", "mpi", "gloo"],
        typer.Option(help="Where the parts run; mpi and gloo: this process is one rank of a job."),
    ] = "threads",
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime in each part.")] = 1,
    timeout: Annotated[
        float, typer.Option(help="Seconds that parts wait for each other.")
    ] = TIMEOUT,
) -> None:
    """Run a split model on one set of inputs."""
    shapes = run_parts_file(folder, data, output, backend=backend, threads=threads, timeout=timeout)
    for name, shape in shapes.items():
        typer.echo(f"{name}: {list(shape)}")
