"""Where calibration samples come from, cut into the parts that are read together."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import CalibrationError, ConfigError
from onnxq.feeds import LABEL, Data, Feed, load_data
from onnxq.files import read_arrays
from onnxq.images import SUFFIXES as IMAGE_SUFFIXES
from onnxq.images import ImageInput
from onnxq.session import InputSpec, first_line

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

NPZ, NPY, IMAGES = ".npz", ".npy", "images"
_KIND = {NPZ: NPZ, NPY: NPY, **dict.fromkeys(IMAGE_SUFFIXES, IMAGES)}
_ONE_SAMPLE = ", first in sample 0"  # load_data's words, of no use where there is but one


@dataclass(frozen=True, eq=False)
class Part:
    """Feeds that are read together: of one array file, of one batch of images, or all there are.

    `load` gives `count` feeds of `rows` samples each, the same ones each time.
    """

    where: str
    count: int
    load: Callable[[], Iterable[Feed]]
    rows: int = 1

    def describe(self, index: int) -> str:
        """What messages call a feed."""
        if self.count == 1 and self.where:
            return self.where
        first = index * self.rows
        last = first + self.rows - 1
        name = f"sample {first}" if first == last else f"samples {first} to {last}"
        return f"{self.where}, {name}" if self.where else name

    def pick(self, wanted: Iterable[int]) -> Iterator[Feed]:
        """The feeds of these numbers, which rise.

        Raises:
            CalibrationError: the source does not fit the model, or gives fewer than it did first.
        """
        feeds, seen = iter(self.load()), 0
        for index in wanted:
            for feed in feeds:
                seen += 1
                if seen > index:
                    yield feed
                    break
            else:
                raise CalibrationError(
                    f"{prefix(self.where)}: it gave {self.count} samples when opened and {seen} "
                    "now: it has to give the same ones each time, as a list does"
                )


def prefix(where: str | Path) -> str:
    """What messages begin with."""
    return f"calibration {where}".rstrip()


def array_part(arrays: Mapping[str, Any], specs: Sequence[InputSpec]) -> Part:
    """All samples of a mapping."""
    return _kept("", _data("", arrays, specs))


def kept_part(path: Path, specs: Sequence[InputSpec]) -> Part:
    """The samples of an .npz or .npy, read once and kept in memory."""
    return _kept(str(path), _load(path, specs))


def _kept(where: str, data: Data) -> Part:
    return Part(where, len(data) // data.step, lambda: data, data.step)


def file_part(path: Path, specs: Sequence[InputSpec]) -> Part:
    """The samples of an .npz or .npy; the file is read again each time, and now only its headers.

    Raises:
        CalibrationError: the file is damaged, or its headers do not fit the model.
    """
    load = partial(_load, path, specs)
    shapes = _shapes(path, specs)
    rows = None if shapes is None else _rows(shapes, specs)
    if shapes is None or rows is None:  # what is wrong is said when the file is read
        data = load()
        return Part(str(path), len(data) // data.step, load, data.step)
    return Part(str(path), shapes[specs[0].name][0] // rows, load, rows)


def image_parts(paths: Sequence[Path], image: ImageInput, batch: int) -> list[Part]:
    """Pictures, `batch` of them per run; what does not fill a batch is left out."""
    parts = []
    for start in range(0, len(paths) - batch + 1, batch):
        group = paths[start : start + batch]
        where = str(group[0]) if batch == 1 else f"{group[0]} to {group[-1]}"
        parts.append(Part(where, 1, partial(_load_images, where, group, image), batch))
    return parts


def iterable_part(feeds: Iterable[Any], specs: Sequence[InputSpec]) -> Part:
    """Feeds of the user, checked one by one.

    An iterator, which can be gone through only once, is read to its end and kept in memory.
    """
    if isinstance(feeds, Iterator):
        kept = [
            # the user may fill one buffer again and again
            {name: array.copy() for name, array in feed.items()}
            for feed in _checked(feeds, specs)
        ]
        return Part("", len(kept), lambda: kept)
    return Part("", _length(feeds), lambda: _checked(feeds, specs))


def kind_of(path: Path) -> str | None:
    """`NPZ`, `NPY` or `IMAGES`; None for other files."""
    return _KIND.get(path.suffix.lower())


def find_files(folder: Path) -> tuple[str, list[Path]]:
    """The kind and the paths of the sample files in a folder and its subfolders, sorted.

    Hidden files and folders, and files of other kinds, are passed over.

    Raises:
        CalibrationError: there is none, or there are several kinds.
    """

    def refuse(error: OSError) -> None:
        raise CalibrationError(
            f"{prefix(error.filename)}: cannot be read ({error.strerror})"
        ) from None

    found: dict[str, list[Path]] = {}
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            kind = kind_of(Path(name))
            if kind is not None and not name.startswith("."):
                found.setdefault(kind, []).append(Path(here, name))
    if not found:
        raise CalibrationError(
            f"{prefix(folder)}: no samples in it: give a folder of .npz files, .npy files or "
            f"images ({' '.join(IMAGE_SUFFIXES)})"
        )
    if len(found) > 1:
        counts = " and ".join(f"{len(paths)} {kind}" for kind, paths in sorted(found.items()))
        raise CalibrationError(f"{prefix(folder)}: holds {counts}: keep one kind in a folder")
    ((kind, paths),) = found.items()
    return kind, sorted(paths, key=lambda path: path.relative_to(folder).parts)


def _arrays(
    where: str | Path, given: Mapping[str, Any], specs: Sequence[InputSpec]
) -> dict[str, Array]:
    """What is given for the inputs; labels are not even looked at."""
    arrays: dict[str, Array] = {}
    for name, value in given.items():
        if name == LABEL and LABEL not in {spec.name for spec in specs}:
            continue
        try:
            arrays[name] = np.asarray(value)
        except Exception as error:  # lists of different lengths, tensors on another device, …
            raise CalibrationError(
                f"{prefix(where)}: {name!r} cannot be made a numpy array ({first_line(error)})"
            ) from None
    return arrays


def _data(where: str | Path, given: Mapping[str, Any], specs: Sequence[InputSpec]) -> Data:
    arrays = _arrays(where, given, specs)
    try:
        return load_data(arrays, specs)
    except ConfigError as error:
        raise CalibrationError(f"{prefix(where)}: {str(error).removeprefix('data: ')}") from None


def _load(path: Path, specs: Sequence[InputSpec]) -> Data:
    if path.suffix.lower() == NPY:
        array = _read_npy(path)
        name, rank = specs[0].name, len(specs[0].shape)
        return _data(path, {name: array[None] if array.ndim == rank - 1 else array}, specs)
    try:
        arrays = read_arrays(path, "calibration")
    except ConfigError as error:
        raise CalibrationError(str(error)) from None
    return _data(path, arrays, specs)


def _read_npy(path: Path) -> Array:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
            if isinstance(array, np.ndarray):
                return array
    except OSError as error:
        raise CalibrationError(
            f"{prefix(path)}: cannot be read ({error.strerror or error})"
        ) from None
    except Exception:  # noqa: S110 - numpy raises whatever comes for damaged files
        pass
    raise CalibrationError(
        f"{prefix(path)}: no .npy of a plain array, or damaged; write it with numpy.save"
    )


def _shapes(path: Path, specs: Sequence[InputSpec]) -> dict[str, Shape] | None:
    """The arrays' shapes, from the headers of the file; None where these cannot be had."""
    # numpy and zipfile raise whatever comes; reading the whole file then says what is wrong
    with contextlib.suppress(Exception):
        if path.suffix.lower() == NPY:
            shape: Shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return {specs[0].name: (1, *shape) if len(shape) == len(specs[0].shape) - 1 else shape}
        with zipfile.ZipFile(path) as archive:
            return {
                name.removesuffix(NPY): _header_shape(archive, name) for name in archive.namelist()
            }
    return None


def _header_shape(archive: zipfile.ZipFile, name: str) -> Shape:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        old = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape: Shape = read(file)[0]
        return shape


def _rows(shapes: Mapping[str, Shape], specs: Sequence[InputSpec]) -> int | None:
    """Samples per feed, as `load_data` has them; None where it would refuse the shapes."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    if set(shapes) - ({LABEL} - set(ranks)) != set(ranks):
        return None
    above = {len(shapes[name]) - rank for name, rank in ranks.items()}
    lengths = {shapes[name][:1] for name in ranks}
    if not above <= {0, 1} or len(lengths) != 1 or lengths & {(), (0,)}:
        return None
    batches = {spec.shape[0] for spec in specs if spec.shape}
    fixed = [size for size in batches if isinstance(size, int)]
    if 1 in above or not fixed:
        return 1
    ((samples,),) = lengths
    return fixed[0] if len(fixed) == 1 and samples % fixed[0] == 0 else None


def _load_images(where: str, paths: Sequence[Path], image: ImageInput) -> Iterator[Feed]:
    batch = np.stack([image.read(path) for path in paths])
    if batch.dtype.kind == "f" and not np.isfinite(batch).all():
        raise CalibrationError(
            f"{prefix(where)}: its pixels become Inf in {batch.dtype.name}: check the scale and "
            "std of images"
        )
    yield {image.name: batch}


def _length(feeds: Iterable[Any]) -> int:
    try:
        return len(feeds)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # a loader may have a len() that always fails
        return sum(1 for _ in feeds)


def _checked(feeds: Iterable[Any], specs: Sequence[InputSpec]) -> Iterator[Feed]:
    for index, feed in enumerate(feeds):
        yield _one_run(f"sample {index}", feed, specs)


def _one_run(where: str, feed: Any, specs: Sequence[InputSpec]) -> Feed:
    """What the user gives for one run, checked."""
    names = [spec.name for spec in specs]
    if not isinstance(feed, Mapping):
        raise CalibrationError(
            f"{prefix(where)}: is a {type(feed).__name__}; give for each run a mapping, input name "
            f"-> array (the inputs are {names})"
        )
    arrays = _arrays(where, feed, specs)
    for spec in specs:
        if spec.name in arrays:
            _check_shape(where, spec, arrays[spec.name].shape)
    try:
        # load_data takes an array of a rank higher as one whole input per entry
        whole = {name: array[None] for name, array in arrays.items()}
        return next(iter(_data(where, whole, specs)))
    except CalibrationError as error:
        raise CalibrationError(str(error).removesuffix(_ONE_SAMPLE)) from None


def _check_shape(where: str, spec: InputSpec, shape: Shape) -> None:
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(want, int) or want == have
        for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        batch = " (the batch axis is missing)" if len(shape) == len(spec.shape) - 1 else ""
        raise CalibrationError(
            f"{prefix(where)}: array {spec.name!r} has shape {list(shape)}, the input "
            f"{list(spec.shape)}: give what one run takes{batch}"
        )
