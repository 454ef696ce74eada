"""How the scales of blocks are stored in the file, and brought to float32.

A scale for 16 or 32 weights of 4 bits is a good part of the file. Where the weight is folded to
float when onnxruntime loads the model, the scale is computed with it, from

- float16, where all scales of a term have but 11 significant bits (and, if need be, a power of two
  in common): Cast [→ Mul]
- the scale of the term before, where each is a fixed part of that: Div

both without loss. What computes with integers, and MatMulNBits, reads float32 scales at run time;
one scale per channel takes next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.kernels_ref.half import as_half, half_scales, series_ratio
from onnxq.passes.edit import Builder
from onnxq.plan import NodePlan

Array = npt.NDArray[Any]

FLOAT_BITS, HALF_BITS = 32, 16
# With fewer scales, the nodes that make up for it take more than they save.
FEWEST = 64
# Behind the name of a term's scale: the power of two that all its numbers are multiplied by.
POWER = "power"


def storable(scales: Sequence[Array], entry: NodePlan) -> tuple[Array, ...]:
    """The scales of an entry as the file can hold them in the least space; for planning.

    scales: one float array per term, before integers are chosen for them. Each grows by at most
    2**-10 of itself, where the entry has blocks and is folded for float compute; otherwise, and
    where that would not bring them to float16, they are returned as they are.
    """
    if not _saves(entry, np.size(scales[0])):
        return tuple(scales)
    return half_scales(entry.series, scales, entry.bits)


def scale_bits(entry: NodePlan, scales: Sequence[Array]) -> int:
    """Bits that the scales of all terms of an entry take in the file.

    scales: one float array per term, as planned.
    """
    count = int(np.size(scales[0]))
    if not _saves(entry, count):
        return FLOAT_BITS * count * len(scales)
    own = [np.asarray(scale, np.float32) for scale in scales]
    if series_ratio(entry.series, own, entry.bits) is not None:
        own = own[:1]
    return sum(count * (HALF_BITS if as_half(scale) else FLOAT_BITS) for scale in own)


def expected_scale_bits(entry: NodePlan, count: int) -> int:
    """`scale_bits` of scales that are still to be searched, `count` per term."""
    if not _saves(entry, count):
        return FLOAT_BITS * count * entry.terms
    return HALF_BITS * count * (entry.terms if entry.series == "joint" else 1)


def _saves(entry: NodePlan, count: int) -> bool:
    """Whether there is a smaller form for so many scales, and it pays."""
    folded = entry.form == "folded" and entry.activations == "none"
    return folded and entry.granularity == "per_block" and count >= FEWEST


@dataclass(eq=False)
class StoredScales:
    """The scales of one weight's terms in a file; several nodes that share the weight share them.

    Attributes:
        entry: the plan of the weight.
        arrays: float32, one per term, each of the shape that its term is multiplied by.
        names: what they are called.
    """

    entry: NodePlan
    arrays: tuple[Array, ...]
    names: tuple[str, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    loaded: dict[tuple[int, int], Any] = field(default_factory=dict)  # by graph and term

    def as_float(self, builder: Builder, i: int) -> Any:
        """The scale of term i, float32 once the model is loaded."""
        key = id(builder.graph), i
        if key not in self.loaded:
            follows = i > 0 and self._ratio is not None
            self.loaded[key] = self._followed(builder, i) if follows else self._stored(builder, i)
        return self.loaded[key]

    @cached_property
    def _ratio(self) -> int | None:
        """By what the scale of each term is divided to give the next one's."""
        small = not all(_saves(self.entry, array.size) for array in self.arrays)
        if small or len({array.shape for array in self.arrays}) > 1:
            return None  # terms of some rows only have scales for these alone
        return series_ratio(self.entry.series, self.arrays, self.entry.bits)

    def _followed(self, builder: Builder, i: int) -> Any:
        before = self.as_float(builder, i - 1)
        ratio = np.float32(self._ratio)
        return builder.add("Div", self.names[i], [before, builder.scalar(ratio)])

    def _stored(self, builder: Builder, i: int) -> Any:
        name, array = self.names[i], self.arrays[i]
        found = as_half(array) if _saves(self.entry, array.size) else None
        if found is None:
            return self._constant(builder, name, array)
        half, power = found
        stored = self._constant(builder, name, half)
        scale = builder.add("Cast", f"{name}/float", [stored], attrs={"to": TensorProto.FLOAT})
        if power == 1:
            return scale
        factor = self._constant(builder, f"{name}/{POWER}", np.asarray(power))
        return builder.add("Mul", f"{name}/full", [scale, factor])

    def _constant(self, builder: Builder, name: str, array: Array) -> Any:
        if name not in self.constants:
            self.constants[name] = builder.constant(name, array)
        return self.constants[name]
