"""One basis term: an integer tensor with its scale."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.kernels_ref.checks import FloatArray, IntArray
from onnxq.kernels_ref.granularity import Granularity
from onnxq.kernels_ref.quantize import dequantize


@dataclass(frozen=True, eq=False)
class Term:
    """q of the weight's shape, scale and zero_point of its `scale_shape`.

    q holds `bits`-bit integers (int8, or uint8 where affine); zero_point is 0 for the terms of a
    series. Of a matrix [out, in] a term may cover only some `rows` and `columns` (indices, rising);
    its q is 0 elsewhere, which need not be stored. Compared by identity: arrays have no single
    truth value.
    """

    q: IntArray
    scale: FloatArray
    zero_point: IntArray | int
    bits: int
    granularity: Granularity
    rows: IntArray | None = None
    columns: IntArray | None = None

    def dequantize(self) -> FloatArray:
        """(q - zero_point) * scale, in scale's dtype; ValueError where the shapes disagree."""
        return dequantize(self.q, self.scale, self.zero_point, granularity=self.granularity)
