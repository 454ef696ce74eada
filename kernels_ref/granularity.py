"""How many scales a tensor has: one, one per index of an axis, or one per block along an axis.

The shapes are those of ONNX QuantizeLinear (opset 21): a scalar, a 1-D array, or an array of the
tensor's rank whose `axis` counts blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, check_finite, check_float


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor; scale shape ()."""


@dataclass(frozen=True)
class PerAxis:
    """One scale per index of `axis` (negative counts from the end); scale shape (shape[axis],)."""

    axis: int


@dataclass(frozen=True)
class PerBlock:
    """One scale per `block_size` consecutive elements along `axis`; the last may be shorter.

    The scale has the tensor's shape, with shape[axis] replaced by ceil(shape[axis] / block_size).
    """

    axis: int
    block_size: int

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; give a whole number >= 1")


Granularity = PerTensor | PerAxis | PerBlock


def positive_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front; ValueError where a tensor of that rank has no such axis."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis is {axis}, but the tensor has {rank} axes; use {-rank}..{rank - 1}")
    return axis % rank


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scale (and zero_point) of a tensor of `shape`.

    (), (shape[axis],), or `shape` with shape[axis] -> ceil(shape[axis] / block_size).
    Raises ValueError where the tensor has no such axis. Source: ONNX QuantizeLinear.
    """
    if isinstance(granularity, PerTensor):
        return ()
    axis = positive_axis(granularity.axis, len(shape))
    if isinstance(granularity, PerAxis):
        return (shape[axis],)
    blocks = -(-shape[axis] // granularity.block_size)
    return (*shape[:axis], blocks, *shape[axis + 1 :])


def check_param_shape(
    param: npt.NDArray[Any], shape: tuple[int, ...], granularity: Granularity, name: str
) -> None:
    """Raise ValueError unless `param` has the scale shape of a tensor of `shape`."""
    expected = scale_shape(shape, granularity)
    if param.shape != expected:
        raise ValueError(
            f"{name} has shape {param.shape}, but a tensor of shape {shape} with {granularity} "
            f"needs {expected}; compute it with the same granularity"
        )


def spread(
    param: npt.NDArray[Any], shape: tuple[int, ...], granularity: Granularity
) -> npt.NDArray[Any]:
    """`param` (a scale or zero_point of any dtype) made broadcastable against `shape`.

    PerTensor and PerAxis give a view; PerBlock repeats each value over its block and trims the
    last one. Raises ValueError where param has not the shape of `scale_shape`.
    """
    param = np.asarray(param)
    check_param_shape(param, shape, granularity, "param")
    if isinstance(granularity, PerTensor):
        return param
    axis = positive_axis(granularity.axis, len(shape))
    if isinstance(granularity, PerAxis):
        return param.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    repeated = np.repeat(param, granularity.block_size, axis=axis)
    return repeated[(slice(None),) * axis + (slice(shape[axis]),)]


def reduce_absmax(x: FloatArray, granularity: Granularity) -> FloatArray:
    """Largest |x| over the elements that share a scale.

    x: float32 or float64, any shape, finite. Returns an array of `scale_shape`, of x's dtype.
    Raises ValueError for another dtype, an empty tensor, a missing axis, NaN or infinity.
    """
    rmin, rmax = reduce_range(x, granularity)
    return np.asarray(np.maximum(rmax, -rmin))


def reduce_range(x: FloatArray, granularity: Granularity) -> tuple[FloatArray, FloatArray]:
    """(min(x, 0), max(x, 0)) over the elements that share a scale; errors as `reduce_absmax`."""
    # Imported here: layout needs the granularities, and only this function needs layout.
    from onnxq.kernels_ref.layout import as_rows, from_row_params  # noqa: PLC0415

    check_float(x, "x")
    rows = as_rows(x, granularity)
    rmin, rmax = rows.min(axis=1, initial=0.0), rows.max(axis=1, initial=0.0)
    check_finite(rmin, "x")
    check_finite(rmax, "x")
    return (
        from_row_params(rmin, x.shape, granularity),
        from_row_params(rmax, x.shape, granularity),
    )
