"""What several commands understand alike, and how they say what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console

from onnxq.errors import ConfigError
from onnxq.feeds import parse_shape
from onnxq.images import ImageOptions
from onnxq.show import make_console

Found = TypeVar("Found", bound=BaseModel)
_THREADS_PER_CORE = 4  # more only take turns, and thousands of them start for minutes


def _limit_threads(count: int | None) -> int | None:
    most = _THREADS_PER_CORE * (os.cpu_count() or 1)
    if count is not None and count > most:
        raise typer.BadParameter(
            f"{count} is more than {most}, {_THREADS_PER_CORE} for each core of this machine"
        )
    return count


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
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, callback=_limit_threads, help="Threads of onnxruntime; its default if not given."
    ),
]

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
IMAGES = ("image_size", "mean", "std", "scale", "image_layout", "channels")


def given_options(context: typer.Context, names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that the user wrote, as they were understood."""
    found = {}
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found[name] = context.params[name]
    return found


def parse_shapes(texts: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """The shapes of --input-shape by input name.

    Raises:
        ConfigError: a text is no NAME=1,512, or an input has two shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in map(parse_shape, texts or ()):
        if shapes.setdefault(name, shape) != shape:
            raise ConfigError(f"--input-shape: input {name!r} has two shapes; give one")
    return shapes


def parse_images(given: dict[str, Any]) -> ImageOptions | None:
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


def say(
    found: Found,
    show: Callable[[Console, Found], None],
    *,
    as_json: bool,
    wrote: Path | None = None,
    quiet: bool = False,
) -> None:
    """Print what was found: JSON alone, or a table and where the result was written."""
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    console = make_console(quiet=quiet)
    show(console, found)
    if wrote is not None:
        console.print(f"wrote {wrote}")
