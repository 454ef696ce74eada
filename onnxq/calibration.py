"""Calibration samples: what the float model is run on to see the ranges of its activations."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.calibration_sources import (
    IMAGES,
    NPY,
    NPZ,
    Part,
    array_part,
    file_part,
    find_files,
    image_parts,
    iterable_part,
    kept_part,
    kind_of,
    prefix,
)
from onnxq.errors import CalibrationError, ValidationError
from onnxq.feeds import Feed
from onnxq.images import ImageOptions, image_input
from onnxq.session import InputSpec

__all__ = ["Calibration", "CalibrationSource", "ImageOptions", "open_calibration"]

Array = npt.NDArray[Any]
CalibrationSource = str | Path | Mapping[str, Array] | Iterable[Mapping[str, Array]]

FEW_SAMPLES = 8
ENOUGH_SAMPLES = 32


@dataclass(frozen=True, eq=False)
class Calibration:
    """Feeds, one per run, read afresh in each iteration: one sample, or the model's fixed batch.

    Files are read and checked one at a time while iterating, which is when a CalibrationError
    about a later file comes. `parts` is what can be read, `chosen` the rising numbers of the feeds
    that are given; feed i of an iteration is number `chosen[i]` of the source.
    """

    parts: Sequence[Part]
    chosen: Sequence[int]
    where: str = ""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Feed]:
        for part, numbers in groupby(self.chosen, self._part):
            start = self._starts[part]
            yield from self.parts[part].pick(number - start for number in numbers)

    def first(self, count: int) -> Calibration:
        """The same, cut off after `count` feeds.

        Raises:
            ValueError: count < 1.
        """
        if count < 1:
            raise ValueError(f"count is {count}: at least 1")
        return replace(self, chosen=self.chosen[:count])

    def split(self, held_out: int) -> tuple[Calibration, Calibration]:
        """(To fit on, held out): `held_out` feeds are held out, evenly spread over all.

        Raises:
            ValueError: held_out < 1.
            CalibrationError: nothing would be left to fit on.
        """
        if held_out < 1:
            raise ValueError(f"held_out is {held_out}: at least 1")
        count = len(self)
        if held_out >= count:
            raise CalibrationError(
                f"{prefix(self.where)}: of {count} samples, {held_out} cannot be held out: "
                "give more samples"
            )
        # the middles of `held_out` equal stretches; these are longer than 1, so no two coincide
        out = [(2 * i + 1) * count // (2 * held_out) for i in range(held_out)]
        kept = sorted(set(range(count)) - set(out))
        fit, held = ([self.chosen[i] for i in part] for part in (kept, out))
        return replace(self, chosen=fit), replace(self, chosen=held)

    def describe(self, index: int) -> str:
        """What messages call feed `index`: its file, its number in the source, or both."""
        number = self.chosen[index]
        part = self._part(number)
        return self.parts[part].describe(number - self._starts[part])

    def failing(self, index: int, error: ValidationError) -> CalibrationError:
        """What to raise where the float model fails on feed `index`."""
        return CalibrationError(
            f"{prefix(self.describe(index))}: the float model fails on it, mend or remove it "
            f"({error})"
        )

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(part.count for part in self.parts)]

    def _part(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1


def open_calibration(
    source: CalibrationSource, specs: Sequence[InputSpec], images: ImageOptions | None = None
) -> Calibration:
    """Samples for calibration, checked against a model's inputs; labels are ignored.

    The first sample is read at once, later files and items while iterating.

    Args:
        source: one of
            - an .npz file or a mapping, input name -> array with samples along the first axis, by
              the rules of `load_data`;
            - an .npy file, for models of one input: such an array, or one sample without that axis;
            - a folder of .npz files, of .npy files or of images, searched with its subfolders and
              taken in the order of the names; hidden files and other kinds are passed over. One
              file is in memory at a time;
            - an iterable of feeds, input name -> array, exactly as one run of the model takes
              them. It has to give the same feeds in each iteration; only the current one is in
              memory. An iterator (a generator), which can be gone through only once, is read to
              its end now, and all that it gives is kept in memory.
        specs: the model's inputs.
        images: how images become the input; they are for models of one input [batch, channels,
            height, width] or [batch, height, width, channels].

    Raises:
        CalibrationError: the samples cannot be read, are none, or do not fit the model.
    """
    if not specs:
        raise CalibrationError("calibration: the model has no inputs; leave the samples away")
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    kind, files = ("", []) if path is None else _files(path)
    where = str(path or "")
    if kind != IMAGES and images not in (None, ImageOptions()):
        raise CalibrationError(f"{prefix(where)}: holds no images: leave the image options away")
    if path is None:
        parts = [_memory_part(source, specs)]
    elif kind == IMAGES:
        parts = _image_parts(where, files, specs, images or ImageOptions())
    else:
        parts = _array_parts(where, kind, files, specs)
    calibration = Calibration(parts, range(sum(part.count for part in parts)), where)
    first = next(iter(calibration))
    samples = sum(part.count * part.rows for part in parts)
    if path is None and not isinstance(source, Mapping):
        samples *= _batch(first, specs)
    pictures = len(files) if kind == IMAGES else samples
    return replace(calibration, warnings=tuple(_warnings(where, samples, pictures)))


def _memory_part(source: Any, specs: Sequence[InputSpec]) -> Part:
    if isinstance(source, Mapping):
        return array_part(source, specs)
    if isinstance(source, np.ndarray):
        raise CalibrationError(
            f"calibration: is one array; give a mapping {{{specs[0].name!r}: array}}"
        )
    try:
        iter(source)
    except TypeError:
        raise CalibrationError(
            f"calibration: a {type(source).__name__} is no path, no mapping input name -> array, "
            "and no iterable of such"
        ) from None
    part = iterable_part(source, specs)
    if part.count == 0:
        raise CalibrationError("calibration: the iterable gives no samples: give some")
    return part


def _files(path: Path) -> tuple[str, list[Path]]:
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(
            f"{prefix(path)}: cannot be read ({reason}): give an .npz, or a folder of .npz, .npy "
            "or image files"
        ) from None
    return find_files(path) if path.is_dir() else (kind_of(path) or NPZ, [path])


def _array_parts(
    where: str, kind: str, files: Sequence[Path], specs: Sequence[InputSpec]
) -> list[Part]:
    if kind == NPY and len(specs) > 1:
        raise CalibrationError(
            f"{prefix(where)}: holds .npy, but the model has {len(specs)} inputs "
            f"{[spec.name for spec in specs]}: give .npz files with one array per input"
        )
    if len(files) == 1:
        return [kept_part(files[0], specs)]
    return [file_part(path, specs) for path in files]


def _image_parts(
    where: str, files: Sequence[Path], specs: Sequence[InputSpec], options: ImageOptions
) -> list[Part]:
    image = image_input(prefix(where), specs, options)
    dim = specs[0].shape[0]
    batch = dim if isinstance(dim, int) else 1
    if len(files) < batch:
        raise CalibrationError(
            f"{prefix(where)}: {len(files)} images, but the model takes batches of {batch}: "
            "give more"
        )
    return image_parts(files, image, batch)


def _batch(feed: Feed, specs: Sequence[InputSpec]) -> int:
    """Samples in a feed of the user: the first axis is the batch axis of nearly every model."""
    return min((len(feed[spec.name]) for spec in specs if len(spec.shape) > 1), default=1)


def _warnings(where: str, samples: int, pictures: int) -> Iterator[str]:
    begin = prefix(where)
    if pictures > samples:
        yield (
            f"{begin}: {pictures} images do not fill whole batches of the model: the last "
            f"{pictures - samples} are left out"
        )
    if samples < FEW_SAMPLES:
        yield (
            f"{begin} has {samples} sample{'s' * (samples != 1)}: ranges may be too narrow; "
            f"{ENOUGH_SAMPLES} or more are better"
        )
