"""Opening models in onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxq.errors import ConfigError, ValidationError

_FATAL_ONLY = 4  # a failed run is raised; onnxruntime would also print it
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class InputSpec:
    """One input: its name, numpy dtype (None if not numeric) and dimensions (str if symbolic)."""

    name: str
    dtype: type[np.generic] | None
    shape: tuple[int | str | None, ...]


# The first onnxruntime that does it on CPU, found by trying 1.19 to 1.31.
CASTS_INT4 = (1, 23)
CONVOLVES_INT8 = (1, 24)  # ConvInteger with int8 activations
FUSES_NBITS = (1, 25)  # DequantizeLinear → MatMul [→ Add] to MatMulNBits, whatever stands around


def runtime_version(text: str | None) -> tuple[int, int]:
    """(major, minor) of a version such as "1.20"; of the installed onnxruntime if None.

    Raises:
        ConfigError: the text is no version.
    """
    try:
        major, minor = (int(part) for part in (text or ort.__version__).split(".")[:2])
        if text is not None and not (1, 20) <= (major, minor) < (10, 0):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--min-runtime {text!r}: give a version of onnxruntime from 1.20 on, as 1.22"
        ) from None
    return major, minor


def open_session(
    model: str | Path | bytes, *, threads: int | None = None, optimize: bool = True
) -> ort.InferenceSession:
    """A CPU session with default options, but for logging (and, if given, threads).

    Raises:
        ValidationError: onnxruntime cannot load the model; carries its first line.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it has nothing to fall back to, and would say so on stdout
        )
        for value in (*session.get_inputs(), *session.get_outputs()):
            _ = value.name, value.shape  # text that is not UTF-8 shows here
        return session
    except Exception as error:  # onnxruntime raises many unrelated types
        name = "the model" if isinstance(model, bytes) else str(model)
        raise ValidationError(f"onnxruntime cannot load {name}: {first_line(error)}") from None


def input_specs(session: ort.InferenceSession) -> list[InputSpec]:
    """The inputs that a run has to give."""
    return [
        InputSpec(i.name, _DTYPES.get(i.type), tuple(d or None for d in i.shape))
        for i in session.get_inputs()
    ]


def run(session: ort.InferenceSession, feed: dict[str, Any]) -> list[Any]:
    """All outputs of one run.

    Raises:
        ValidationError: onnxruntime fails on this input; carries its first line.
    """
    try:
        return list(session.run(None, feed))
    except Exception as error:  # onnxruntime raises many unrelated types
        raise ValidationError(f"the run fails in onnxruntime: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
