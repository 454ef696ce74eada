"""Rounding a running residual, term after term: how fixed-ratio and joint series get their q."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.granularity import Granularity
from onnxq.kernels_ref.layout import as_row_params, as_rows, from_rows, tiles
from onnxq.kernels_ref.quantize import half_range


def peel(residual: FloatArray, scale: FloatArray, h: int, level: FloatArray) -> None:
    """Take one term off, in place: level = clip(round(residual / scale), ±h); residual -= s q.

    residual and level: one tile, same shape and dtype; scale: broadcastable against them. `level`
    is overwritten with scale * q; whoever wants q calls `round_to_levels` instead.
    """
    round_to_levels(residual, scale, h, level)
    level *= scale
    residual -= level


def round_to_levels(residual: FloatArray, scale: FloatArray, h: int, level: FloatArray) -> None:
    """Write clip(round(residual / scale), ±h) into level, half to even.

    Divides, though a product with 1 / scale would be a little faster: its extra rounding can push
    an element over a tie, and the bound |residual| <= scale / 2 would no longer be exact.
    """
    np.divide(residual, scale, out=level)
    np.rint(level, out=level)
    level.clip(-h, h, out=level)


def realize_by_residual(
    w: FloatArray, scales: Sequence[FloatArray], bits: int, granularity: Granularity
) -> tuple[npt.NDArray[np.int8], ...]:
    """The integers of each term, int8 of w's shape: each rounds what the ones before left.

    Since 0 is among the levels, a term never makes any element's residual larger.
    """
    h = half_range(bits)
    rows = as_rows(w, granularity)
    flat = [as_row_params(scale, granularity) for scale in scales]
    q = [np.empty_like(rows, dtype=np.int8) for _ in scales]
    for tile in tiles(rows):
        residual = tile.load(rows)
        level = np.empty_like(residual)
        for i, per_row in enumerate(flat):
            scale = tile.params(per_row)
            round_to_levels(residual, scale, h, level)
            tile.store(level, q[i])
            if i + 1 < len(flat):
                level *= scale
                residual -= level
    return tuple(from_rows(part, w.shape, granularity) for part in q)
