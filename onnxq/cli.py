"""The command line."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

import onnxq
from onnxq.comparison import compare as run_compare
from onnxq.errors import OnnxqError
from onnxq.feeds import parse_shape
from onnxq.files import write_whole
from onnxq.inspection import inspect as run_inspect
from onnxq.show import progress_bar, show_comparison, show_inspection, show_report

EXIT_BAD_INPUT = 2

app = typer.Typer(
    help="Rewrite an ONNX model into parallel integer-weight basis nodes summed by Add nodes: "
    "small, and still right on stock onnxruntime, without training and without data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Samples: an .npz with one array per input name, samples along the first axis; an "
        "extra array `label` adds the accuracy.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME=1,512",
        help="Shape of a made-up input, where the model leaves dimensions open. Repeatable.",
    ),
]


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The float model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    weight_bits: Annotated[int, typer.Option(help="Bits of each term, 2 to 8.")] = 4,
    terms: Annotated[int, typer.Option(help="Integer terms per weight, 1 to 8.")] = 2,
    activations: Annotated[
        Literal["none", "dynamic"],
        typer.Option(help="none: float compute; dynamic: integer compute, quantized at run time."),
    ] = "dynamic",
    layout: Annotated[
        Literal["parallel", "merged"],
        typer.Option(help="parallel: a node per term, summed by Add; merged: one node."),
    ] = "parallel",
    series: Annotated[
        Literal["auto", "fixed_ratio", "digit", "joint"],
        typer.Option(help="How the scales of the terms relate."),
    ] = "auto",
    block_size: Annotated[
        int | None,
        typer.Option(help="One scale per so many inputs of a channel (with --activations none)."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Quantize only nodes whose name matches. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave nodes whose name matches alone. Repeatable.")
    ] = None,
    data: DataFile = None,
    input_shape: Shapes = None,
    plan: Annotated[
        Path | None, typer.Option(help="Do what this plan says instead of planning.")
    ] = None,
    plan_out: Annotated[
        Path | None, typer.Option(help="Write the plan: JSON, its scales as .npz beside it.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the summary as JSON (.json) or as a page (.html).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Quantize a float model, validate the result on onnxruntime, and write it."""
    console = Console(quiet=quiet, record=report is not None)
    bar, progress = progress_bar(Console(stderr=True, quiet=quiet))
    with nullcontext() if quiet else bar:
        result = onnxq.quantize(
            source,
            target,
            weight_bits=weight_bits,
            terms=terms,
            series=series,
            activations=activations,
            layout=layout,
            block_size=block_size,
            include=include or (),
            exclude=exclude or (),
            data=data,
            input_shapes=dict(map(parse_shape, input_shape or ())),
            plan=plan,
            plan_out=plan_out,
            progress=progress,
        )
    show_report(console, result.report)
    console.print(f"wrote {target}", markup=False, highlight=False)
    if report is not None:
        html = report.suffix.lower() in (".html", ".htm")
        text = console.export_html() if html else result.report.model_dump_json(indent=1) + "\n"
        write_whole(report, text.encode())


@app.command()
def compare(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT.onnx")],
    quantized_model: Annotated[Path, typer.Argument(metavar="QUANT.onnx")],
    data: DataFile = None,
    input_shape: Shapes = None,
    latency: Annotated[bool, typer.Option(help="Also measure the ratio of latencies.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="Threads of onnxruntime; its default if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run both models on the same inputs: errors per output, ratios of size and latency."""
    found = run_compare(
        float_model,
        quantized_model,
        data=data,
        input_shapes=dict(map(parse_shape, input_shape or ())),
        latency=latency,
        threads=threads,
    )
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_comparison(Console(), found)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each candidate node and what would be done, or the terms of a quantized model."""
    found = run_inspect(model)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_inspection(Console(), found)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnxq {onnxq.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; what a user got wrong ends in one line and exit code 2."""
    try:
        app()
    except OnnxqError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)
