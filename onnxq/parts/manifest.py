"""parts.json: what a folder made by `split` holds, stage by stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as Invalid

from onnxq.errors import ConfigError

MANIFEST = "parts.json"
MOST_PARTS = 9999  # four digits in the names of their folders
SPLIT_KEY = "onnxq.split"  # metadata of every stage model: the split that it belongs to

_Shape = tuple[int | None, ...]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputEntry(_Entry):
    """An input of the whole model; `dtype` is numpy's name, `shape` has null for open sizes."""

    name: str
    dtype: str
    shape: _Shape


class SumEntry(_Entry):
    """A float32 tensor that is summed over the parts; `node` is the node that it belongs to."""

    name: str
    node: str
    shape: _Shape


class StageEntry(_Entry):
    """One stage of one part.

    `model` is a path below the folder, or null where the part has nothing to compute. `inputs` are
    inputs of the whole model, sums after earlier stages, and outputs of this part's own earlier
    stages. `partials` gives, by the name of a sum, the output that is this part's share; a sum that
    is not named gets nothing from this part.
    """

    model: Annotated[str, Field(pattern=r"^part\d{1,4}/stage\d{1,6}\.onnx$")] | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    partials: dict[str, str]


class Step(_Entry):
    """A stage of all parts, and the sums that are due after it."""

    parts: tuple[StageEntry, ...]
    sums: tuple[SumEntry, ...]


class Manifest(_Entry):
    """Everything a runner needs to know."""

    format_version: Literal[1] = 1
    onnxq_version: str
    split: str
    parts: Annotated[int, Field(ge=2, le=MOST_PARTS)]
    inputs: tuple[InputEntry, ...]
    outputs: Annotated[tuple[str, ...], Field(min_length=1)]
    stages: tuple[Step, ...]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read and check the manifest of a folder.

        Raises:
            ConfigError: it is missing, damaged, of another version, or contradicts itself.
        """
        path = Path(folder) / MANIFEST
        try:
            found = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror or error}): give a folder made by "
                "`onnxq split`"
            ) from None
        except Invalid as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(
                f"{path}: {place}: {first['msg']}: split the model again with this onnxq"
            ) from None
        found._check(path)
        return found

    def _check(self, path: Path) -> None:
        def fail(what: str) -> ConfigError:
            return ConfigError(f"{path}: {what}: split the model again")

        for s, step in enumerate(self.stages):
            if len(step.parts) != self.parts:
                raise fail(f"stage {s} has {len(step.parts)} parts, not {self.parts}")
        known = [{entry.name for entry in self.inputs} for _ in range(self.parts)]
        for s, step in enumerate(self.stages):
            names = {entry.name for entry in step.sums}
            for k, stage in enumerate(step.parts):
                unknown = {*stage.inputs} - known[k] or {*stage.partials} - names
                unknown = unknown or {*stage.partials.values()} - {*stage.outputs}
                if unknown:
                    raise fail(f"stage {s} of part {k} names {min(unknown)!r}, which is not there")
                if stage.model not in (None, f"part{k}/stage{s:02d}.onnx"):
                    raise fail(f"stage {s} of part {k} is said to be {stage.model}")
                if stage.model is None and stage.outputs:
                    raise fail(f"stage {s} of part {k} has outputs, but no model")
                known[k] |= {*stage.outputs} | names
            orphans = names - {name for stage in step.parts for name in stage.partials}
            if orphans:
                raise fail(f"nothing is added up to {min(orphans)!r} after stage {s}")
        if not any(step.sums for step in self.stages):
            raise fail("nothing is summed over the parts")
        for k, names in enumerate(known):
            if not names.issuperset(self.outputs):
                raise fail(f"an output of the model is computed by no stage of part {k}")
            stages = [step.parts[k] for step in self.stages]
            # a share that went into no sum would be missing from it
            used = {name for stage in stages for name in (*stage.inputs, *stage.partials.values())}
            unused = {name for stage in stages for name in stage.outputs} - used - {*self.outputs}
            if unused:
                raise fail(f"nothing uses {min(unused)!r} of part {k}")
