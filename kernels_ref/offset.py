"""The offset term: W ≈ β·1 + Σ s_i Q_i, with β and the scales free per output channel.

With β there is no need for levels to lie around 0: the integers use all 2**bits values, from
-2**(bits-1) on, and a channel whose weights lie on one side loses nothing. The terms behind β are
the digits of one wide integer (digit.py), so that few bits are not spent twice.

The search is our own: rounding to the nearest level and a least-squares line through the levels, in
turns, from several clips of the row's range; what is kept is best by the squared error. The line
also makes the errors of a row sum to nearly nothing, and that is most of the gain: inputs that are
positive on average pass right. (Higher powers of the errors, which clip less, have been tried on
trained models: they help some and ruin others.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, check_bits, check_finite, check_float
from onnxq.kernels_ref.digit import _check_digit_ratio, _split, wide_dtype, wide_half_range
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.quantize import safe_scale

# Shares of the rows' range at which the search starts: few levels clip much of it.
FEW_LEVELS, STARTS = 16, (1.0, 0.9, 0.8, 0.7, 0.55, 0.4)
# Turns from every start, and then from the best of them.
FIRST_TURNS, MORE_TURNS = 2, 6
# Rows that are searched at once hold so many elements (16 MiB in float64).
ROW_ELEMENTS = 1 << 21
# Wider integers than this are finer than float32.
MAX_SEARCHED_BITS = 24


def offset_range(bits: int, terms: int) -> tuple[int, int]:
    """(lowest, highest) wide integer whose digits all lie in -2**(bits-1) .. 2**(bits-1) - 1.

    Raises ValueError as `wide_half_range`.
    """
    return -(1 << (bits * terms - 1)), wide_half_range(bits, terms)


def spanning_scales(w: FloatArray, *, bits: int, terms: int) -> tuple[FloatArray, ...]:
    """Scales [out] per term with which the levels just span each row of w, float [out, in]."""
    lowest, highest = offset_range(bits, terms)
    low, high = w.min(axis=1).astype(np.float64), w.max(axis=1).astype(np.float64)
    finest = np.maximum((high - low) / (highest - lowest), np.finfo(w.dtype).tiny).astype(w.dtype)
    return _by_digit(finest, bits, terms)


def spanned_offset(w: FloatArray, finest: FloatArray, bits: int, terms: int) -> FloatArray:
    """The offset [out] with which the levels cut off least of each row of w, float [out, in].

    finest: the last scale, [out]. Levels that do not span a row lie as close around its mean as
    they can without going beyond its range: of a row with few weights on one side those are cut.
    """
    lowest, highest = offset_range(bits, terms)
    low, high = w.min(axis=1).astype(np.float64), w.max(axis=1).astype(np.float64)
    half = finest.astype(np.float64) * (highest - lowest) / 2
    middle = (low + high) / 2
    room = np.maximum((high - low) / 2 - half, 0)
    centre = np.clip(w.mean(axis=1, dtype=np.float64), middle - room, middle + room)
    return np.asarray(centre - finest * (lowest + highest) / 2, finest.dtype)


def offset_scales(
    w: FloatArray, *, bits: int, terms: int
) -> tuple[FloatArray, tuple[FloatArray, ...]]:
    """(β, scales): β of shape [out], and one array [out] per term, in w's dtype.

    w: float [out, in], finite. The scales are those of a digit series, each 2**bits times the next.
    A row's squared error is at most that of its digit series without offset; a row of one value is
    exact. Raises ValueError for another rank or dtype, values that are not finite, bits outside
    2..8, or more than 24 bits in all.
    """
    check_bits(bits)
    _check_matrix(w)
    if bits * terms > MAX_SEARCHED_BITS:
        raise ValueError(
            f"{terms} terms of {bits} bits; with an offset at most {MAX_SEARCHED_BITS} bits in all"
        )
    beta, finest = np.empty(len(w), w.dtype), np.empty(len(w), w.dtype)
    step = max(1, ROW_ELEMENTS // w.shape[1])
    for start in range(0, len(w), step):
        part = slice(start, start + step)
        beta[part], finest[part] = _search(w[part], bits, terms)
    return beta, _by_digit(finest, bits, terms)


def realize_offset(
    w: FloatArray, beta: FloatArray, scales: Sequence[FloatArray], bits: int
) -> tuple[npt.NDArray[np.int8], ...]:
    """The digits of round((w - β) / finest scale), int8 [out, in], most significant first.

    w: float [out, in]; beta and each scale: [out]. Raises ValueError for shapes that do not fit, or
    scales that are not 2**bits apart.
    """
    _check_matrix(w)
    shapes = {np.shape(beta), *(scale.shape for scale in scales)}
    if shapes != {(len(w),)}:
        raise ValueError(f"offset and scales have shapes {sorted(shapes)}; each needs ({len(w)},)")
    check_finite(beta, "offset")
    _check_digit_ratio(scales, bits)
    terms = len(scales)
    wide = _levels(w, beta, scales[-1], bits, terms).astype(wide_dtype(bits, terms))
    return tuple(part.astype(np.int8) for part in _split(wide, bits, terms))


def _by_digit(finest: FloatArray, bits: int, terms: int) -> tuple[FloatArray, ...]:
    """The scales of all digits, most significant first."""
    return tuple(
        np.asarray(np.ldexp(finest, bits * i)).astype(finest.dtype) for i in reversed(range(terms))
    )


def _levels(
    w: FloatArray, beta: FloatArray, finest: FloatArray, bits: int, terms: int
) -> FloatArray:
    lowest, highest = offset_range(bits, terms)
    level = w - beta[:, np.newaxis]
    level /= finest[:, np.newaxis]
    np.rint(level, out=level)
    level.clip(lowest, highest, out=level)
    return np.asarray(level)


class _Best:
    """The best line of each row so far, as it will be stored, and what is left by it."""

    def __init__(self, w: FloatArray, bits: int, terms: int) -> None:
        self.w, self.bits, self.terms = w, bits, terms
        low, high = w.min(axis=1), w.max(axis=1)
        constant = low == high
        self.beta = np.where(constant, low, 0).astype(w.dtype)
        self.scale = np.ones(len(w), w.dtype)
        self.error: Float64Array = np.where(constant, 0.0, np.inf)
        # Squares of errors in these units neither overflow nor underflow.
        self.unit = np.where(constant, 1, np.maximum(np.abs(low), np.abs(high))).astype(w.dtype)

    def turns(self, beta: Float64Array, scale: Float64Array, count: int) -> None:
        """Go on from a line, keeping what is better than the best known."""
        w, tiny = self.w, np.finfo(self.w.dtype).tiny
        for turn in range(count):
            stored, step = beta.astype(w.dtype), np.maximum(scale.astype(w.dtype), tiny)
            level = _levels(w, stored, step, self.bits, self.terms)
            rest = w - stored[:, np.newaxis]
            rest -= level * step[:, np.newaxis]
            rest /= self.unit[:, np.newaxis]
            error = np.einsum("ij,ij->i", rest, rest, dtype=np.float64)
            better = error < self.error
            self.error = np.where(better, error, self.error)
            self.beta = np.where(better, stored, self.beta)
            self.scale = np.where(better, step, self.scale)
            if turn + 1 < count:
                beta, scale = _line(w, level, beta, scale)


def _search(w: FloatArray, bits: int, terms: int) -> tuple[FloatArray, FloatArray]:
    """The best (β, finest scale) per row that is found from several starts."""
    best = _Best(w, bits, terms)
    for beta, scale in _starts(w, bits, terms):
        best.turns(beta, scale, FIRST_TURNS)
    best.turns(best.beta.astype(np.float64), best.scale.astype(np.float64), MORE_TURNS)
    return best.beta, best.scale


def _starts(w: FloatArray, bits: int, terms: int) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Lines to begin with: no offset, then shares of the range about its middle and the mean."""
    lowest, highest = offset_range(bits, terms)
    low, high = w.min(axis=1).astype(np.float64), w.max(axis=1).astype(np.float64)
    plain = safe_scale(np.maximum(-w.min(axis=1), w.max(axis=1)), wide_half_range(bits, terms))
    yield np.zeros(len(w)), plain.astype(np.float64)
    for share in STARTS if 2 ** (bits * terms) <= FEW_LEVELS else STARTS[:2]:
        for middle in ((low + high) / 2, w.mean(axis=1, dtype=np.float64)):
            scale = np.where(high > low, share * (high - low) / (highest - lowest), 1.0)
            yield middle - scale * (lowest + highest) / 2, scale


def _line(
    w: FloatArray, level: FloatArray, beta: Float64Array, scale: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """The least-squares line w ≈ β + s·level of each row; the old one where there is none."""
    x, y = level.astype(np.float64), w.astype(np.float64)
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    x -= mean_x[:, np.newaxis]
    spread = np.einsum("ij,ij->i", x, x)
    slope = np.einsum("ij,ij->i", x, y) / np.where(spread > 0, spread, 1)
    usable = slope > 0
    slope = np.where(usable, slope, scale)
    return np.where(usable, mean_y - slope * mean_x, beta), slope


def _check_matrix(w: FloatArray) -> None:
    check_float(w, "w")
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}; give [out, in]")
    check_finite(np.array([w.min(), w.max()]), "w")
