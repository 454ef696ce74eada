"""Rows that are told apart by their first value, for tests of what reads samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxq.calibration import Calibration, open_calibration
from onnxq.errors import CalibrationError
from onnxq.images import ImageOptions
from onnxq.session import InputSpec

Dims = int | str | None


def spec(name: str, *shape: Dims, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, dtype, shape)


X = spec("x", "N", 3)
TWO = [spec("x", "N", 3), spec("mask", "N", dtype=np.int64)]


def rows(count: int, start: int = 0) -> np.ndarray:
    """[count, 3]; row i is [3i, 3i+1, 3i+2], counted from `start`."""
    return np.arange(3 * start, 3 * (start + count), dtype=np.float32).reshape(count, 3)


def seen(calibration: Calibration) -> list[int]:
    """Which of `rows` an iteration gives."""
    return [int(feed["x"].ravel()[0]) // 3 for feed in calibration]


def refused(source: Any, specs: list[InputSpec], images: ImageOptions | None = None) -> str:
    """The one line with which a source is refused, at once or while iterating."""
    with pytest.raises(CalibrationError) as caught:
        list(open_calibration(source, specs, images))
    message = str(caught.value)
    assert "\n" not in message
    return message


NAN = rows(9)
NAN[4, 1] = np.nan
