"""The command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

import onnxq
from onnxq.benchmarking import bench as run_bench
from onnxq.comparison import compare as run_compare
from onnxq.errors import ConfigError, OnnxqError
from onnxq.feeds import parse_shape
from onnxq.files import check_target, write_whole
from onnxq.folding import fold as run_fold
from onnxq.inspection import inspect as run_inspect
from onnxq.show import (
    make_console,
    make_page,
    progress_bar,
    show_benchmark,
    show_comparison,
    show_fold,
    show_inspection,
    show_report,
)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_PAGES = (".html", ".htm")

# A wrong option. typer does not export the class; it is click's, or typer's own copy of it.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Rewrite an ONNX model into parallel integer-weight basis nodes summed by Add nodes: "
    "small, and still right on stock onnxruntime, without training and without data.",
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


PLANNING = (
    "weight_bits",
    "terms",
    "activations",
    "layout",
    "min_runtime",
    "series",
    "block_size",
    "include",
    "exclude",
    "embeddings",
)


@app.command()
def quantize(
    context: typer.Context,
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
    min_runtime: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="The oldest onnxruntime that must run the file; the installed one if not given.",
        ),
    ] = None,
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
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Quantize embedding tables too (file size).")
    ] = False,
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
    if plan is not None:
        _check_planned(context)
    if report is not None:
        _check_report(report, {"input": source, "output": target, "data": data, "plan": plan_out})
    console = make_console(quiet=quiet)
    bar, progress = progress_bar(make_console(stderr=True, quiet=quiet))
    with nullcontext() if quiet else bar:
        result = onnxq.quantize(
            source,
            target,
            weight_bits=weight_bits,
            terms=terms,
            series=series,
            activations=activations,
            layout=layout,
            min_runtime=min_runtime,
            block_size=block_size,
            include=include or (),
            exclude=exclude or (),
            embeddings=embeddings,
            data=data,
            input_shapes=_shapes(input_shape),
            plan=plan,
            plan_out=plan_out,
            progress=progress,
        )
    if report is not None:
        html = report.suffix.lower() in _PAGES
        text = make_page(result.report) if html else result.report.model_dump_json(indent=1) + "\n"
        write_whole({report: text.encode()})
    show_report(console, result.report)
    console.print(f"wrote {target}")


def _check_report(path: Path, keep: dict[str, Path | None]) -> None:
    if path.suffix.lower() not in (".json", *_PAGES):
        raise ConfigError(f"--report {path}: give a name that ends in .json or .html")
    check_target("report", path, {f"the {name}": file for name, file in keep.items() if file})


def _shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in map(parse_shape, texts or ()):
        if shapes.setdefault(name, shape) != shape:
            raise ConfigError(f"--input-shape: input {name!r} has two shapes; give one")
    return shapes


def _check_planned(context: typer.Context) -> None:
    """Refuse options that a given plan would silently overrule.

    Raises:
        ConfigError: one of them was given beside --plan.
    """
    for name in PLANNING:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} beside --plan: the plan says what is done; edit it, or leave one out"
            )


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The float model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Only the exact float folds: branches, batch norms, constants. The model stays float."""
    result = run_fold(source, target, data=data, input_shapes=_shapes(input_shape))
    if as_json:
        typer.echo(result.report.model_dump_json(indent=1))
        return
    console = make_console(quiet=quiet)
    show_fold(console, result.report)
    console.print(f"wrote {target}")


@app.command()
def compare(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT.onnx")],
    quantized_model: Annotated[Path, typer.Argument(metavar="QUANT.onnx")],
    data: DataFile = None,
    input_shape: Shapes = None,
    latency: Annotated[bool, typer.Option(help="Also measure the ratio of latencies.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of onnxruntime; its default if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run both models on the same inputs: errors per output, ratios of size and latency."""
    found = run_compare(
        float_model,
        quantized_model,
        data=data,
        input_shapes=_shapes(input_shape),
        latency=latency,
        threads=threads,
    )
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_comparison(make_console(), found)


@app.command()
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
    threads: Annotated[
        int | None, typer.Option(help="Threads of onnxruntime; its default if not given.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Runs of each model that are not timed.")] = 5,
    runs: Annotated[int, typer.Option(help="Timed runs of each model, in turns.")] = 100,
    seconds: Annotated[
        float, typer.Option(help="Fewer runs if they take longer than this (3 at least).")
    ] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure models side by side: latency, load time, peak memory, size; ratios to the first."""
    bar, progress = progress_bar(make_console(stderr=True))
    with bar:
        found = run_bench(
            float_model,
            *models,
            data=data,
            input_shapes=_shapes(input_shape),
            batch=batch,
            threads=threads,
            warmup=warmup,
            runs=runs,
            seconds=seconds,
            progress=progress,
        )
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_benchmark(make_console(), found)


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
        show_inspection(make_console(), found)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack × or a letter of a name
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except OnnxqError as error:
        _stop(str(error), EXIT_BAD_INPUT)
    except _UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        _stop(error.format_message().rstrip(".") + hint, EXIT_BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", EXIT_INTERRUPTED)


def _stop(message: str, code: int) -> NoReturn:
    """One line, whatever a file has put into the message."""
    typer.echo(f"error: {' '.join(message.splitlines())}", err=True)
    sys.exit(code)
