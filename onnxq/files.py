"""Small files: written so that they are whole or absent, and read without surprises."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxq.errors import ConfigError, ModelError


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write each file beside its place, then rename them all: no reader ever sees half a file.

    Raises:
        ConfigError: the directory is missing or not writable, or the disk is full.
    """
    temporary: dict[Path, Path] = {}
    path = next(iter(files))
    try:
        for path, data in files.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporary[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)  # mkstemp makes files that only their owner reads
        for path, written in temporary.items():
            written.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        for written in temporary.values():
            with contextlib.suppress(FileNotFoundError):
                written.unlink()


def check_target(what: str, path: Path, keep: Mapping[str, Path]) -> None:
    """Find out before the work, not after it, that a file could not be written.

    Args:
        what: how messages name the file.
        path: where it will be written.
        keep: files that it must not overwrite, by how messages name them.

    Raises:
        ConfigError: the path is a folder, its folder is missing or not writable, or it is one of
            `keep`.
    """
    if path.is_dir():
        raise ConfigError(f"{what} {path} is a folder: give a file name")
    if not path.parent.is_dir():
        raise ConfigError(f"{what} {path}: the folder {path.parent} does not exist: create it")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{what} {path}: the folder {path.parent} is not writable")
    for name, other in keep.items():
        if path.resolve() == other.resolve() or (path.exists() and _same(path, other)):
            raise ConfigError(f"{what} {path} would overwrite {name}: give another name")


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def read_arrays(path: Path, what: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file; nothing pickled is ever unpickled.

    Raises:
        ConfigError: the file cannot be read, or is no .npz of plain arrays; starts with `what`.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                arrays = {name: archive[name] for name in archive.files}
                if all(isinstance(array, np.ndarray) for array in arrays.values()):
                    return arrays
    except OSError as error:
        raise ConfigError(f"{what} {path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # noqa: S110 - zipfile, zlib and numpy raise whatever comes for damaged files
        pass
    raise ConfigError(f"{what} {path}: not an .npz of plain arrays; write it with numpy.savez")


def model_bytes(path: Path) -> int:
    """Size of a model: its file and the external data files it names.

    Raises:
        ModelError: the file is no ONNX model, or a data file is missing.
    """
    try:
        return _model_bytes(path)
    except OSError as error:
        raise ModelError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # protobuf's DecodeError, which has no typed home
        raise ModelError(f"{path} is not an ONNX model, or is damaged") from error


def _model_bytes(path: Path) -> int:
    proto = onnx.load(str(path), load_external_data=False)
    beside = {
        entry.value
        for tensor in _external_tensors(proto.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = (path, *(path.parent / name for name in beside))
    return sum(file.stat().st_size for file in files)


def _external_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from (t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_location == onnx.TensorProto.EXTERNAL:
                yield attribute.t
            for body in (attribute.g, *attribute.graphs):
                yield from _external_tensors(body)
