"""Columns of a matrix product's input that reach further than the others.

One scale holds for a whole activation, so a few channels of large magnitude, as transformers have
them, take most of the levels from all the others. Taken out of what is quantized, and multiplied in
float with their rows of the weight, they leave the others a smaller range:

    x W = x' W + x[:, S] W[S, :]        x' = x with zeros in the columns S

Zeros are exact in every affine quantization, so x' adds nothing in the columns S, and the sum holds
for every x and every S: a bad choice of columns costs accuracy gained, never correctness.

Source: the mixed-precision decomposition of arXiv 2208.07339 (LLM.int8); the choice of columns by
the range that they leave is derived here.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import AnyArray, FloatArray, IntArray, check_finite

# Tried in turn; between them the range changes little.
COUNTS = (1, 2, 4, 8, 16, 32)
# The error's energy must at least be halved for an extra product, and more columns must shrink the
# range by a tenth of what it is at the most columns.
WORTH, NEAR = 0.7, 1.1


def split_columns(x: FloatArray, columns: IntArray) -> tuple[FloatArray, FloatArray]:
    """(x with zeros in the columns, the columns alone): [..., K] and [..., count], of x's dtype.

    Raises ValueError for columns that are not rising indices of x's last axis.
    """
    check_columns(columns, x.shape[-1])
    others = x.copy()
    others[..., columns] = 0
    return others, x[..., columns]


def check_columns(columns: IntArray, width: int) -> None:
    """Raise ValueError unless columns are rising indices of some, not all, of `width` columns."""
    given = np.asarray(columns)
    if given.size and (given[0] < 0 or given[-1] >= width or (np.diff(given) <= 0).any()):
        raise ValueError(f"columns must rise from 0 to {width - 1} at most, got {given.tolist()}")
    if given.size >= width:
        raise ValueError(f"all {width} columns are taken out; leave some to be quantized")


def column_ranges(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(rmin, rmax) of each column of x [..., K], widened to include 0; zeros for no rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.min(axis=0, initial=0), rows.max(axis=0, initial=0)


def furthest_columns(rmin: FloatArray, rmax: FloatArray, count: int) -> IntArray:
    """The `count` columns that reach furthest from 0, rising; the first of equals."""
    order = np.argsort(-np.maximum(rmax, -rmin), kind="stable")
    return cast("npt.NDArray[np.int64]", np.sort(order[:count]))


def range_left(rmin: FloatArray, rmax: FloatArray, columns: IntArray) -> float:
    """The range of the other columns divided by that of all, 0 … 1; 1 where that is 0.

    The energy of the rounding error falls by its square.
    """
    whole = float(rmax.max() - rmin.min())
    others = np.ones(rmax.size, dtype=bool)
    others[columns] = False
    left = float(rmax.max(where=others, initial=0) - rmin.min(where=others, initial=0))
    return left / whole if whole > 0 else 1.0


def choose_columns(
    rmin: FloatArray, rmax: FloatArray, *, most: int = 8, worth: float = WORTH
) -> IntArray:
    """The columns to take out of a tensor with these ranges per column [K]; none where it pays not.

    The fewest columns that come near the range that `most` of them would leave, at most a sixteenth
    of all: their product costs at least count / K of the whole one, and an addition for any
    number of them. worth: none are taken unless the range shrinks to this part.
    Raises ValueError for ranges that are not finite, do not hold 0 or are no vectors alike.
    """
    _check_ranges(rmin, rmax)
    counts = [count for count in COUNTS if count <= min(most, rmax.size // 16)]
    tried = [furthest_columns(rmin, rmax, count) for count in counts]
    left = [range_left(rmin, rmax, columns) for columns in tried]
    if not left or min(left) > worth:
        return np.zeros(0, np.int64)
    return tried[next(i for i, part in enumerate(left) if part <= min(left) * NEAR)]


def _check_ranges(rmin: AnyArray, rmax: AnyArray) -> None:
    check_finite(rmin, "rmin")
    check_finite(rmax, "rmax")
    if rmin.ndim != 1 or rmin.shape != rmax.shape or (rmin > 0).any() or (rmax < 0).any():
        raise ValueError(
            "rmin <= 0 <= rmax must be two vectors of one length, one value per column"
        )
