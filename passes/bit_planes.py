"""Integers of any number of bits in bytes, unpacked when onnxruntime loads the model.

Byte j of plane k holds bit k of the integers j, j + m, … j + 7m, so that a weight takes as many
bits in the file as it has. All nodes that unpack them exist from opset 11 on, and onnxruntime
computes them once (1.18 to 1.31 tried); 4-bit types of ONNX it casts from 1.23 on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.model import is_constant
from onnxq.model import values as read_values
from onnxq.passes.edit import Builder, consumers

Array = npt.NDArray[Any]

PER_BYTE = 8
# Makes what bits of up to 7 count for, -64 to 128, unsigned: MatMulInteger takes no int8 on its
# left before onnxruntime 1.25.
_ZERO = 64


def pack_bits(values: Array, bits: int, *, signed: bool) -> Array:
    """Integers of any shape as planes of bits, uint8 [1, bits, ⌈n/8⌉].

    Raises:
        ValueError: an integer has more bits.
    """
    flat = np.asarray(values).reshape(-1)
    low = -(1 << (bits - 1)) if signed else 0
    if flat.size and not low <= flat.min() <= flat.max() < low + (1 << bits):
        raise ValueError(f"integers from {flat.min()} to {flat.max()} in {bits} bits")
    length = -(-flat.size // PER_BYTE)
    padded = np.zeros(PER_BYTE * length, np.uint8)
    padded[: flat.size] = flat.astype(np.int16) & ((1 << bits) - 1)
    rows = padded.reshape(PER_BYTE, length)
    planes = np.zeros((1, bits, length), np.uint8)
    for k in range(bits):
        for place in range(PER_BYTE):
            planes[0, k] |= ((rows[place] >> k) & 1) << place
    return planes


def read_bits(planes: Array, *, signed: bool) -> Array:
    """The integers, int16 [8·⌈n/8⌉], that planes hold; what is beyond the n-th is 0."""
    values = place_values(planes.shape[1], signed=signed)
    rows = [
        sum(((planes[0, k] >> place) & 1).astype(np.int16) * int(v) for k, v in enumerate(values))
        for place in range(PER_BYTE)
    ]
    return np.concatenate(rows).astype(np.int16)


def place_values(bits: int, *, signed: bool) -> Array:
    """What each bit counts, lowest first: two's complement where signed."""
    values = 1 << np.arange(bits)
    if signed:
        values[-1] = -values[-1]
    return values


def unpack_bits(
    builder: Builder,
    planes: Any,
    shape: tuple[int, ...],
    base: str,
    *,
    bits: int,
    signed: bool,
    to: int,
) -> Any:
    """The packed integers as the element type `to`, in `shape`."""
    places = np.arange(PER_BYTE, dtype=np.uint8).reshape(PER_BYTE, 1, 1)
    shifts = builder.shared("onnxq/bit_places", places)
    shifted = builder.add(
        "BitShift", f"{base}/rows", [planes, shifts], attrs={"direction": "RIGHT"}
    )
    flat = builder.shared(f"onnxq/planes{bits}", np.array([PER_BYTE * bits, -1], np.int64))
    rows = builder.add("Reshape", f"{base}/bits", [shifted, flat])
    kind = "signed" if signed else "unsigned"
    weighing = builder.shared(f"onnxq/{kind}{bits}", _weighing(bits, signed=signed))
    zero = builder.scalar(np.uint8(_ZERO))
    total = builder.add("MatMulInteger", f"{base}/integers", [weighing, rows, zero])
    count = int(np.prod(shape))
    if count % PER_BYTE:
        total = _unpadded(builder, total, count, base)
    target = builder.constant(f"{base}/shape", np.array(shape, np.int64))
    shaped = builder.add("Reshape", f"{base}/shaped", [total, target])
    if to == TensorProto.INT32:
        return shaped
    return builder.add("Cast", f"{base}/cast", [shaped], attrs={"to": to})


def _weighing(bits: int, *, signed: bool) -> Array:
    """What the bytes shifted by 0 to 7 count for in each of eight integers, uint8 [8, 8·bits].

    Bit p is the byte shifted by p less twice the byte shifted by p + 1, so that no other node takes
    it out: with one, loading took up to three times as long.
    """
    values = place_values(bits, signed=signed)
    found = np.zeros((PER_BYTE, PER_BYTE, bits), np.int64)
    for place in range(PER_BYTE):
        found[place, place] = values
        if place + 1 < PER_BYTE:
            found[place, place + 1] = -2 * values
    return (found.reshape(PER_BYTE, -1) + _ZERO).astype(np.uint8)


def _unpadded(builder: Builder, total: Any, count: int, base: str) -> Any:
    flat = builder.shared("onnxq/flat", np.array([-1], np.int64))
    whole = builder.add("Reshape", f"{base}/flat", [total, flat])
    start = builder.shared("onnxq/start", np.array([0], np.int64))
    end = builder.constant(f"{base}/count", np.array([count], np.int64))
    return builder.add("Slice", f"{base}/unpadded", [whole, start, end])


def signed_planes(tensor: Any) -> bool | None:
    """Whether the integers in these planes are signed; None if a constant holds no planes."""
    behind = tensor
    for op in ("BitShift", "Reshape", "MatMulInteger"):
        found = [node for node in consumers(behind) if node.op == op]
        if not found:
            return None
        behind = found[0].outputs[0]
    weighing, bits = found[0].inputs[0], read_values(tensor).shape[1]
    return bool(read_values(weighing)[0, bits - 1] < _ZERO) if is_constant(weighing) else None
