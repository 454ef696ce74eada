"""Integers of 2 to 7 bits packed in bytes, unpacked when onnxruntime loads the model.

A byte holds as many integers as fit, from its lowest bit on. The bits that are left at its top
make up further integers together with those of other bytes: of 5 bits each, five bytes hold five,
and three more in the three highest bits of each.

All nodes that unpack them exist from opset 11 on, and onnxruntime computes them once (1.18 to 1.31
tried); 4-bit types of ONNX it casts from 1.23 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.model import is_constant
from onnxq.passes.edit import Builder, consumers

Array = npt.NDArray[Any]

_BYTE = 8
# Makes what a shifted byte counts for, -128 to 64, unsigned: MatMulInteger takes no int8 on its
# left before onnxruntime 1.25.
_ZERO = 128


class _Field(NamedTuple):
    """Bits `shift` to `shift + width` of a byte are those of an integer from `place` on."""

    byte: int
    shift: int
    width: int
    place: int


@dataclass(frozen=True)
class _Code:
    """Where the bits of some integers are in some bytes."""

    bytes: int
    integers: tuple[tuple[_Field, ...], ...]

    @property
    def shifts(self) -> list[int]:
        """Those that `weighing` needs the bytes shifted by."""
        fields = [field for integer in self.integers for field in integer]
        ends = {field.shift + field.width for field in fields} - {_BYTE}
        return sorted({field.shift for field in fields} | ends)

    def weighing(self) -> Array:
        """What shifted bytes count for in each integer, int [integers, shifts, bytes].

        A field is the byte shifted by its place less what is above it, so that no node has to take
        it out: with one that did, loading took up to three times as long.
        """
        shifts = self.shifts
        found = np.zeros((len(self.integers), len(shifts), self.bytes), np.int64)
        for row, integer in zip(found, self.integers, strict=True):
            for field in integer:
                row[shifts.index(field.shift), field.byte] += 1 << field.place
                end = field.shift + field.width
                if end < _BYTE:
                    row[shifts.index(end), field.byte] -= 1 << (field.place + field.width)
        return found


@cache
def _code(bits: int) -> _Code:
    whole, left = divmod(_BYTE, bits)
    if not left:
        return _Code(1, tuple((_Field(0, i * bits, bits, 0),) for i in range(whole)))
    width = left if bits % left == 0 else 1
    count = bits // width
    integers: list[tuple[_Field, ...]] = []
    for byte in range(count):
        integers += [(_Field(byte, i * bits, bits, 0),) for i in range(whole)]
    for shift in range(whole * bits, _BYTE, width):
        fields = (_Field(byte, shift, width, byte * width) for byte in range(count))
        integers.append(tuple(fields))
    return _Code(count, tuple(integers))


def pack_bits(values: Array, bits: int) -> Array:
    """Integers 0 to 2**bits - 1, of any shape, in bytes: uint8 [1, bytes of a group, groups].

    Raises:
        ValueError: an integer has more bits.
    """
    code, flat = _code(bits), np.asarray(values).reshape(-1)
    if flat.size and not 0 <= flat.min() <= flat.max() < 1 << bits:
        raise ValueError(f"integers from {flat.min()} to {flat.max()} in {bits} bits")
    groups = -(-flat.size // len(code.integers))
    padded = np.zeros(groups * len(code.integers), np.uint8)
    padded[: flat.size] = flat
    packed = np.zeros((1, code.bytes, groups), np.uint8)
    for row, integer in zip(padded.reshape(len(code.integers), groups), code.integers, strict=True):
        for byte, shift, width, place in integer:
            packed[0, byte] |= ((row >> place) & ((1 << width) - 1)) << shift
    return packed


def read_bits(packed: Array, bits: int) -> Array:
    """The integers, uint8 [n], in such bytes; up to a group less one more than were packed."""
    code = _code(bits)
    rows = np.zeros((len(code.integers), packed.shape[2]), np.uint8)
    for row, integer in zip(rows, code.integers, strict=True):
        for byte, shift, width, place in integer:
            row[:] |= ((packed[0, byte] >> shift) & ((1 << width) - 1)) << place
    return rows.reshape(-1)


def most_padding(bits: int) -> int:
    """How many integers too many there may be; of 8 bits none."""
    return len(_code(bits).integers) - 1


def unpack_bits(
    builder: Builder,
    packed: Any,
    shape: tuple[int, ...],
    base: str,
    *,
    bits: int,
    offset: int,
    to: int,
) -> Any:
    """The packed integers less `offset`, as the element type `to`, in `shape`."""
    code = _code(bits)
    places = np.array(code.shifts, np.uint8).reshape(-1, 1, 1)
    shifts = builder.shared(f"onnxq/shifts{bits}", places)
    shifted = builder.add(
        "BitShift", f"{base}/rows", [packed, shifts], attrs={"direction": "RIGHT"}
    )
    rows = np.array([len(places) * code.bytes, -1], np.int64)
    flat = builder.shared(f"onnxq/rows{bits}", rows)
    bits_of = builder.add("Reshape", f"{base}/bits", [shifted, flat])
    counts = (code.weighing().reshape(len(code.integers), -1) + _ZERO).astype(np.uint8)
    weighing = builder.shared(f"onnxq/unpack{bits}", counts)
    zero = builder.scalar(np.uint8(_ZERO))
    operands = [weighing, bits_of, zero]
    # Marked, so that it is not taken for a product of the model.
    found = builder.add("MatMulInteger", f"{base}/integers", operands, metadata={})
    count = int(np.prod(shape))
    if count % len(code.integers):
        found = _unpadded(builder, found, count, base)
    target = builder.constant(f"{base}/shape", np.array(shape, np.int64))
    found = builder.add("Reshape", f"{base}/shaped", [found, target])
    if offset:
        found = builder.add("Sub", f"{base}/signed", [found, builder.scalar(np.int32(offset))])
    if to == TensorProto.INT32:
        return found
    return builder.add("Cast", f"{base}/cast", [found], attrs={"to": to})


def _unpadded(builder: Builder, found: Any, count: int, base: str) -> Any:
    flat = builder.shared("onnxq/flat", np.array([-1], np.int64))
    whole = builder.add("Reshape", f"{base}/flat", [found, flat])
    start = builder.shared("onnxq/start", np.array([0], np.int64))
    end = builder.constant(f"{base}/count", np.array([count], np.int64))
    return builder.add("Slice", f"{base}/unpadded", [whole, start, end])


def is_packed(tensor: Any) -> bool:
    """Whether a constant's readers unpack it."""
    for op in ("BitShift", "Reshape", "MatMulInteger"):
        found = [node for node in consumers(tensor) if node.op == op]
        if not found:
            return False
        tensor = found[0].outputs[0]
    return is_constant(found[0].inputs[0])
