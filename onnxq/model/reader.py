"""Reading a model file, or taking over a model from memory, up to a `ModelProto` of our own."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx import ModelProto

from onnxq.errors import ModelError

_PROTOBUF_LIMIT = 2**31


def read_file(path: Path) -> ModelProto:
    """The protobuf of a model file; external data are not read.

    Raises:
        ModelError: the file is missing, a folder, unreadable, empty, truncated or no ONNX model.

    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder: give the .onnx file inside it")
    if not path.exists():
        raise ModelError(f"{path} does not exist: check the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise ModelError(f"{path} is empty: copy or export the model again")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the model: run `git lfs pull`")
    if len(data) >= _PROTOBUF_LIMIT:
        raise ModelError(
            f"{path} is larger than protobuf's 2 GiB: save the model with external data"
        )
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, which has no typed home
        raise ModelError(
            f"{path} is not an ONNX model, or is truncated: copy or export it again"
        ) from error
    check_model(proto, str(path))
    return proto


def copy_of(proto: ModelProto) -> ModelProto:
    """A copy to work on, so that the caller's model stays as it is."""
    own = ModelProto()
    own.CopyFrom(proto)
    check_model(own, "model in memory")
    return own


def check_model(proto: ModelProto, where: str) -> None:
    """What every ONNX model has.

    Raises:
        ModelError: no graph, no IR version, or a newer IR version than the installed onnx reads.

    """
    if not proto.HasField("graph"):
        raise ModelError(f"{where} has no graph: it is not an ONNX model, or is truncated")
    if proto.ir_version < 1:
        raise ModelError(f"{where} has no ir_version: it is not an ONNX model, or is damaged")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{where} has IR version {proto.ir_version}, the installed onnx {onnx.__version__} "
            f"reads up to {onnx.IR_VERSION}: upgrade onnx"
        )


def as_path(source: str | os.PathLike[str]) -> Path:
    """`source` as a path.

    Raises:
        ModelError: it is neither a path nor a model.

    """
    try:
        return Path(source)
    except TypeError as error:
        raise ModelError(
            f"a model is given by its path or as an onnx.ModelProto, not as {type(source).__name__}"
        ) from error
