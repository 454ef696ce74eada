"""`onnxq sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import onnxq
from onnxq.commands.shared import (
    IMAGES,
    AsJson,
    Channels,
    ImageLayout,
    ImageSize,
    Mean,
    Scale,
    Std,
    Threads,
    given_options,
    parse_images,
    say,
)
from onnxq.show import make_console, progress_bar, show_sweep
from onnxq.sweep import POINTS


def sweep(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The float model.")],
    folder: Annotated[Path, typer.Argument(metavar="OUTDIR", help="A folder to be made.")],
    calibration: Annotated[
        Path, typer.Option(help="Samples to measure on, as for quantize: .npz, or a folder.")
    ],
    points: Annotated[int, typer.Option(help="How many sizes.")] = POINTS,
    activations: Annotated[
        Literal["none", "dynamic"],
        typer.Option(help="none: float compute; dynamic: integer compute."),
    ] = "none",
    latency: Annotated[bool, typer.Option("--latency", help="Also time the points.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the front: .svg, .png or .pdf (needs matplotlib).")
    ] = None,
    threads: Threads = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    image_layout: ImageLayout = None,
    channels: Channels = None,
    as_json: AsJson = False,
) -> None:
    """Find the most exact plan for each of several sizes; any of them is applied by --plan."""
    bar, progress = progress_bar(make_console(stderr=True))
    with bar:
        found = onnxq.sweep_model(
            source,
            folder,
            calibration=calibration,
            images=parse_images(given_options(context, IMAGES)),
            points=points,
            latency=latency,
            draw=picture,
            threads=threads,
            progress=progress,
            activations=activations,
        )
    say(found, show_sweep, as_json=as_json, wrote=folder)
