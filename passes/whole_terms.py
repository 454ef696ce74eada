"""A term that covers a part of its weight, made whole: stored compactly, spread at load.

The nodes made here depend on constants alone, so that onnxruntime computes them once, when it loads
the model. They exist from opset 11 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.kernels_ref.checks import IntArray
from onnxq.passes.edit import Builder

Array = npt.NDArray[Any]


def spread_rows(
    builder: Builder,
    part: Any,
    rows: IntArray,
    shape: Sequence[int],
    base: str,
    *,
    fill: np.generic,
) -> Any:
    """The rows of `part` in their places of a tensor of `shape`, which holds `fill` elsewhere."""
    target = builder.constant(f"{base}/shape", np.array(shape, np.int64))
    empty = builder.add("Expand", f"{base}/empty", [builder.scalar(fill), target])
    if not len(rows):
        return empty
    places = builder.constant(f"{base}/rows", compact_indices(rows, shape[0])[:, np.newaxis])
    wide = builder.add("Cast", f"{base}/places", [places], attrs={"to": TensorProto.INT64})
    return builder.add("ScatterND", f"{base}/whole", [empty, wide, part])


def compact_indices(indices: IntArray, count: int) -> Array:
    """Indices below `count` in the smallest type that holds them."""
    return indices.astype(np.min_scalar_type(max(count - 1, 0)))


def spread_centre(
    builder: Builder, part: Any, kernel: Sequence[int], base: str, *, fill: np.generic
) -> Any:
    """A kernel of one tap, [out, in, 1, …], as the centre of one that is `fill` elsewhere."""
    if fill.dtype == np.float32:
        # Not Pad: onnxruntime's PadFusion takes that of a weight for one of the input.
        one = np.zeros(tuple(kernel), np.float32)
        one[tuple(size // 2 for size in kernel)] = 1
        tap = builder.constant(f"{base}/centre", one)
        return builder.add("Mul", f"{base}/whole", [part, tap])
    sides = [0, 0, *(size // 2 for size in kernel)]
    pads = builder.constant(f"{base}/pads", np.array(sides * 2, np.int64))
    return builder.add("Pad", f"{base}/whole", [part, pads, builder.scalar(fill)])
