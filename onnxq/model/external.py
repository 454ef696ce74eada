"""External data of a model that is being read: where a tensor's bytes are, checked, not loaded."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from onnx import TensorProto

from onnxq.errors import ModelError
from onnxq.model.dtypes import raw_size


def is_external(tensor: TensorProto) -> bool:
    """True if the tensor's bytes are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def locate(tensor: TensorProto, folder: Path | None, where: str) -> tuple[Path, int]:
    """File and byte offset of an external tensor.

    Raises:
        ModelError: the location leaves the model's folder, or the file is missing or too short.

    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"{where}: tensor {tensor.name!r}"
    if folder is None:
        raise ModelError(
            f"{what} lies in the external file {location!r}, but a model given in memory has no "
            "folder: load it from its path"
        )
    if not location or _leaves(location):
        raise ModelError(
            f"{what} has the external location {location!r}, which is not inside the model's "
            "folder: put the data file beside the model and save it again"
        )
    offset = _number(entries.get("offset", "0"), what, "offset")
    size = raw_size(tensor.data_type, tensor.dims)
    length = _number(entries.get("length", str(size)), what, "length")
    if length != size:
        raise ModelError(
            f"{what} needs {size} bytes, but its external data entry says {length}: "
            "export the model again"
        )
    file = folder / location
    try:
        available = file.stat().st_size if file.is_file() else None
    except OSError:
        available = None
    if available is None:
        raise ModelError(
            f"{what}: external data file {file} is missing: put it beside the model again"
        )
    if offset + size > available:
        raise ModelError(
            f"{what} needs bytes {offset} to {offset + size} of {file}, which has only "
            f"{available}: the file is truncated, copy it again"
        )
    return file, offset


def _leaves(location: str) -> bool:
    if PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute():
        return True
    return Path(os.path.normpath(location)).parts[:1] == ("..",)


def _number(text: str, what: str, key: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ModelError(f"{what}: external data {key} {text!r} is not a number of bytes")
    return value
