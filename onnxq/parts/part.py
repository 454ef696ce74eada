"""One part of a split model: its sessions, and the way through its stages."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnxq.errors import ConfigError, ValidationError
from onnxq.parts.collectives import Collective
from onnxq.parts.manifest import SPLIT_KEY, Manifest, StageEntry, Step, SumEntry
from onnxq.session import first_line, open_session

Array = npt.NDArray[Any]


class Part:
    """The sessions of one part, opened once.

    Args:
        folder: what `split` made; of the parts only this one has to be there.
        manifest: the folder's.
        index: which part.
        threads: intra-op threads of each session; sessions of one part never run at once.

    Raises:
        ConfigError: a stage is missing, or is not the one that the manifest describes.
        ValidationError: onnxruntime cannot load a stage.
    """

    def __init__(
        self, folder: str | os.PathLike[str], manifest: Manifest, index: int, threads: int
    ) -> None:
        self._manifest, self._index = manifest, index
        self._sessions = [
            _open_stage(Path(folder), manifest, step.parts[index], threads)
            for step in manifest.stages
        ]
        self._last_use = _last_uses(manifest, index)
        self.reduced_bytes = 0  # handed to the collective in the last run

    def run(
        self, feed: Mapping[str, Array], collective: Collective, *, outputs: bool = True
    ) -> dict[str, Array]:
        """Run all stages on one input, sums in between.

        Args:
            feed: the inputs of the whole model.
            collective: this part's rank.
            outputs: False stops after the last sum, for a rank whose outputs nobody reads.

        Returns:
            The outputs of the whole model by name; nothing where `outputs` is False.

        Raises:
            ConfigError: another part failed.
            ValidationError: a stage fails on this input.
        """
        self.reduced_bytes = 0
        known: dict[str, Any] = dict(feed)
        last = max(s for s, step in enumerate(self._manifest.stages) if step.sums)
        for s, (step, session) in enumerate(
            zip(self._manifest.stages, self._sessions, strict=True)
        ):
            if s > last and not outputs:
                return {}
            stage = step.parts[self._index]
            if session is not None:
                known.update(_run_stage(session, s, stage, known))
            if step.sums:
                known.update(self._reduce(step, stage, known, collective))
            for name in self._last_use.get(s, ()):
                known.pop(name, None)
        return {name: known[name] for name in self._manifest.outputs} if outputs else {}

    def _reduce(
        self, step: Step, stage: StageEntry, known: Mapping[str, Any], collective: Collective
    ) -> dict[str, Array]:
        """All sums of a stage in one all-reduce of one flat array."""
        own = {name: np.asarray(known[partial]) for name, partial in stage.partials.items()}
        shapes = {name: array.shape for name, array in own.items()}
        partial = [
            entry
            for entry in step.sums
            if not all(entry.name in part.partials for part in step.parts)
        ]
        if partial:
            shapes |= self._shared_shapes(step, partial, shapes, collective)
        flat = [
            own[entry.name].reshape(-1)
            if entry.name in own
            else np.zeros(math.prod(shapes[entry.name]), np.float32)
            for entry in step.sums
        ]
        given = np.ascontiguousarray(flat[0] if len(flat) == 1 else np.concatenate(flat))
        self.reduced_bytes += given.nbytes
        total = collective.all_reduce(given)
        found, start = {}, 0
        for entry, array in zip(step.sums, flat, strict=True):
            found[entry.name] = total[start : start + array.size].reshape(shapes[entry.name])
            start += array.size
        return found

    def _shared_shapes(
        self,
        step: Step,
        partial: Sequence[SumEntry],
        shapes: Mapping[str, tuple[int, ...]],
        collective: Collective,
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums to which some part adds nothing, as the first that does knows them.

        Sizes that the manifest knows need no exchange; all parts read the same manifest and so
        agree on whether there is one.
        """
        opened = [entry for entry in partial if None in entry.shape]
        found = {
            entry.name: tuple(size or 0 for size in entry.shape)
            for entry in partial
            if entry not in opened
        }
        if opened:
            sizes = [self._told_sizes(step, entry, shapes) for entry in opened]
            told = np.array([size for each in sizes for size in each], np.int64)
            self.reduced_bytes += told.nbytes
            total = collective.all_reduce(told).tolist()
            for entry in opened:
                rank = len(entry.shape)
                found[entry.name], total = tuple(total[:rank]), total[rank:]
        return found

    def _told_sizes(
        self, step: Step, entry: SumEntry, shapes: Mapping[str, tuple[int, ...]]
    ) -> Sequence[int]:
        """The sizes, from the first part that knows them; zeros, which add nothing, from others."""
        first = next(k for k, part in enumerate(step.parts) if entry.name in part.partials)
        return shapes[entry.name] if first == self._index else (0,) * len(entry.shape)


def _open_stage(
    folder: Path, manifest: Manifest, stage: StageEntry, threads: int
) -> ort.InferenceSession | None:
    if stage.model is None:
        return None
    path = folder / stage.model
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: copy the whole part, or split the model again")
    session = open_session(path, threads=threads)
    split = session.get_modelmeta().custom_metadata_map.get(SPLIT_KEY)
    names = {value.name for value in session.get_inputs()}, {v.name for v in session.get_outputs()}
    if split != manifest.split or names != ({*stage.inputs}, {*stage.outputs}):
        raise ConfigError(
            f"{path} belongs to another split than the manifest beside it: copy all of one folder"
        )
    return session


def _run_stage(
    session: ort.InferenceSession, s: int, stage: StageEntry, known: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        made = session.run(list(stage.outputs), {name: known[name] for name in stage.inputs})
    except Exception as error:  # onnxruntime raises many unrelated types
        raise ValidationError(f"stage {s} fails in onnxruntime: {first_line(error)}") from None
    return dict(zip(stage.outputs, made, strict=True))


def _last_uses(manifest: Manifest, index: int) -> dict[int, list[str]]:
    """After which stage each tensor is not needed any more; outputs are always needed."""
    last: dict[str, int] = {}
    for s, step in enumerate(manifest.stages):
        stage = step.parts[index]
        for name in (*stage.inputs, *stage.outputs, *(entry.name for entry in step.sums)):
            last[name] = s
    found: dict[int, list[str]] = {}
    for name, s in last.items():
        if name not in manifest.outputs:
            found.setdefault(s, []).append(name)
    return found
