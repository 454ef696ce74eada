"""The digit series: one wide integer, written in balanced base-2**bits digits.

The weight is quantized once, to an integer W of terms * bits bits, and W is split with carry into
digits from -2**(bits-1) to 2**(bits-1) - 1. The terms add up to scale * W exactly, so that where
terms * bits <= 8 they can be merged back into one int8 weight. The finest scale is
absmax / sum(h * 2**(bits*i)): then |W| never needs a top digit beyond ±h, and no digit overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, check_term_count
from onnxq.kernels_ref.granularity import Granularity
from onnxq.kernels_ref.layout import as_row_params, as_rows, from_rows, tiles
from onnxq.kernels_ref.quantize import half_range, safe_scale
from onnxq.kernels_ref.term import Term

MAX_WIDE_BITS = 64


def wide_half_range(bits: int, terms: int) -> int:
    """Sum of h * 2**(bits*i) for i < terms: the largest |W| whose top digit lies within ±h.

    Raises ValueError where terms * bits exceeds 64, or bits is outside 2..8.
    """
    check_term_count(terms)
    h = half_range(bits)
    if bits * terms > MAX_WIDE_BITS:
        raise ValueError(
            f"{terms} terms of {bits} bits need a wide integer of {bits * terms} bits; "
            f"keep terms * bits <= {MAX_WIDE_BITS}"
        )
    return sum(h << (bits * i) for i in range(terms))


def wide_dtype(bits: int, terms: int) -> np.dtype[Any]:
    """int8, int32 or int64: the smallest that holds terms * bits bits."""
    width = bits * terms
    return np.dtype(np.int8 if width <= 8 else np.int32 if width <= 32 else np.int64)


def digit_scales(absmax: FloatArray, bits: int, terms: int) -> tuple[FloatArray, ...]:
    """Scales of absmax's shape and dtype, most significant first, each 2**bits times the next."""
    finest = safe_scale(absmax, wide_half_range(bits, terms))
    return tuple(
        np.asarray(np.ldexp(finest, bits * i)).astype(absmax.dtype) for i in reversed(range(terms))
    )


def realize_digits(
    w: FloatArray, scales: Sequence[FloatArray], bits: int, granularity: Granularity
) -> tuple[npt.NDArray[np.int8], ...]:
    """The digits of round(w / finest scale), int8 of w's shape, most significant first.

    Raises ValueError unless each scale is exactly 2**bits times the next.
    """
    _check_digit_ratio(scales, bits)
    terms = len(scales)
    limit = _float_at_most(wide_half_range(bits, terms), w.dtype)
    rows = as_rows(w, granularity)
    finest = as_row_params(scales[-1], granularity)
    digits = [np.empty_like(rows, dtype=np.int8) for _ in scales]
    for tile in tiles(rows):
        level = tile.load(rows)
        level /= tile.params(finest)
        np.rint(level, out=level)
        level.clip(-limit, limit, out=level)
        wide = level.astype(wide_dtype(bits, terms))
        for digit, target in zip(_split(wide, bits, terms), digits, strict=True):
            tile.store(digit, target)
    return tuple(from_rows(part, w.shape, granularity) for part in digits)


def merge_digits(terms: Sequence[Term]) -> npt.NDArray[Any]:
    """The wide integer that the terms of a digit series are the digits of.

    terms: most significant first. Returns int8, int32 or int64 of the weight's shape, the
    smallest for len(terms) * bits bits; its scale is that of the last term. Raises ValueError
    for no terms, mixed bits, scales that are not 2**bits apart, or a top digit outside ±h.
    """
    if not terms:
        raise ValueError("terms is empty; give the terms of a digit series")
    bits = terms[0].bits
    if any(term.bits != bits for term in terms):
        raise ValueError(f"bits are {[t.bits for t in terms]}; all digits of a series have one")
    _check_digit_ratio([term.scale for term in terms], bits)
    h = half_range(bits)
    if np.any(np.abs(terms[0].q.astype(np.int16)) > h):
        raise ValueError(f"the first term has digits outside ±{h}; these terms are no digit series")
    wide = terms[0].q.astype(wide_dtype(bits, len(terms)))
    for term in terms[1:]:
        wide <<= bits
        wide += term.q
    return wide


def _split(wide: npt.NDArray[Any], bits: int, terms: int) -> list[npt.NDArray[Any]]:
    """Balanced digits of `wide` (consumed), most significant first.

    The sum wide + half may wrap around, which is harmless: only its low bits are kept.
    """
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    digits = []
    for _ in range(terms - 1):
        low = wide + half
        low &= mask
        low -= half
        wide -= low
        wide >>= bits
        digits.append(low)
    return [wide, *reversed(digits)]


def _check_digit_ratio(scales: Sequence[FloatArray], bits: int) -> None:
    for i, (coarse, fine) in enumerate(pairwise(scales)):
        if not np.array_equal(coarse, np.ldexp(fine, bits)):
            raise ValueError(
                f"scale {i} is not {2**bits} times scale {i + 1}; "
                f"take the scales of a digit series from series_scales('digit', ...)"
            )


def _float_at_most(limit: int, dtype: np.dtype[Any]) -> FloatArray:
    """The largest float of `dtype` that does not exceed `limit`: rounding up would overflow."""
    value = dtype.type(limit)
    return np.asarray(np.nextafter(value, dtype.type(0)) if int(value) > limit else value)
