"""Two 4-bit integers in a byte, for runtimes that cannot cast ONNX's own 4-bit types.

onnxruntime casts INT4 and UINT4 from 1.23 on. The nodes made here exist from opset 11 on, and
onnxruntime computes them once, when it loads the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.passes.edit import Builder

Array = npt.NDArray[Any]


def pack_nibbles(values: Array) -> Array:
    """Integers 0..15 of any shape as uint8 [⌈n/2⌉]: the first half in the low, the rest in the high
    four bits, so that unpacking is one concatenation.
    """
    flat = values.reshape(-1).astype(np.uint8)
    half = -(-flat.size // 2)
    padded = np.zeros(2 * half, np.uint8)
    padded[: flat.size] = flat
    return padded[:half] | (padded[half:] << 4)


def unpack_nibbles(
    builder: Builder, packed: Any, shape: tuple[int, ...], base: str, *, to: int, offset: int
) -> Any:
    """The packed integers minus `offset`, as the element type `to`, in `shape`."""
    low = builder.add("Mod", f"{base}/low", [packed, builder.scalar(np.uint8(16))])
    four = builder.scalar(np.uint8(4))
    high = builder.add("BitShift", f"{base}/high", [packed, four], attrs={"direction": "RIGHT"})
    flat = builder.add("Concat", f"{base}/flat", [low, high], attrs={"axis": 0})
    count = int(np.prod(shape))
    if count % 2:
        ends = [
            builder.constant(f"{base}/{what}", np.array([end], np.int64))
            for what, end in (("from", 0), ("to", count))
        ]
        flat = builder.add("Slice", f"{base}/unpadded", [flat, *ends])
    target = builder.constant(f"{base}/shape", np.array(shape, np.int64))
    shaped = builder.add("Reshape", f"{base}/shaped", [flat, target])
    if not offset:
        return builder.add("Cast", f"{base}/cast", [shaped], attrs={"to": to})
    between = to if to == TensorProto.FLOAT else TensorProto.INT32
    number = np.float32(offset) if between == TensorProto.FLOAT else np.int32(offset)
    wide = builder.add("Cast", f"{base}/cast", [shaped], attrs={"to": between})
    shifted = builder.add("Sub", f"{base}/signed", [wide, builder.scalar(number)])
    if between == to:
        return shifted
    return builder.add("Cast", f"{base}/narrow", [shifted], attrs={"to": to})
