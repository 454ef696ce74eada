"""Scales that a file can hold as float16 without loss: 11 significant bits, times a power of two.

Rounded before the integers are chosen, such a scale costs nothing but a step that is up to 2**-10
wider. It is rounded up, so that nothing saturates which did not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.fixed_ratio import scale_ratio

Half = npt.NDArray[np.float16]

SIGNIFICANT_BITS = 11
# The largest scale is brought to between these powers of two, where float16 ends: then those down
# to 2**-28 of it are normal numbers there too.
_TOP_EXPONENT = 15
# Powers that float32 surely multiplies by, and divides by, without loss.
_LARGEST_POWER = 96


def as_half(scale: FloatArray) -> tuple[Half, np.float32] | None:
    """(half, power) with half * power == scale, of any shape, or None where there are none.

    scale: float32 or float64, finite, > 0, not empty. power is a power of two, 1 where that will
    do. The product is that of float32 multiplication.
    """
    top = int(np.frexp(scale.max())[1])
    for exponent in (0, top - _TOP_EXPONENT):
        if abs(exponent) > _LARGEST_POWER:
            continue
        with np.errstate(over="ignore", under="ignore"):
            half = np.asarray(np.ldexp(scale, -exponent), np.float16)
        power = np.float32(np.ldexp(1.0, exponent))
        if np.array_equal(half.astype(np.float32) * power, scale):
            return half, power
    return None


def half_scales(kind: str, scales: Sequence[FloatArray], bits: int) -> tuple[FloatArray, ...]:
    """The scales of a series, one array per term, most significant first, made fit for `as_half`.

    None gets smaller, and none grows by more than 2**-10 of itself. Where each is a fixed part of
    the one before, as in fixed_ratio and digit series, the first is rounded and the others follow:
    `series_ratio`. Where they fit no float16 with a common power of two, they stay as they are.
    """
    ratio = _nearly_in_ratio(kind, scales, bits)
    if ratio is None:
        rounded = tuple(_round_up(scale) for scale in scales)
        return rounded if all(as_half(scale) for scale in rounded) else tuple(scales)
    first = _round_up(scales[0])
    if as_half(first) is None:
        return tuple(scales)
    made = [first]
    while len(made) < len(scales):
        made.append(next_scale(made[-1], ratio))
    return tuple(made)


def series_ratio(kind: str, scales: Sequence[FloatArray], bits: int) -> int | None:
    """By what each scale is divided to give the next, exactly; None where that is not so.

    fixed_ratio: 2**bits - 2, digit: 2**bits. A joint series, or one term, has no such number.
    """
    ratio = _ratio(kind, bits)
    if ratio is None or len(scales) < 2:
        return None
    exact = all(np.array_equal(b, next_scale(a, ratio)) for a, b in pairwise(scales))
    return ratio if exact else None


def next_scale(scale: FloatArray, ratio: int) -> FloatArray:
    """The quotient scale / ratio, in scale's dtype."""
    return np.asarray(scale / scale.dtype.type(ratio))


def _ratio(kind: str, bits: int) -> int | None:
    if kind == "joint":
        return None
    return scale_ratio(bits) if kind == "fixed_ratio" else 1 << bits


def _nearly_in_ratio(kind: str, scales: Sequence[FloatArray], bits: int) -> int | None:
    """The ratio, also where scales that were all multiplied by a number are a few ulps off."""
    ratio = _ratio(kind, bits)
    if ratio is None:
        return None
    near: float = 4 * float(np.finfo(scales[0].dtype).eps)
    fits = all(np.allclose(b, next_scale(a, ratio), rtol=near, atol=0) for a, b in pairwise(scales))
    return ratio if fits else None


def _round_up(scale: FloatArray) -> FloatArray:
    mantissa, exponent = np.frexp(scale)
    whole: Any = np.ceil(np.ldexp(mantissa, SIGNIFICANT_BITS))
    return np.asarray(np.ldexp(whole, exponent - SIGNIFICANT_BITS), scale.dtype)
