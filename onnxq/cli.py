"""The command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import onnxq
from onnxq.benchmarking import bench as run_bench
from onnxq.comparison import compare as run_compare
from onnxq.doctor import diagnose
from onnxq.errors import ConfigError, OnnxqError
from onnxq.feeds import parse_shape
from onnxq.files import check_target, write_whole
from onnxq.folding import fold as run_fold
from onnxq.goal import Infeasible
from onnxq.images import ImageOptions
from onnxq.inspection import inspect as run_inspect
from onnxq.options import Options
from onnxq.parts import run_parts_file
from onnxq.parts.runner import TIMEOUT
from onnxq.progressive import TermsReport
from onnxq.show import (
    make_console,
    make_page,
    progress_bar,
    show_benchmark,
    show_comparison,
    show_diagnosis,
    show_fold,
    show_inspection,
    show_report,
    show_split,
    show_sweep,
    show_terms,
)
from onnxq.sweep import POINTS

EXIT_BAD_INPUT = 2
EXIT_INFEASIBLE = 3
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


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ImageSize = Annotated[
    str | None,
    typer.Option(metavar="H,W", help="Images of --calibration: resized and cropped to this."),
]
Mean = Annotated[
    str | None, typer.Option(metavar="M[,M,M]", help="Images: subtracted after --scale.")
]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="Images: divided by, last.")]
Scale = Annotated[
    float | None, typer.Option(help="Images: pixels 0 to 255 times this; 1/255 if not given.")
]
ImageLayout = Annotated[
    Literal["nchw", "nhwc"] | None,
    typer.Option(help="Images: where the channels are; read from the model if not given."),
]
Channels = Annotated[
    Literal["rgb", "bgr"] | None, typer.Option(help="Images: the order of the channels.")
]

PLANNING = tuple(Options.model_fields)
IMAGES = ("image_size", "mean", "std", "scale", "image_layout", "channels")


def _option(name: str, *flags: str, metavar: str | None = None) -> Any:
    """An option whose help is that of the field of `Options`."""
    return typer.Option(*flags, help=Options.model_fields[name].description, metavar=metavar)


@app.command()
def quantize(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The float model.")],
    target_file: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    weight_bits: Annotated[int | None, _option("weight_bits")] = None,
    terms: Annotated[int | None, _option("terms")] = None,
    points: Annotated[str | None, _option("points", metavar="ERROR|SIZE")] = None,
    tolerance: Annotated[str | None, _option("tolerance", metavar="MEASURE=NUMBER")] = None,
    max_size: Annotated[str | None, _option("max_size", metavar="SIZE")] = None,
    max_latency: Annotated[str | None, _option("max_latency", metavar="RATIO")] = None,
    minimize: Annotated[Literal["size", "latency", "error"] | None, _option("minimize")] = None,
    best_effort: Annotated[bool, _option("best_effort", "--best-effort")] = False,
    activations: Annotated[
        Literal["auto", "none", "dynamic", "static"], _option("activations")
    ] = "auto",
    layout: Annotated[Literal["auto", "parallel", "merged"], _option("layout")] = "auto",
    series: Annotated[Literal["auto", "fixed_ratio", "digit", "joint"], _option("series")] = "auto",
    block_size: Annotated[int | None, _option("block_size")] = None,
    offset: Annotated[Literal["auto", "on", "off"], _option("offset")] = "auto",
    centre: Annotated[Literal["auto", "on", "off"], _option("centre")] = "auto",
    priors: Annotated[bool, _option("priors")] = True,
    matmul: Annotated[Literal["auto", "folded", "nbits"], _option("matmul")] = "auto",
    activation_bits: Annotated[int, _option("activation_bits")] = 8,
    activation_terms: Annotated[int, _option("activation_terms")] = 1,
    products: Annotated[str, _option("products", metavar="all|triangular|N")] = "triangular",
    outliers: Annotated[int, _option("outliers")] = 8,
    target: Annotated[
        Literal["auto", "cpu-vnni", "cpu-avx2", "cpu-arm"], _option("target")
    ] = "auto",
    min_runtime: Annotated[str | None, _option("min_runtime", metavar="VERSION")] = None,
    include: Annotated[list[str] | None, _option("include")] = None,
    exclude: Annotated[list[str] | None, _option("exclude")] = None,
    embeddings: Annotated[bool, _option("embeddings", "--embeddings")] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Samples to plan on: an .npz (one array per input name, samples along the first "
            "axis), or a folder of .npz, .npy or images."
        ),
    ] = None,
    clip: Annotated[Literal["absmax", "mse", "mae"], _option("clip")] = "mse",
    rounding: Annotated[Literal["second_order", "nearest"], _option("rounding")] = "second_order",
    affine: Annotated[Literal["mae", "mse", "none"], _option("affine")] = "none",
    bias_correction: Annotated[bool, _option("bias_correction")] = True,
    equalize: Annotated[bool, _option("equalize", "--equalize")] = False,
    ranges: Annotated[
        Literal["minmax", "percentile", "mse", "entropy", "mae"], _option("ranges")
    ] = "minmax",
    effort: Annotated[Literal["fast", "normal", "high"], _option("effort")] = "normal",
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    image_layout: ImageLayout = None,
    channels: Channels = None,
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
    given = _given(context, (*PLANNING, *IMAGES))
    if plan is not None and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ConfigError(
            f"{option} beside --plan: the plan says what is done; edit it, or leave one out"
        )
    if report is not None:
        _check_report(
            report, {"input": source, "output": target_file, "data": data, "plan": plan_out}
        )
    pictures = {name: given.pop(name) for name in IMAGES if name in given}
    console = make_console(quiet=quiet)
    bar, progress = progress_bar(make_console(stderr=True, quiet=quiet))
    with nullcontext() if quiet else bar:
        result = onnxq.quantize(
            source,
            target_file,
            options=Options.checked(**given),
            calibration=calibration,
            images=_pictures(pictures),
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
    console.print(f"wrote {target_file}")


def _pictures(given: dict[str, Any]) -> ImageOptions | None:
    """How images become an input, if the user said anything about it.

    Raises:
        ConfigError: a text is not made of numbers.
    """
    if not given:
        return None
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("mean", "std"):
            fields[name] = _numbers(name, value, float)
        elif name == "image_size":
            size = _numbers(name, value, int)
            if len(size) not in (1, 2) or min(size) < 1:
                raise ConfigError(f"--image-size {value!r}: give H,W, as 224,224")
            fields["size"] = size if len(size) == 2 else size * 2
        else:
            fields[name.removeprefix("image_")] = value
    return ImageOptions(**fields)


def _numbers(name: str, text: str, kind: type[float]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise ConfigError(f"{option} {text!r}: give numbers, separated by commas") from None


def _given(context: typer.Context, names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that the user wrote, as they were understood."""
    found = {}
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found[name] = context.params[name]
    return found


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


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The float model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
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
    as_json: AsJson = False,
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
    as_json: AsJson = False,
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
    as_json: AsJson = False,
) -> None:
    """Show each candidate node and what would be done, or the terms of a quantized model."""
    found = run_inspect(model)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_inspection(make_console(), found)


@app.command()
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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of onnxruntime; its default if not given.")
    ] = None,
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
            images=_pictures(_given(context, IMAGES)),
            points=points,
            latency=latency,
            draw=picture,
            threads=threads,
            progress=progress,
            activations=activations,
        )
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = make_console()
    show_sweep(console, found)
    console.print(f"wrote {folder}")


Terms = Annotated[int, typer.Option(help="How many terms each node shall have.")]


@app.command()
def truncate(
    source: Annotated[
        Path, typer.Argument(metavar="IN.onnx", help="Written by quantize, several terms.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    terms: Terms,
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
) -> None:
    """Keep the first terms of each node; the float model is not needed."""
    made = onnxq.truncate(source, target, terms, data=data, input_shapes=_shapes(input_shape))
    _say_terms(made.report, target, str(source), as_json=as_json)


@app.command()
def extend(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="Written by quantize.")],
    float_model: Annotated[
        Path, typer.Argument(metavar="FLOAT.onnx", help="The model that it was made from.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    terms: Terms,
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
) -> None:
    """Add further terms to what a quantized model has."""
    made = onnxq.extend(
        source, float_model, target, terms, data=data, input_shapes=_shapes(input_shape)
    )
    _say_terms(made.report, target, "the float model", as_json=as_json)


def _say_terms(report: TermsReport, target: Path, against: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
        return
    console = make_console()
    show_terms(console, report, against)
    console.print(f"wrote {target}")


@app.command()
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
    found = onnxq.split(model, folder, parts=parts, data=data, input_shapes=_shapes(input_shape))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = make_console()
    show_split(console, found)
    console.print(f"wrote {folder}")


@app.command("run-parts")
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


@app.command()
def doctor(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show versions, what this CPU computes fast and exactly, and what follows for a plan."""
    found = diagnose(refresh=refresh)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        show_diagnosis(make_console(), found)


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
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer catches Ctrl-C itself, and says nothing
            _stop("interrupted", EXIT_INTERRUPTED)
        sys.exit(code)
    except Infeasible as error:
        _stop(f"{error}; --best-effort writes the closest", EXIT_INFEASIBLE)
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
