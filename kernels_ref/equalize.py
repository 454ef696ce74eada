"""Cross-layer equalization: one factor per channel between two linear nodes."""

from __future__ import annotations

import numpy as np

from onnxq.kernels_ref.checks import FloatArray, check_finite
from onnxq.kernels_ref.moments import Float64Array


def equalization_scales(
    first: FloatArray, second: FloatArray, *, limit: float = 1e3
) -> Float64Array:
    """Per channel s = sqrt(r1 * r2) / r2, with which W1 / s and W2 * s have equal ranges.

    first: [c], the largest |w| per output channel of the first weight; second: [c], the same per
    input channel of the second (both `reduce_absmax(w, PerAxis(axis))`). Divide the first weight's
    rows and its bias by s, multiply the second's input channels by s. What stands between must be
    positively homogeneous, f(s x) = s f(x): nothing, Relu, PRelu, LeakyRelu, pooling.
    Returns float64 [c] within 1/limit..limit; 1 for a channel that is zero on either side.
    Raises ValueError for other shapes, negative, NaN or infinite ranges, or a limit below 1.
    Source: Nagel et al., arXiv 1906.04721, section 4.1.
    """
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"first has shape {first.shape} and second {second.shape}; give one range per channel"
        )
    if not limit >= 1.0:
        raise ValueError(f"limit is {limit}; give at least 1")
    for ranges, name in ((first, "first"), (second, "second")):
        check_finite(ranges, name)
        if np.any(ranges < 0):
            raise ValueError(f"{name} holds negative values; give the largest |w| per channel")
    r1, r2 = first.astype(np.float64), second.astype(np.float64)
    alive = (r1 > 0) & (r2 > 0)
    # Two roots: neither the product nor the ratio of the ranges can then overflow.
    s = np.sqrt(np.where(alive, r1, 1.0)) / np.sqrt(np.where(alive, r2, 1.0))
    return np.asarray(np.clip(s, 1.0 / limit, limit))
