"""Saving: beside the target, checked, and only then in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import onnx
from onnx import ModelProto, TensorProto

from onnxq.errors import ConfigError, ModelError
from onnxq.model.export import DATA_FIELDS, Skeleton, Stub, export
from onnxq.model.protos import set_text
from onnxq.model.stored import Stored, raw_of
from onnxq.model.types import Model

_EMBED_LIMIT = 1_900 * 2**20
_PROTOBUF_LIMIT = 2**31 - 1
_CHUNK = 16 * 2**20
_PAGE = 4096  # large tensors start on a page, so that a runtime can map them


def to_proto(model: Model) -> ModelProto:
    """The model as one protobuf in memory, all data embedded.

    Raises:
        ModelError: it would pass protobuf's 2 GiB, or the graph cannot be exported.

    """
    skeleton = export(model)
    if skeleton.size > _PROTOBUF_LIMIT:
        raise ModelError(
            f"the model takes {skeleton.size / 2**30:.1f} GiB, more than the 2 GiB of one "
            "protobuf: save it to a path, with external data"
        )
    for stub in skeleton.stubs:
        _embed(stub)
    return skeleton.proto


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write the model to `path`, all or nothing.

    The files are written to a temporary folder beside the target under their final names, flushed
    to disk, checked by `onnx.checker`, given to `verify` (which may load them, and whose error
    stops the save), and only then moved to their places: data first, then the model.

    `external=None` embeds the weights if the model stays below 1.9 GiB, also where the source kept
    them outside (one file is easier to handle); `True` writes initializers to `<name>.data` beside
    the model, one tensor at a time; `False` embeds or fails. A data file that an earlier save left
    beside the target is not deleted.

    Raises:
        ConfigError: the target is the file the model was loaded from, or its data file.
        ModelError: the target cannot be written, or the model is not valid; an existing target is
            untouched.

    """
    target = Path(path)
    data = target.with_name(f"{target.name}.data")
    _check_target(model, target)
    skeleton = export(model)
    if external is None:
        external = skeleton.size >= _EMBED_LIMIT
    if not external and skeleton.size > _PROTOBUF_LIMIT:
        raise ModelError(
            f"{target}: the model takes {skeleton.size / 2**30:.1f} GiB, more than the 2 GiB of "
            "one protobuf: save it with external data"
        )
    if external:
        _check_data(model, data)
    with _one_line(target):
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.onnxq-", dir=target.parent))
    try:
        with _one_line(target):
            _write_files(skeleton, work / target.name, work / data.name if external else None)
        _check_file(work / target.name, target)
        if verify is not None:
            verify(work / target.name)
        with _one_line(target):
            if (work / data.name).exists():
                (work / data.name).replace(data)
            (work / target.name).replace(target)
            _sync_folder(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _one_line(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}") from error


def _check_target(model: Model, target: Path) -> None:
    if target.is_dir():
        raise ModelError(f"cannot write {target}: it is a folder, give a file name")
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {target}: the folder {target.parent} does not exist")
    source = model.source.file
    if source is not None and _same(target, source):
        raise ConfigError(
            f"output path equals the input path {target}: give the output another name"
        )
    for file in model.source.data_files:
        if _same(target, file):
            raise ConfigError(
                f"output path {target} is the external data file of the input model: "
                "give the output another name"
            )


def _check_data(model: Model, data: Path) -> None:
    source = model.source.file
    for file in (*model.source.data_files, *([source] if source is not None else [])):
        if _same(data, file):
            raise ConfigError(
                f"the output's data file {data} would overwrite a file of the input model: "
                "give the output another name"
            )
    if data.is_dir():
        raise ModelError(f"cannot write {data}: it is a folder")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()


def _write_files(skeleton: Skeleton, target: Path, data: Path | None) -> None:
    stubs = skeleton.stubs
    outside = [stub for stub in stubs if stub.initializer] if data is not None else []
    if data is not None and outside:
        with data.open("wb") as file:
            for stub in outside:
                _spill(stub, file, data.name)
            _sync(file)
    for stub in stubs:
        if data is None or not stub.initializer:
            _embed(stub)
    if skeleton.proto.ByteSize() > _PROTOBUF_LIMIT:
        raise ModelError(
            "the model passes protobuf's 2 GiB even with its initializers in an external file: "
            "turn its large Constant nodes into initializers"
        )
    with target.open("wb") as file:
        _put(file, skeleton.proto.SerializeToString(deterministic=True))
        _sync(file)


def _embed(stub: Stub) -> None:
    tensor, holder = stub.tensor, stub.holder
    name = tensor.name
    if isinstance(holder, Stored) and holder.file is None:
        tensor.CopyFrom(holder.tensor)
        set_text(tensor, "name", name)
    else:
        for field in DATA_FIELDS:
            tensor.ClearField(field)
        tensor.raw_data = raw_of(name, holder).tobytes()


def _spill(stub: Stub, file: IO[bytes], location: str) -> None:
    """Append the data of one tensor to the data file, and point the tensor there."""
    align = _PAGE if stub.size >= 16 * _PAGE else 64
    _put(file, bytes(-file.tell() % align))
    offset = file.tell()
    data = raw_of(stub.tensor.name, stub.holder)
    for start in range(0, len(data), _CHUNK):
        _put(file, data[start : start + _CHUNK].data)
    _point(stub.tensor, {"location": location, "offset": str(offset), "length": str(len(data))})


def _point(tensor: TensorProto, entries: dict[str, str]) -> None:
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _put(file: IO[bytes], data: bytes | memoryview) -> None:
    """Every byte of a saved model goes through here."""
    file.write(data)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renames last; not every system lets one open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


def _check_file(file: Path, target: Path) -> None:
    try:
        onnx.checker.check_model(str(file))
    except Exception as error:  # a ValidationError, or what protobuf has to say
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{target} not written, onnx.checker refuses the model: {reason}"
        ) from error
