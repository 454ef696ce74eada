"""`onnxq quantize`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import onnxq
from onnxq.commands.shared import (
    IMAGES,
    Channels,
    DataFile,
    ImageLayout,
    ImageSize,
    Mean,
    Quiet,
    Scale,
    Shapes,
    Std,
    given_options,
    parse_images,
    parse_shapes,
)
from onnxq.errors import ConfigError
from onnxq.files import check_target, write_whole
from onnxq.options import Options
from onnxq.show import make_console, make_page, progress_bar, show_report

PLANNING = tuple(Options.model_fields)
_PAGES = (".html", ".htm")


def _option(name: str, *flags: str, metavar: str | None = None) -> Any:
    """An option whose help is that of the field of `Options`."""
    return typer.Option(*flags, help=Options.model_fields[name].description, metavar=metavar)


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
    quiet: Quiet = False,
) -> None:
    """Quantize a float model, validate the result on onnxruntime, and write it."""
    given = given_options(context, (*PLANNING, *IMAGES))
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
            images=parse_images(pictures),
            data=data,
            input_shapes=parse_shapes(input_shape),
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


def _check_report(path: Path, keep: dict[str, Path | None]) -> None:
    if path.suffix.lower() not in (".json", *_PAGES):
        raise ConfigError(f"--report {path}: give a name that ends in .json or .html")
    check_target("report", path, {f"the {name}": file for name, file in keep.items() if file})
