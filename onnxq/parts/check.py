"""Running the parts of a split model beside the single file, before anyone gets to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnxq.errors import ValidationError
from onnxq.model import load, save
from onnxq.parts.collectives import Collective, ThreadGroup
from onnxq.parts.manifest import Manifest
from onnxq.parts.runner import TIMEOUT, PartsRunner
from onnxq.session import open_session, run

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]


@dataclass(frozen=True)
class Differences:
    """Of the parts from the single file, largest over largest; `reduced_bytes` as PartsRunner.

    `outputs` is from end to end. For `stages` each stage begins with the single file's sums, so
    that roundings do not add up, nor become other integers where a later activation is quantized.
    """

    outputs: float
    stages: float
    reduced_bytes: int


def check_parts(
    folder: Path, source: Path, reference: ort.InferenceSession, feed: Feed
) -> Differences:
    """Compare a split with the model that it was made from.

    Args:
        folder: the split; a file is put into it for a while.
        source: the single file.
        reference: its session.
        feed: an input.

    Raises:
        ValidationError: an output or a sum of the parts has another type or shape than the single
            file's, or is not finite where that is.
    """
    wanted = dict(zip(_outputs(reference), run(reference, dict(feed)), strict=True))
    with PartsRunner(folder) as runner:
        got = runner.run(feed)
        outputs = max((difference(name, got[name], value) for name, value in wanted.items()))
        reduced, manifest = runner.reduced_bytes, runner.manifest
    known = _sums(source, folder / ".single.onnx", manifest, feed)
    expected = [
        np.concatenate([np.asarray(known[entry.name]).reshape(-1) for entry in step.sums])
        for step in manifest.stages
        if step.sums
    ]
    group = ThreadGroup(manifest.parts, TIMEOUT)
    referees = [_Referee(rank, expected) for rank in group.ranks]
    with ThreadPoolExecutor(manifest.parts) as pool:
        ends = list(pool.map(lambda rank: _one_rank(folder, rank, feed), referees))
    last = max(difference(name, ends[0][name], known[name]) for name in wanted)
    return Differences(outputs, max(last, referees[0].difference), reduced)


def _one_rank(folder: Path, rank: Collective, feed: Feed) -> dict[str, Array]:
    with PartsRunner(folder, collective=rank) as runner:
        return runner.run(feed)


class _Referee:
    """A rank that compares each sum with the single file's, and goes on with that."""

    def __init__(self, inner: Collective, expected: Sequence[Array]) -> None:
        self._inner, self._expected = inner, iter(expected)
        self.rank, self.size = inner.rank, inner.size
        self.difference = 0.0

    def all_reduce(self, array: Array) -> Array:
        total = self._inner.all_reduce(array)
        if array.dtype != np.float32:  # shapes, or the name of the split
            return total
        wanted = next(self._expected)
        self.difference = max(self.difference, difference("sum", total, wanted))
        return wanted

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def close(self) -> None:
        self._inner.close()


def _sums(source: Path, target: Path, manifest: Manifest, feed: Feed) -> dict[str, Any]:
    """All sums and outputs of the single file, from a copy of it that gives them out."""
    single = load(source)
    shapes = {entry.name: entry.shape for step in manifest.stages for entry in step.sums}
    given = {tensor.name for tensor in single.graph.outputs}
    for node in single.graph.nodes:
        for tensor in node.outputs:
            if tensor.name in shapes and tensor.name not in given:
                tensor.dtype, tensor.shape = np.float32, shapes[tensor.name]
                single.graph.outputs.append(tensor)
    save(single, target)
    try:
        session = open_session(target)
        return dict(zip(_outputs(session), run(session, dict(feed)), strict=True))
    finally:
        for path in target.parent.glob(f"{target.name}*"):
            path.unlink()


def _outputs(session: ort.InferenceSession) -> list[str]:
    return [value.name for value in session.get_outputs()]


def difference(name: str, got: Any, wanted: Any) -> float:
    """Largest difference over largest value; 0 for what are no numbers.

    Raises:
        ValidationError: type or shape differ, or `got` is not finite where `wanted` is.
    """
    one, other = np.asarray(got), np.asarray(wanted)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise ValidationError(
            f"{name!r} of the parts is {one.dtype} of shape {list(one.shape)}, that of the single "
            f"file {other.dtype} of shape {list(other.shape)}: please report it with the model"
        )
    if one.dtype.kind not in "fiu" or not one.size:
        return 0.0
    finite = np.isfinite(other)
    if not np.isfinite(one[finite]).all():
        raise ValidationError(f"{name!r} of the parts has NaN or Inf: please report it")
    a, b = one[finite].astype(np.float64), other[finite].astype(np.float64)
    largest = max(float(np.abs(b).max(initial=0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(a - b).max(initial=0)) / largest
