"""A weight as a sum of low-bit terms, `w ≈ Σ scale_i * q_i`, in three kinds.

fixed_ratio  scales fall by 2**bits - 2; a proven bound on every element (fixed_ratio.py)
digit        scales fall by 2**bits; the terms merge back into one integer exactly (digit.py)
joint        free scales, searched together for the least squared error (joint.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from onnxq.kernels_ref.checks import (
    FloatArray,
    IntArray,
    check_bits,
    check_finite,
    check_float,
    check_scale,
    check_term_count,
)
from onnxq.kernels_ref.digit import digit_scales, realize_digits
from onnxq.kernels_ref.fixed_ratio import fixed_ratio_scales
from onnxq.kernels_ref.granularity import Granularity, check_param_shape, reduce_absmax
from onnxq.kernels_ref.joint import joint_scales
from onnxq.kernels_ref.quantize import qrange
from onnxq.kernels_ref.residual import realize_by_residual
from onnxq.kernels_ref.term import Term

__all__ = ["Series", "SeriesKind", "Term", "expand", "realize", "restore", "series_scales"]

SeriesKind = Literal["fixed_ratio", "digit", "joint"]


@dataclass(frozen=True, eq=False)
class Series:
    """The terms of one weight, most significant first, all of one shape and granularity.

    `offset`, of a matrix [out, in], is a number per row [out] that is added to all its elements.
    Raises ValueError where there are no terms or the kind is unknown.
    """

    terms: tuple[Term, ...]
    kind: SeriesKind
    offset: FloatArray | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        check_term_count(len(self.terms))

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def bits_per_weight(self) -> int:
        """The bits that the integers of one weight take in all terms; scales are not counted."""
        return sum(term.bits for term in self.terms)

    def dequantize(self, n: int | None = None) -> FloatArray:
        """The sum of the first n terms (default: all), of the weight's shape and scales' dtype.

        The offset comes with any number of terms; it is added last.
        Raises ValueError for an n outside 0..len(self).
        """
        total = np.zeros(self.terms[0].q.shape, dtype=self.terms[0].scale.dtype)
        for term in self._first(n):
            total += term.dequantize()
        if self.offset is not None:
            total += self.offset[:, np.newaxis]
        return total

    def residual(self, w: FloatArray, n: int | None = None) -> FloatArray:
        """Subtract the offset and the first n terms (default: all) from w, one after the other.

        The same order as in `realize`: it loses less to rounding than `w - dequantize(n)`.
        Raises ValueError for an n outside 0..len(self), or a w of another shape.
        """
        if w.shape != self.terms[0].q.shape:
            raise ValueError(f"w has shape {w.shape}, but the series {self.terms[0].q.shape}")
        rest: FloatArray = w.copy()
        if self.offset is not None:
            rest -= self.offset[:, np.newaxis]
        for term in self._first(n):
            rest -= term.dequantize()
        return rest

    def _first(self, n: int | None) -> tuple[Term, ...]:
        if n is None:
            return self.terms
        if not 0 <= n <= len(self.terms):
            raise ValueError(f"n is {n}; this series has 0..{len(self.terms)} terms to sum")
        return self.terms[:n]


def series_scales(
    kind: SeriesKind, w: FloatArray, *, bits: int, terms: int, granularity: Granularity
) -> tuple[FloatArray, ...]:
    """One scale array per term, most significant first, of `scale_shape` and w's dtype.

    w: float32 or float64, finite, not empty. Raises ValueError for an unknown kind, bits outside
    2..8, less than one term, a digit series wider than 64 bits, or an unfit w.
    """
    _check_kind(kind)
    check_bits(bits)
    check_term_count(terms)
    absmax = reduce_absmax(w, granularity)
    if kind == "fixed_ratio":
        return fixed_ratio_scales(absmax, bits, terms)
    if kind == "digit":
        return digit_scales(absmax, bits, terms)
    return joint_scales(w, absmax, bits=bits, terms=terms, granularity=granularity)


def realize(
    kind: SeriesKind,
    w: FloatArray,
    scales: Sequence[FloatArray],
    *,
    bits: int,
    granularity: Granularity,
) -> Series:
    """Round w to a series with the given scales (those of `series_scales`, or edited ones).

    fixed_ratio, joint: each term rounds the residual to nearest, clipped to ±h. digit: w is
    rounded once, with the last scale, and split into digits. The integers are int8 of w's shape.
    Raises ValueError as `series_scales`, and for scales of a wrong shape or sign, or, for digit,
    of another ratio than 2**bits.
    """
    _check_kind(kind)
    check_bits(bits)
    check_term_count(len(scales))
    check_float(w, "w")
    # The extremes show any NaN or infinity, without a temporary of w's size.
    check_finite(np.array([w.min(), w.max()]), "w")
    own = tuple(np.asarray(scale, dtype=w.dtype) for scale in scales)
    for i, scale in enumerate(own):
        check_param_shape(scale, w.shape, granularity, f"scale {i}")
        check_scale(scale, f"scale {i}")
    realizer = realize_digits if kind == "digit" else realize_by_residual
    integers = realizer(w, own, bits, granularity)
    parts = zip(integers, own, strict=True)
    return Series(tuple(Term(q, scale, 0, bits, granularity) for q, scale in parts), kind)


def restore(
    kind: SeriesKind,
    integers: Sequence[IntArray],
    scales: Sequence[FloatArray],
    *,
    shape: tuple[int, ...],
    bits: int,
    granularity: Granularity,
) -> Series:
    """The series of integers that were rounded before, int8 of `shape`, one per scale.

    Raises ValueError where number, shape or range of the integers, or the scales, do not fit.
    """
    _check_kind(kind)
    qmin, qmax = qrange(bits)
    if len(integers) != len(scales):
        raise ValueError(f"{len(integers)} integer tensors for {len(scales)} scales")
    for i, (q, scale) in enumerate(zip(integers, scales, strict=True)):
        if q.shape != shape or q.dtype != np.int8 or q.min() < qmin or q.max() > qmax:
            raise ValueError(f"term {i} is not int8 of shape {shape} within {qmin}..{qmax}")
        check_param_shape(scale, shape, granularity, f"scale {i}")
        check_scale(scale, f"scale {i}")
    parts = zip(integers, scales, strict=True)
    return Series(tuple(Term(q, scale, 0, bits, granularity) for q, scale in parts), kind)


def expand(
    kind: SeriesKind, w: FloatArray, *, bits: int, terms: int, granularity: Granularity
) -> Series:
    """Choose scales and round: `realize` of `series_scales`, with the same arguments and errors."""
    scales = series_scales(kind, w, bits=bits, terms=terms, granularity=granularity)
    return realize(kind, w, scales, bits=bits, granularity=granularity)


def _check_kind(kind: str) -> None:
    if kind not in get_args(SeriesKind):
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(get_args(SeriesKind))}")
