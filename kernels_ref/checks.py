"""What every kernel asks of its arguments, with one wording for each complaint."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]
AnyArray = npt.NDArray[Any]

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int) -> None:
    """Raise ValueError unless 2 <= bits <= 8, the widths an int8 or uint8 array can hold."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; give a whole number from {MIN_BITS} to {MAX_BITS}")


def check_term_count(terms: int) -> None:
    """Raise ValueError unless a series has at least one term."""
    if terms < 1:
        raise ValueError(f"terms is {terms}; a series has at least 1 term")


def check_float(x: AnyArray, name: str) -> None:
    """Raise ValueError unless x is a non-empty float32 or float64 array."""
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(f"{name} is {x.dtype}; cast it to float32 or float64 first")
    if x.size == 0:
        raise ValueError(f"{name} has shape {x.shape} and no elements; leave empty tensors as is")


def check_finite(values: AnyArray, name: str) -> None:
    """Raise ValueError where an array holds a NaN or an infinity."""
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} holds NaN or infinity; only finite values can be quantized")


def check_scale(scale: AnyArray, name: str = "scale") -> None:
    """Raise ValueError unless every scale is finite and positive."""
    check_finite(scale, name)
    if not np.all(scale > 0):
        raise ValueError(f"{name} holds values <= 0; every scale must be positive")
