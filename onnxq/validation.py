"""The checks around a written model: where it may be, that it loads, and runs as the float one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy.typing as npt
import onnx

from onnxq.calibration import Calibration
from onnxq.comparison import Comparison, compare_sessions
from onnxq.errors import ModelError, ValidationError
from onnxq.feeds import Samples, choose_samples
from onnxq.files import check_target, model_bytes
from onnxq.model import Model, save, to_proto
from onnxq.session import input_specs, open_session, run

DataSource = str | Path | Mapping[str, npt.NDArray[Any]] | None


class Validation:
    """Loads a written model beside the float one and compares them.

    The samples are chosen, and the user's data checked, before any long work is done.
    """

    def __init__(
        self,
        reference: Path | bytes,
        data: DataSource,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._reference = reference
        self.samples: Samples | None = None
        self.found: Comparison | None = None
        self.warnings: tuple[str, ...] = ()
        session = open_session(reference)
        self.inputs = input_specs(session)
        try:
            self.samples = choose_samples(session, data, shapes)
        except ValidationError as error:
            self.warnings = (
                f"not validated: the float model fails on made-up inputs ({error}); give --data",
            )

    def runs_on(self, samples: Calibration) -> None:
        """Run the float model on every calibration sample, before any long work on them.

        Raises:
            CalibrationError: it fails on one; names it.
        """
        session = open_session(self._reference)
        for index, feed in enumerate(samples):
            try:
                run(session, feed)
            except ValidationError as error:
                raise samples.failing(index, error) from None

    def __call__(self, written: Path | bytes) -> None:
        """Compare a model that was just written.

        Raises:
            ValidationError: it does not load, or its outputs have other shapes or are not finite.
        """
        actual = open_session(written)
        if self.samples is not None:
            self.found = compare_sessions(open_session(self._reference), actual, self.samples)


class HoldsModel:
    """What a command made, with the model itself in `_model`."""

    _model: Model

    @property
    def model(self) -> onnx.ModelProto:
        """The model that was made, in memory.

        Raises:
            ModelError: it is larger than 2 GiB; work with the file instead.
        """
        return to_proto(self._model)


def write_checked(
    model: Model,
    output: str | os.PathLike[str] | None,
    verify: Callable[[Path | bytes], None],
) -> int:
    """Write a model once `verify` accepts it (or only verify it in memory); its size in bytes.

    Raises:
        ModelError: it cannot be written, or is too large for memory.
        ValidationError: `verify` refuses it; nothing is written then.
    """
    if output is None:
        content = to_proto(model).SerializeToString()
        verify(content)
        return len(content)
    save(model, output, verify=verify)
    return model_bytes(Path(output))


def reference_of(model: str | os.PathLike[str] | onnx.ModelProto) -> Path | bytes:
    """What onnxruntime opens: the path, or the model's bytes."""
    if not isinstance(model, onnx.ModelProto):
        return Path(model)
    try:
        content: bytes = model.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, which has no typed home
        raise ModelError(
            "the model in memory is larger than protobuf's 2 GiB: save it and give its path"
        ) from error
    return content


def check_targets(
    source: Model,
    targets: Mapping[str, str | os.PathLike[str] | None],
    inputs: Mapping[str, object],
) -> None:
    """Find out before the work that a file could not be written, or would overwrite another.

    Args:
        source: the model that was loaded.
        targets: the files that will be written, by how messages name them.
        inputs: what else was read, by how messages name it; what is no path is passed over.

    Raises:
        ConfigError: names the file and what is wrong with it.
    """
    keep = {f"the {name}": Path(file) for name, file in inputs.items() if _is_path(file)}
    if source.source.file is not None:
        keep["the input model"] = source.source.file
    keep |= {f"the input model's data {file}": file for file in source.source.data_files}
    for name, path in targets.items():
        if path is not None:
            check_target(name, Path(path), keep)
            keep[f"the {name}"] = Path(path)


def _is_path(source: object) -> TypeGuard[str | Path]:
    return isinstance(source, (str, Path))


def size_of(model: str | os.PathLike[str] | onnx.ModelProto) -> int:
    """Bytes of a model, external data included."""
    return model.ByteSize() if isinstance(model, onnx.ModelProto) else model_bytes(Path(model))
