"""Scales, rounding to integers and back, with the meaning of ONNX (De)QuantizeLinear."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import (
    FloatArray,
    IntArray,
    check_bits,
    check_float,
    check_scale,
)
from onnxq.kernels_ref.granularity import Granularity, reduce_absmax, reduce_range, spread

Int8Array = npt.NDArray[np.int8] | npt.NDArray[np.uint8]


def half_range(bits: int) -> int:
    """Largest magnitude h = 2**(bits-1) - 1 of a symmetric term; ValueError outside 2..8."""
    check_bits(bits)
    return (1 << (bits - 1)) - 1


def qrange(bits: int, *, signed: bool = True, narrow: bool = False) -> tuple[int, int]:
    """(qmin, qmax) of an integer type of `bits` bits.

    signed: two's complement; narrow: without its lowest value, so that the range is ±h.
    Raises ValueError for bits outside 2..8 and for a narrow unsigned range, which has no meaning.
    """
    h = half_range(bits)
    if signed:
        return (-h if narrow else -h - 1), h
    if narrow:
        raise ValueError("narrow drops the lowest signed value; do not give it with signed=False")
    return 0, 2**bits - 1


def safe_scale(absmax: FloatArray, levels: int) -> FloatArray:
    """Divide absmax by levels, kept a normal positive number whose product with `levels` is finite.

    A zero absmax gets scale 1 (every q is then 0, and no division by zero is left for later);
    one that would underflow gets the dtype's smallest normal number.
    """
    dtype = absmax.dtype
    scale = np.maximum(absmax / dtype.type(levels), np.finfo(dtype).tiny)
    with np.errstate(over="ignore"):
        too_big = np.isinf(scale * dtype.type(levels))
    scale = np.where(too_big, np.nextafter(scale, dtype.type(0)), scale)
    return np.asarray(np.where(absmax == 0, dtype.type(1), scale), dtype=dtype)


def absmax_scale(x: FloatArray, bits: int, granularity: Granularity) -> FloatArray:
    """The symmetric scale absmax / h, with which no element of x saturates.

    x: float32 or float64, finite. Returns an array of `scale_shape`, of x's dtype; 1 where x is
    all zero, and never zero, subnormal or infinite. Raises ValueError as `reduce_absmax`.
    """
    return safe_scale(reduce_absmax(x, granularity), half_range(bits))


def affine_params(
    x: FloatArray, bits: int, granularity: Granularity, *, signed: bool = False
) -> tuple[FloatArray, Int8Array]:
    """(scale, zero_point) over the range of x widened to include 0.

    scale = (rmax - rmin) / (qmax - qmin); zero_point = saturate(round(qmin - rmin / scale)), int8
    or uint8; both of `scale_shape`. For 8 unsigned bits this is ONNX DynamicQuantizeLinear. As
    the zero point is rounded, the two ends of the range may move by half a scale.
    Raises ValueError as `reduce_absmax`.
    """
    qmin, qmax = qrange(bits, signed=signed)
    rmin, rmax = reduce_range(x, granularity)
    levels = x.dtype.type(qmax - qmin)
    with np.errstate(over="ignore"):
        span = rmax - rmin
        scale = np.where(np.isinf(span), rmax / levels - rmin / levels, span / levels)
    scale = np.maximum(scale, np.finfo(x.dtype).tiny)
    scale = np.asarray(np.where(span == 0, x.dtype.type(1), scale), dtype=x.dtype)
    zero_point = np.clip(np.rint(x.dtype.type(qmin) - rmin / scale), qmin, qmax)
    if signed:
        return scale, np.asarray(zero_point).astype(np.int8)
    return scale, np.asarray(zero_point).astype(np.uint8)


def quantize(
    x: FloatArray,
    scale: FloatArray,
    zero_point: IntArray | int = 0,
    *,
    bits: int,
    granularity: Granularity,
    signed: bool = True,
    narrow: bool = False,
) -> Int8Array:
    """saturate(round(x / scale) + zero_point), round half to even.

    x: float32 or float64; infinities saturate. scale (and zero_point, unless a plain number): of
    `scale_shape`. Returns int8 or uint8 of x's shape. The clip is done on floats: a cast of a
    float outside the integer's range has no defined result.
    Raises ValueError for NaN, a scale that is not finite and positive, or a wrong shape.
    Source: ONNX QuantizeLinear.
    """
    qmin, qmax = qrange(bits, signed=signed, narrow=narrow)
    check_float(x, "x")
    scale = np.asarray(scale, dtype=x.dtype)
    check_scale(scale)
    with np.errstate(over="ignore"):
        level = np.asarray(x / spread(scale, x.shape, granularity))
    np.rint(level, out=level)
    if np.isnan(level).any():
        raise ValueError("x holds NaN; only numbers can be quantized")
    level += _spread_zero_point(zero_point, x.shape, granularity)
    np.clip(level, qmin, qmax, out=level)
    return level.astype(np.int8) if signed else level.astype(np.uint8)


def dequantize(
    q: IntArray,
    scale: FloatArray,
    zero_point: IntArray | int = 0,
    *,
    granularity: Granularity,
) -> FloatArray:
    """(q - zero_point) * scale, in scale's dtype.

    q: any integer dtype. scale (and zero_point, unless a plain number): of `scale_shape`.
    Raises ValueError where q is not integer, scale not float32 or float64, or a shape is wrong.
    Source: ONNX DequantizeLinear.
    """
    if not np.issubdtype(q.dtype, np.integer):
        raise ValueError(f"q is {q.dtype}; give the integers that quantize returned")
    scale = np.asarray(scale)
    check_float(scale, "scale")
    # Integers of 8 bits, and their differences, are exact in float32.
    values: FloatArray = q.astype(scale.dtype)
    if np.any(zero_point):
        values -= _spread_zero_point(zero_point, q.shape, granularity)
    values *= spread(scale, q.shape, granularity)
    return values


def _spread_zero_point(
    zero_point: IntArray | int, shape: tuple[int, ...], granularity: Granularity
) -> IntArray | int:
    if isinstance(zero_point, int | np.integer):
        return int(zero_point)
    return spread(np.asarray(zero_point), shape, granularity)
