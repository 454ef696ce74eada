"""ONNX ConvInteger, MatMulInteger and Conv, as the oracle of the integer nodes.

Integer sums are taken as float64 matrix products, which are exact here (a product of two
zero-point-corrected bytes is below 2**18, so 2**35 of them fit in 53 bits) and as fast as BLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import AnyArray, FloatArray, IntArray, check_float
from onnxq.kernels_ref.windows import ConvGeometry, convolve

Int32Array = npt.NDArray[np.int32]


def conv_integer(
    x: IntArray,
    w: IntArray,
    x_zero_point: IntArray | int = 0,
    w_zero_point: IntArray | int = 0,
    *,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
) -> Int32Array:
    """ConvInteger: the convolution of x - x_zero_point with w - w_zero_point.

    x: int8 or uint8 [N, C, *space]; w: int8 or uint8 [M, C/group, *kernel], 1 to 3 space axes.
    x_zero_point: a number; w_zero_point: a number or one per output channel [M]. pads: begins,
    then ends; x is padded with x_zero_point. Returns int32 [N, M, *out]; a sum beyond 32 bits
    wraps around, as the specification allows and onnxruntime does.
    Raises ValueError for other dtypes, and for shapes or attributes that do not fit.
    Source: ONNX operator ConvInteger, version 10.
    """
    geometry = ConvGeometry.check(
        x, w, pads=pads, strides=strides, dilations=dilations, group=group
    )
    xf = _centered(x, _scalar(x_zero_point, "x_zero_point"), "x")
    zero_point = _per_channel(w_zero_point, w.shape[0], "w_zero_point")
    wf = _centered(w, zero_point.reshape(-1, *[1] * (w.ndim - 1)), "w")
    # Padding x with its zero point is padding x - zero_point with 0.
    return _to_int32(convolve(xf, wf, geometry))


def matmul_integer(
    a: IntArray,
    b: IntArray,
    a_zero_point: IntArray | int = 0,
    b_zero_point: IntArray | int = 0,
) -> Int32Array:
    """MatMulInteger: (a - a_zero_point) @ (b - b_zero_point), with numpy's broadcasting.

    a: int8 or uint8 [..., M, K]; b: int8 or uint8 [..., K, N]; either may be 1-D, as for
    numpy.matmul. a_zero_point: a number, one per row [M], or [..., M, 1]; b_zero_point: a number,
    one per column [N], or [..., 1, N]. Returns int32; a sum beyond 32 bits wraps around.
    Raises ValueError for other dtypes and for shapes that do not fit.
    Source: ONNX operator MatMulInteger, version 10.
    """
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; K of a and b must agree")
    rows = a.shape[-2] if a.ndim > 1 else 1
    columns = b.shape[-1] if b.ndim > 1 else 1
    a_zp, b_zp = np.asarray(a_zero_point), np.asarray(b_zero_point)
    if a_zp.ndim <= 1:
        a_zp = _per_channel(a_zp, rows, "a_zero_point")
        a_zp = a_zp[:, np.newaxis] if a.ndim > 1 else a_zp
    if b_zp.ndim <= 1:
        b_zp = _per_channel(b_zp, columns, "b_zero_point")
    af, bf = _centered(a, a_zp, "a"), _centered(b, b_zp, "b")
    return _to_int32(np.matmul(af, bf))


def conv(
    x: FloatArray,
    w: FloatArray,
    bias: FloatArray | None = None,
    *,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    dtype: npt.DTypeLike | None = None,
) -> FloatArray:
    """Conv on floats, computed in `dtype` (default: that of x) and returned in it.

    x: float32 or float64 [N, C, *space]; w: [M, C/group, *kernel]; bias: [M] or None; the
    attributes as for `conv_integer`, padding with 0. Give dtype=np.float64 for an oracle of a
    float32 runtime. Raises ValueError for shapes, dtypes or attributes that do not fit.
    Source: ONNX operator Conv, version 11.
    """
    check_float(x, "x")
    check_float(w, "w")
    geometry = ConvGeometry.check(
        x, w, pads=pads, strides=strides, dilations=dilations, group=group
    )
    work = np.dtype(x.dtype if dtype is None else dtype)
    y: FloatArray = convolve(x.astype(work), w.astype(work), geometry)
    if bias is not None:
        if bias.shape != w.shape[:1]:
            raise ValueError(f"bias has shape {bias.shape}, but w has {w.shape[0]} outputs")
        y += bias.astype(work).reshape(-1, *[1] * (w.ndim - 2))
    return y


def _centered(values: IntArray, zero_point: IntArray, name: str) -> npt.NDArray[np.float64]:
    if values.dtype not in (np.int8, np.uint8):
        raise ValueError(f"{name} is {values.dtype}; integer kernels take int8 or uint8")
    if values.size == 0:
        raise ValueError(f"{name} has shape {values.shape} and no elements")
    try:
        shape = np.broadcast_shapes(values.shape, zero_point.shape)
    except ValueError:
        shape = None
    if shape != values.shape:
        raise ValueError(
            f"{name}_zero_point has shape {zero_point.shape}, which does not spread over "
            f"{name} of shape {values.shape}"
        )
    return values.astype(np.float64) - zero_point


def _scalar(zero_point: IntArray | int, name: str) -> IntArray:
    value = np.asarray(zero_point)
    if value.size != 1:
        raise ValueError(f"{name} has shape {value.shape}; it must be a single number")
    return value.reshape(())


def _per_channel(zero_point: IntArray | int, count: int, name: str) -> IntArray:
    value = np.asarray(zero_point)
    if value.ndim > 1 or value.size not in (1, count):
        raise ValueError(f"{name} has shape {value.shape}; give a number or shape ({count},)")
    return value.reshape(-1)


def _to_int32(sums: AnyArray) -> Int32Array:
    # By way of int64: a cast of a float beyond 2**31 straight to int32 has no defined result.
    return np.asarray(sums).astype(np.int64).astype(np.int32)
