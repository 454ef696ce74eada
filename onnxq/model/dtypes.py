"""ONNX element types: width in bits, numpy dtype, and the packing of integers below one byte."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.errors import ModelError

Array = npt.NDArray[np.generic]

# name -> (bits in a file, dtype of the unpacked values); names that the installed onnx does not
# know yet are left out of the tables below.
_TYPES: dict[str, tuple[int, npt.DTypeLike]] = {
    "FLOAT": (32, np.float32),
    "UINT8": (8, np.uint8),
    "INT8": (8, np.int8),
    "UINT16": (16, np.uint16),
    "INT16": (16, np.int16),
    "INT32": (32, np.int32),
    "INT64": (64, np.int64),
    "BOOL": (8, np.bool_),
    "FLOAT16": (16, np.float16),
    "DOUBLE": (64, np.float64),
    "UINT32": (32, np.uint32),
    "UINT64": (64, np.uint64),
    "COMPLEX64": (64, np.complex64),
    "COMPLEX128": (128, np.complex128),
    "BFLOAT16": (16, ml_dtypes.bfloat16),
    "FLOAT8E4M3FN": (8, ml_dtypes.float8_e4m3fn),
    "FLOAT8E4M3FNUZ": (8, ml_dtypes.float8_e4m3fnuz),
    "FLOAT8E5M2": (8, ml_dtypes.float8_e5m2),
    "FLOAT8E5M2FNUZ": (8, ml_dtypes.float8_e5m2fnuz),
    "FLOAT8E8M0": (8, ml_dtypes.float8_e8m0fnu),
    "UINT4": (4, ml_dtypes.uint4),
    "INT4": (4, ml_dtypes.int4),
    "UINT2": (2, ml_dtypes.uint2),
    "INT2": (2, ml_dtypes.int2),
    "FLOAT4E2M1": (4, ml_dtypes.float4_e2m1fn),
    "FLOAT6E2M3": (6, ml_dtypes.float6_e2m3fn),
    "FLOAT6E3M2": (6, ml_dtypes.float6_e3m2fn),
}
_CODE = {name: code for name, code in TensorProto.DataType.items() if name in _TYPES}

BITS: dict[int, int] = {code: _TYPES[name][0] for name, code in _CODE.items()}
DTYPE: dict[int, np.dtype[np.generic]] = {
    code: np.dtype(_TYPES[name][1]) for name, code in _CODE.items()
}
DATA_TYPE: dict[np.dtype[np.generic], int] = {dtype: code for code, dtype in DTYPE.items()}

# Integer types below one byte: callers get their values as int8 or uint8.
WIDE: dict[int, np.dtype[np.generic]] = {
    _CODE[name]: np.dtype(np.int8 if name.startswith("INT") else np.uint8)
    for name in ("INT4", "UINT4", "INT2", "UINT2")
    if name in _CODE
}


def type_name(data_type: int) -> str:
    """`INT4` for 22; the number itself for a type that this onnx does not know."""
    names = {code: name for name, code in TensorProto.DataType.items()}
    return str(names.get(data_type, f"element type {data_type}"))


def raw_size(data_type: int, dims: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file.

    Raises:
        ModelError: the type has no fixed width (strings, or unknown to the installed onnx).

    """
    if data_type not in BITS:
        raise ModelError(
            f"{type_name(data_type)} has no fixed width: such a tensor cannot be raw bytes"
        )
    return (prod(dims) * BITS[data_type] + 7) // 8


def unpack(raw: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` fields of `bits` (2 or 4) bits each, lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(fields.reshape(-1)[:count])


def sign_extend(fields: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """Two's complement fields of `bits` bits as int8."""
    half = 1 << (bits - 1)
    shifted: npt.NDArray[np.int8] = (fields ^ np.uint8(half)).astype(np.int8)
    shifted -= np.int8(half)
    return shifted


def pack(array: Array, bits: int) -> bytes:
    """The inverse of `unpack` on an int8/uint8 array whose values fit in `bits` bits."""
    per_byte = 8 // bits
    fields = array.reshape(-1).astype(np.uint8) & np.uint8((1 << bits) - 1)
    padded = np.zeros(-(-fields.size // per_byte) * per_byte, np.uint8)
    padded[: fields.size] = fields
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return bytes(packed.astype(np.uint8))


def integer_range(data_type: int) -> tuple[int, int]:
    """Smallest and largest value of an integer element type."""
    bits, wide = BITS[data_type], WIDE.get(data_type, DTYPE[data_type])
    if wide.kind == "i":
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1
