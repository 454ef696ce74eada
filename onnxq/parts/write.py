"""The files of a split model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnxruntime as ort

import onnxq
from onnxq.errors import ConfigError, ModelError
from onnxq.model.export import DATA_FIELDS, Stub, export
from onnxq.model.stored import raw_of
from onnxq.parts.manifest import SPLIT_KEY, InputEntry, Manifest, StageEntry, Step, SumEntry
from onnxq.passes.split_parts import SplitModel, Stage
from onnxq.session import first_line, input_specs

WEIGHTS = "weights.data"  # of one part, beside its stages: each tensor once
_ALIGN = 64


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place if all goes well, and is gone if not.

    Raises:
        ConfigError: it cannot be written; what else happens inside is passed on.
    """
    work: Path | None = None
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)  # mkdtemp makes folders that only their owner reads
        yield work
        if target.exists():
            target.rmdir()
        work.rename(target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def make_manifest(
    made: SplitModel, parts: int, identity: str, reference: ort.InferenceSession
) -> Manifest:
    """What parts.json says.

    Raises:
        ModelError: an input of the model is no tensor.
    """
    inputs = []
    for spec, value in zip(input_specs(reference), reference.get_inputs(), strict=True):
        text = "str" if value.type == "tensor(string)" else None
        dtype = text if spec.dtype is None else np.dtype(spec.dtype).name
        if dtype is None:
            raise ModelError(f"input {spec.name!r} is a {value.type}, which parts cannot take")
        shape = tuple(size if isinstance(size, int) else None for size in spec.shape)
        inputs.append(InputEntry(name=spec.name, dtype=dtype, shape=shape))
    steps = [
        Step(
            parts=tuple(_entry(stage, s, k) for k, stage in enumerate(stages)),
            sums=tuple(
                SumEntry(name=t.output.name, node=t.node, shape=made.shapes[t.output.name])
                for t in sums
            ),
        )
        for s, (stages, sums) in enumerate(zip(made.stages, made.sums, strict=True))
    ]
    return Manifest(
        onnxq_version=onnxq.__version__,
        split=identity,
        parts=parts,
        inputs=tuple(inputs),
        outputs=tuple(value.name for value in reference.get_outputs()),
        stages=tuple(steps),
    )


def _entry(stage: Stage, s: int, k: int) -> StageEntry:
    return StageEntry(
        model=None if stage.model is None else f"part{k}/stage{s:02d}.onnx",
        inputs=stage.inputs,
        outputs=stage.outputs,
        partials=dict(stage.partials),
    )


def write_part(work: Path, stages: Sequence[Stage], k: int, identity: str) -> None:
    """Write the stage models of a part, and one file with the weights of all of them.

    Raises:
        ModelError: onnx.checker refuses a stage.
        OSError: the files cannot be written.
    """
    folder = work / f"part{k}"
    folder.mkdir()
    placed: dict[int, tuple[Any, int]] = {}  # by id, and what has that id; where it lies
    with (folder / WEIGHTS).open("wb") as weights:
        for s, stage in enumerate(stages):
            if stage.model is None:
                continue
            skeleton = export(stage.model)
            for stub in skeleton.stubs:
                _place(stub, weights, placed)
            skeleton.proto.metadata_props.add(key=SPLIT_KEY, value=identity)
            path = folder / f"stage{s:02d}.onnx"
            path.write_bytes(skeleton.proto.SerializeToString(deterministic=True))
    if not placed:
        (folder / WEIGHTS).unlink()
    for path in sorted(folder.glob("*.onnx")):
        try:
            onnx.checker.check_model(str(path))
        except Exception as error:  # a ValidationError, or what protobuf has to say
            raise ModelError(
                f"{path.name} of part {k}: onnx.checker refuses it: {first_line(error)}"
            ) from None


def _place(stub: Stub, weights: IO[bytes], placed: dict[int, tuple[Any, int]]) -> None:
    tensor = stub.tensor
    if not stub.initializer:  # only initializers may lie outside for every reader of the format
        for field in DATA_FIELDS:
            tensor.ClearField(field)
        tensor.raw_data = raw_of(tensor.name, stub.holder).tobytes()
        return
    if id(stub.holder) not in placed:
        weights.write(bytes(-weights.tell() % _ALIGN))
        placed[id(stub.holder)] = (stub.holder, weights.tell())
        weights.write(raw_of(tensor.name, stub.holder).data)
    offset = placed[id(stub.holder)][1]
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", stub.size)):
        tensor.external_data.add(key=key, value=str(value))
