"""What a model is run on: the user's samples, or seeded made-up inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnxq.errors import ConfigError, ValidationError
from onnxq.files import read_arrays
from onnxq.session import InputSpec, input_specs, run

Array = npt.NDArray[Any]
Feed = dict[str, Array]

LABEL = "label"
SEED = 0
MADE_UP_SAMPLES = 4
# Sizes tried for symbolic dimensions, the likeliest first; the first axis is taken as the batch.
_SIZES = (64, 224, 32, 16, 128, 320, 512, 8, 3, 1)


@dataclass(frozen=True, eq=False)
class Data:
    """Samples of the user: one array per input, samples along the first axis.

    An array of the input's own rank holds samples along the input's batch axis; one of a rank
    higher holds one whole input per entry. An extra array `label` (integers) gives the classes.
    """

    arrays: Mapping[str, Array]
    ranks: Mapping[str, int]
    label: Array | None
    step: int

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __iter__(self) -> Iterator[Feed]:
        """One feed per sample (or per full batch, where the model's batch size is fixed)."""
        for start in range(0, len(self), self.step):
            here = slice(start, start + self.step)
            yield {
                name: array[start, ...] if array.ndim > self.ranks[name] else array[here]
                for name, array in self.arrays.items()
            }


@dataclass(frozen=True, eq=False)
class Samples:
    """What both models are run on."""

    feeds: Sequence[Feed] | Data
    label: Array | None
    made_up: bool

    def __len__(self) -> int:
        return len(self.feeds)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)

    @property
    def step(self) -> int:
        """Samples per feed."""
        return self.feeds.step if isinstance(self.feeds, Data) else 1


def choose_samples(
    reference: ort.InferenceSession,
    data: str | Path | Mapping[str, Array] | None,
    shapes: Mapping[str, Sequence[int]],
) -> Samples:
    """The user's data, or made-up inputs that the float model accepts.

    Raises:
        ConfigError: the data or the shapes do not fit the model.
        ValidationError: without data, and the float model runs on nothing that was made up.
    """
    specs = input_specs(reference)
    if data is not None:
        if shapes:
            raise ConfigError("--input-shape is for made-up inputs: leave it away with --data")
        loaded = load_data(data, specs)
        try:
            run(reference, next(iter(loaded)))
        except ValidationError as error:
            raise ConfigError(f"{_where(data)}: the float model fails on it: {error}") from None
        return Samples(loaded, loaded.label, made_up=False)
    return Samples(made_up_feeds(specs, shapes, partial(run, reference)), None, made_up=True)


def load_data(source: str | Path | Mapping[str, Array], specs: Sequence[InputSpec]) -> Data:
    """Read samples and check them against a model's inputs.

    Args:
        source: an .npz file or a mapping, input name -> array.
        specs: the model's inputs.

    Raises:
        ConfigError: the file cannot be read, or an array is missing, superfluous, of another dtype
            or shape, of another length than the rest, or holds NaN.
    """
    where = _where(source)
    arrays = (
        read_arrays(Path(source), "data")
        if isinstance(source, (str, Path))
        else {name: np.asarray(array) for name, array in source.items()}
    )
    label = arrays.pop(LABEL, None) if LABEL not in {s.name for s in specs} else None
    if not specs:
        raise ConfigError(f"{where}: the model has no inputs; leave the data away")
    wanted = {spec.name: spec for spec in specs}
    missing = sorted(set(wanted) - set(arrays))
    unknown = sorted(set(arrays) - set(wanted))
    if missing or unknown:
        parts = [f"no array for input {name!r}" for name in missing]
        parts += [f"array {name!r} is no input" for name in unknown]
        raise ConfigError(f"{where}: {'; '.join(parts)} (the inputs are {sorted(wanted)})")
    checked = {name: _check(where, arrays[name], spec) for name, spec in wanted.items()}
    lengths = {name: len(array) for name, array in checked.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ConfigError(f"{where}: the arrays hold different or no numbers of samples: {lengths}")
    samples = next(iter(lengths.values()))
    if label is not None:
        label = _check_label(where, label, samples)
    ranks = {spec.name: len(spec.shape) for spec in specs}
    return Data(checked, ranks, label, _step(where, checked, specs))


def _where(source: str | Path | Mapping[str, Array]) -> str:
    return f"data {source}" if isinstance(source, (str, Path)) else "data"


def _check_label(where: str, label: Array, samples: int) -> Array:
    if label.dtype.kind not in "iu":
        raise ConfigError(
            f"{where}: array {LABEL!r} is {label.dtype.name}; give the classes as integers"
        )
    if label.size != samples:
        raise ConfigError(f"{where}: {label.size} labels for {samples} samples")
    return label.ravel()


def _check(where: str, array: Array, spec: InputSpec) -> Array:
    if spec.dtype is None or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        wanted = "not numeric" if spec.dtype is None else np.dtype(spec.dtype).name
        raise ConfigError(
            f"{where}: array {spec.name!r} is {array.dtype.name}, the input is {wanted}"
        )
    rank = len(spec.shape)
    if array.ndim not in (rank, rank + 1) or array.ndim == 0:
        raise ConfigError(
            f"{where}: array {spec.name!r} has shape {list(array.shape)}, the input "
            f"{list(spec.shape)}: give samples along the first axis"
        )
    own = array.shape[array.ndim - rank :]
    for axis, (have, want) in enumerate(zip(own, spec.shape, strict=True)):
        if isinstance(want, int) and have != want and not (axis == 0 and array.ndim == rank):
            raise ConfigError(
                f"{where}: array {spec.name!r} has shape {list(array.shape)}, the input "
                f"{list(spec.shape)}: dimension {axis} differs"
            )
    if array.dtype.kind in "iu" and np.issubdtype(spec.dtype, np.integer) and array.size:
        limits = np.iinfo(np.dtype(spec.dtype))
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ConfigError(
                f"{where}: array {spec.name!r} holds values outside {np.dtype(spec.dtype).name}, "
                "the input's type"
            )
    with np.errstate(over="ignore"):  # what overflows becomes Inf, and is refused below
        array = np.ascontiguousarray(array.astype(spec.dtype, copy=False))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ConfigError(f"{where}: array {spec.name!r} has NaN or Inf, first in sample {first}")
    return array


def _step(where: str, arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> int:
    """Samples per run: 1, or the model's fixed batch size."""
    fixed = {
        spec.shape[0]
        for spec in specs
        if spec.shape and arrays[spec.name].ndim == len(spec.shape) and _is_int(spec.shape[0])
    }
    whole = any(arrays[spec.name].ndim > len(spec.shape) for spec in specs)
    if whole or not fixed:
        return 1
    step = fixed.pop()
    assert isinstance(step, int)
    samples = len(arrays[specs[0].name])
    if fixed or samples % step:
        raise ConfigError(
            f"{where}: {samples} samples, but the model takes batches of {step}: give a multiple"
        )
    return step


def _is_int(dim: int | str | None) -> bool:
    return isinstance(dim, int)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """`NAME=1,512` -> ("NAME", (1, 512)); `NAME=` is a scalar.

    Raises:
        ConfigError: the text is not of that form.
    """
    name, equals, dims = text.rpartition("=")
    try:
        shape = tuple(int(d) for d in dims.replace("x", ",").split(",") if d)
        if not equals or not name or any(d < 1 for d in shape):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--input-shape {text!r}: give NAME=1,512") from None
    return name, shape


def made_up_feeds(
    specs: Sequence[InputSpec],
    shapes: Mapping[str, Sequence[int]],
    runs: Callable[[Feed], object],
) -> list[Feed]:
    """Seeded inputs that the model accepts: floats from N(0, 1), integers and booleans 0 or 1.

    Args:
        specs: the model's inputs.
        shapes: shapes the user fixed, by input name.
        runs: called with a feed; raises ValidationError if the model does not run on it.

    Raises:
        ConfigError: a fixed shape contradicts the model.
        ValidationError: the model runs on none of the shapes tried; carries the first failure.
    """
    _check_shapes(specs, shapes)
    odd = [spec.name for spec in specs if spec.dtype is None]
    if odd:
        raise ValidationError(f"input {odd[0]!r} is not a numeric tensor")
    first: ValidationError | None = None
    tried: set[tuple[tuple[int, ...], ...]] = set()
    for size in _SIZES:
        concrete = _concrete(specs, shapes, size)
        key = tuple(concrete.values())
        if key in tried:
            continue
        tried.add(key)
        rng = np.random.default_rng(SEED)
        feeds = [_draw(rng, specs, concrete) for _ in range(MADE_UP_SAMPLES)]
        try:
            runs(feeds[0])
        except ValidationError as error:
            first = first or error
        else:
            return feeds
    assert first is not None
    raise first


def _check_shapes(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]) -> None:
    by_name = {spec.name: spec for spec in specs}
    for name, shape in shapes.items():
        if name not in by_name:
            raise ConfigError(f"--input-shape: no input {name!r} (the inputs are {list(by_name)})")
        want = by_name[name].shape
        fits = len(shape) == len(want) and all(
            not isinstance(w, int) or w == s for w, s in zip(want, shape, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"--input-shape {name}={','.join(map(str, shape))}: the input is {list(want)}"
            )


def _concrete(
    specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]], size: int
) -> dict[str, tuple[int, ...]]:
    known: dict[str, int] = {}
    for spec in specs:
        for have, dim in zip(shapes.get(spec.name, ()), spec.shape, strict=False):
            if isinstance(dim, str) and known.setdefault(dim, have) != have:
                raise ConfigError(
                    f"--input-shape: dimension {dim!r} of the model cannot be both {known[dim]} "
                    f"and {have}"
                )
    for spec in specs:
        if spec.shape and isinstance(spec.shape[0], str):
            known.setdefault(spec.shape[0], 1)
    result = {}
    for spec in specs:
        if spec.name in shapes:
            result[spec.name] = tuple(shapes[spec.name])
            continue
        result[spec.name] = tuple(
            dim
            if isinstance(dim, int)
            else known.get(dim, size)
            if isinstance(dim, str)
            else (1 if axis == 0 else size)
            for axis, dim in enumerate(spec.shape)
        )
    return result


def _draw(
    rng: np.random.Generator, specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]
) -> Feed:
    feed: Feed = {}
    for spec in specs:
        shape = shapes[spec.name]
        assert spec.dtype is not None
        try:
            if np.issubdtype(spec.dtype, np.floating):
                feed[spec.name] = np.asarray(rng.standard_normal(shape), spec.dtype)
            else:
                # 0 and 1 are valid in every vocabulary, mask and flag
                feed[spec.name] = np.asarray(rng.integers(0, 2, shape), spec.dtype)
        except (MemoryError, ValueError, OverflowError):
            raise ValidationError(
                f"input {spec.name!r} of shape {list(shape)} cannot be made up: it is too large"
            ) from None
    return feed


class Feeds(Protocol):
    """Samples that can be read more than once."""

    def __len__(self) -> int:
        """How many feeds an iteration gives."""
        ...

    def __iter__(self) -> Iterator[Feed]:
        """One feed per run."""
        ...


def spread(samples: Feeds, most: int) -> list[Feed]:
    """At most so many of the feeds, evenly spread; read in one go, the others not kept."""
    total = len(samples)
    count = min(most, total)
    wanted = {i * total // count for i in range(count)}
    return [feed for i, feed in enumerate(samples) if i in wanted]
