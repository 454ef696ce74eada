"""Writing small files so that they are whole or absent."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from onnxq.errors import ConfigError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then rename, so that no reader ever sees half a file.

    Raises:
        ConfigError: the directory is missing or not writable, or the disk is full.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes files that only their owner reads
        Path(temporary).replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()


def model_bytes(path: Path) -> int:
    """Size of a model: its file and the external data files it names."""
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
