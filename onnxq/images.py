"""A picture file as the image input of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onnxq.errors import CalibrationError
from onnxq.session import InputSpec, first_line

Array = npt.NDArray[Any]
Layout = Literal["nchw", "nhwc"]
ChannelOrder = Literal["rgb", "bgr"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_EIGHT_BIT = 1 / 255
_WANTED = "images fit one float or integer input [batch, channels, height, width]"


@dataclass(frozen=True)
class ImageOptions:
    """How pictures become an input: `(pixel * scale - mean) / std`, pixels from 0 to 255.

    A picture is resized, with its aspect ratio kept (bilinear, antialiased), until it just covers
    `size`, so that the shorter side fits, and is then cropped around its centre.

    `size` is (height, width), for inputs that leave them open. `mean` and `std` hold one value, or
    one per channel in the order of `channels`; empty means 0 and 1. `layout` says where the
    channels are; None takes the axis of the input that is 3 or 1. Inputs of integer type take the
    pixels as they are, without scale.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = _EIGHT_BIT
    layout: Layout | None = None
    channels: ChannelOrder = "rgb"


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An input of rank 4 together with how pictures are made to fit it."""

    name: str
    dtype: type[np.generic]
    size: tuple[int, int]
    depth: int
    layout: Layout
    options: ImageOptions

    def read(self, path: Path) -> Array:
        """The picture as [channels, height, width] (or channels last), in the input's dtype.

        Colours become grey for inputs of one channel; transparency is dropped.

        Raises:
            CalibrationError: the file is no whole 8-bit picture.
        """
        pixels = _pixels(path, self.size, "L" if self.depth == 1 else "RGB")
        if self.options.channels == "bgr":
            pixels = pixels[..., ::-1]
        with np.errstate(over="ignore"):  # what overflows becomes Inf, which is refused later
            if np.issubdtype(self.dtype, np.floating):
                pixels = pixels.astype(np.float32) * np.float32(self.options.scale)
                pixels = pixels - np.array(self.options.mean or 0, np.float32)
                pixels = pixels / np.array(self.options.std or 1, np.float32)
            if self.layout == "nchw":
                pixels = pixels.transpose(2, 0, 1)
            return np.ascontiguousarray(pixels, self.dtype)


def image_input(where: str, specs: Sequence[InputSpec], options: ImageOptions) -> ImageInput:
    """How pictures fit a model.

    Args:
        where: what messages begin with.
        specs: the model's inputs.
        options: the user's options.

    Raises:
        CalibrationError: the model has no single image input, or the options contradict it or
            themselves.
    """
    if len(specs) != 1:
        raise CalibrationError(
            f"{where}: holds images, but the model has {len(specs)} inputs "
            f"{[spec.name for spec in specs]}: give .npz files with one array per input"
        )
    (spec,) = specs
    dtype = spec.dtype
    takes = "no numbers" if dtype is None else f"{np.dtype(dtype).name} {list(spec.shape)}"
    if dtype is None or len(spec.shape) != 4 or not _holds_pixels(dtype):
        raise CalibrationError(
            f"{where}: input {spec.name!r} takes {takes}, but {_WANTED}: give .npz files"
        )
    layout = _layout(where, spec, options.layout)
    axes = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    channels, height, width = (spec.shape[axis] for axis in axes)
    if isinstance(channels, int) and channels not in (1, 3):
        raise CalibrationError(
            f"{where}: input {spec.name!r} takes {takes}, as {layout} {channels} channels, but "
            "pictures have 3 or 1: give .npz files, or another layout"
        )
    depth = channels if isinstance(channels, int) else 3
    _check_values(where, options, depth, dtype)
    size = _size(where, spec.name, (height, width), options.size)
    return ImageInput(spec.name, dtype, size, depth, layout, options)


def _holds_pixels(dtype: type[np.generic]) -> bool:
    return np.can_cast(np.uint8, dtype)


def _layout(where: str, spec: InputSpec, given: Layout | None) -> Layout:
    if given is not None and given not in get_args(Layout):
        raise CalibrationError(f"{where}: image layout {given!r}: give nchw or nhwc")
    first, last = spec.shape[1] in (1, 3), spec.shape[3] in (1, 3)
    if given is None and first == last:
        raise CalibrationError(
            f"{where}: input {spec.name!r} takes {list(spec.shape)}, which does not say where the "
            "channels are: give the layout of images, nchw or nhwc"
        )
    return given or ("nchw" if first else "nhwc")


def _size(
    where: str,
    name: str,
    own: tuple[int | str | None, int | str | None],
    given: tuple[int, int] | None,
) -> tuple[int, int]:
    height, width = own
    if given is None:
        if isinstance(height, int) and isinstance(width, int):
            return height, width
        raise CalibrationError(
            f"{where}: input {name!r} leaves height and width open ({height or '?'} × "
            f"{width or '?'}): give the size of images, height and width"
        )
    if len(given) != 2 or any(not isinstance(side, int) or side < 1 for side in given):
        raise CalibrationError(f"{where}: image size {given}: give height and width in pixels")
    for want, side in zip(own, given, strict=True):
        if isinstance(want, int) and want != side:
            raise CalibrationError(
                f"{where}: image size {given[0]} × {given[1]}, but input {name!r} takes "
                f"{height or '?'} × {width or '?'}: give that, or leave the size away"
            )
    return given


def _check_values(where: str, options: ImageOptions, depth: int, dtype: type[np.generic]) -> None:
    if options.channels not in get_args(ChannelOrder):
        raise CalibrationError(f"{where}: image channels {options.channels!r}: give rgb or bgr")
    for what, numbers in (("mean", options.mean), ("std", options.std)):
        if len(numbers) not in (0, 1, depth):
            raise CalibrationError(
                f"{where}: image {what} has {len(numbers)} values: give 1, or {depth}, one per "
                "channel"
            )
    if not all(map(math.isfinite, (options.scale, *options.mean, *options.std))):
        raise CalibrationError(f"{where}: image scale, mean and std have to be finite")
    if options.scale == 0 or any(value <= 0 for value in options.std):
        raise CalibrationError(f"{where}: image scale cannot be 0, nor std 0 or less")
    plain = not options.mean and not options.std and options.scale in (1, _EIGHT_BIT)
    if not plain and not np.issubdtype(dtype, np.floating):
        raise CalibrationError(
            f"{where}: the input is {np.dtype(dtype).name} and takes the pixels as they are: leave "
            "mean, std and scale of images away"
        )


def _pixels(path: Path, size: tuple[int, int], mode: str) -> Array:
    """[height, width, channels], uint8."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415 - optional
    except ImportError:
        raise CalibrationError(
            f"calibration {path}: reading images needs Pillow: pip install onnxq[images]"
        ) from None
    height, width = size
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                reason = "it has more than 8 bits per channel: convert it"
            else:
                # or Pillow warns that the transparency is lost
                whole = picture.convert("RGBA") if "transparency" in picture.info else picture
                fitted = ImageOps.fit(
                    whole.convert(mode), (width, height), Image.Resampling.BILINEAR
                )
                return np.asarray(fitted).reshape(height, width, -1)
    except UnidentifiedImageError:
        reason = "it is no image, or damaged: mend or remove it"
    except MemoryError:
        reason = f"{height} × {width} pixels do not fit into memory: give a smaller size"
    except OSError as error:
        reason = f"{error.strerror or first_line(error)}: mend or remove it"
    except Exception as error:  # a damaged file brings SyntaxError, struct.error, …
        reason = f"{first_line(error)}: mend or remove it"
    raise CalibrationError(f"calibration {path}: cannot be used as an image ({reason})")
