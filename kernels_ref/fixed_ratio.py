"""The fixed-ratio series: every scale is the one before it divided by 2**bits - 2.

With h = 2**(bits-1) - 1 and s_1 = absmax / h no term saturates: rounding leaves at most s_i / 2,
and s_i / 2 = h * s_(i+1), exactly what the next term can reach. So |residual| <= s_n / 2, which
falls by 2**bits - 2 per term. At 2 bits h is 1 and the ratio 2: each term halves the residual,
slowly but surely. A ratio of 2**bits looks natural and does not converge: a residual near s_i / 2
would need the level 2**(bits-1), which signed integers of that width do not have.

The exponential convergence is that of the series expansion in arXiv 2412.06865.
"""

from __future__ import annotations

import numpy as np

from onnxq.kernels_ref.checks import FloatArray, check_bits, check_term_count
from onnxq.kernels_ref.quantize import half_range, safe_scale


def scale_ratio(bits: int) -> int:
    """2**bits - 2, by which each scale is smaller than the one before; ValueError outside 2..8."""
    check_bits(bits)
    return (1 << bits) - 2


def fixed_ratio_scales(absmax: FloatArray, bits: int, terms: int) -> tuple[FloatArray, ...]:
    """s_1 = absmax / h and s_(i+1) = s_i / (2**bits - 2), each of absmax's shape and dtype.

    A scale that would underflow stays at the dtype's smallest normal number.
    """
    check_term_count(terms)
    scales = [safe_scale(absmax, half_range(bits))]
    tiny = np.finfo(absmax.dtype).tiny
    ratio = absmax.dtype.type(scale_ratio(bits))
    for _ in range(terms - 1):
        scales.append(np.asarray(np.maximum(scales[-1] / ratio, tiny)))
    return tuple(scales)


def fixed_ratio_bound(absmax: FloatArray | float, bits: int, terms: int) -> FloatArray:
    """The largest |residual| after `terms` terms: absmax / (2 h (2**bits - 2)**(terms - 1)).

    absmax: a number or an array, in the weight's units; the result has its shape, in float64. It
    holds in exact arithmetic: floating point adds a few units in the last place of absmax.
    Raises ValueError for bits outside 2..8 or less than one term.
    """
    check_term_count(terms)
    levels = 2.0 * half_range(bits) * float(scale_ratio(bits)) ** (terms - 1)
    return np.asarray(np.asarray(absmax, dtype=np.float64) / levels)
