"""An activation as a sum of terms, `x ≈ Σ t_j (A_j - z_j)`, and its products with a weight's terms.

The first term is affine over the range of x widened to include 0. It leaves at most t_1 / 2 at
every element, the ends of the range included: rounding the zero point moves the ends by at most
half a level, so what saturates there saturates by no more than half a level. A term after it is
symmetric. Its levels -h … h, h = 2**(bits-1) - 1, cover (h + 1/2) scales to either side, so that

    t_(j+1) = t_j / (2**bits - 1)        and        |x - first j terms| <= t_j / 2

hold for every j, and no term needs to look for the range of what it rounds. float32 adds a little:
with u = 2**-24 and L = 2**bits - 1 levels, a few roundings of numbers up to L levels, together
less than 16 L u levels (scale 3, x / scale 1, zero point 1, dequantizing 1, subtracting 1). Scales
are larger by 32 L u or more, so that no residual reaches level h + 1/2: nothing saturates, and
low-bit integers stay in their range without a Clip. For the same reason the first scale of fewer
than 8 bits is larger by 2**-19; with 8 bits the type itself saturates.

Source: the activation side of the series expansion in arXiv 2412.06865; ratio and bound are derived
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxq.kernels_ref.checks import (
    FloatArray,
    IntArray,
    check_bits,
    check_finite,
    check_float,
    check_term_count,
)
from onnxq.kernels_ref.granularity import PerTensor
from onnxq.kernels_ref.integer import Int32Array
from onnxq.kernels_ref.quantize import affine_params, qrange, quantize
from onnxq.kernels_ref.term import Term

# Keeps the scale of an all-zero tensor above zero, far above the denormals.
TINY_RANGE = np.float32(1e-20)
_GUARD_FIRST, _GUARD_REST = 2.0**-19, 2.0**-11

Product = Callable[[IntArray, IntArray, IntArray | int], Int32Array]


def first_step(bits: int) -> np.float32:
    """The first scale of a range of width 1; ValueError for bits outside 2..8."""
    check_bits(bits)
    guard = 0.0 if bits == 8 else _GUARD_FIRST
    step: np.float32 = np.float32((1 + guard) / (2**bits - 1))
    return step


def residual_step(bits: int) -> np.float32:
    """A scale divided by the one before it, just above 1 / (2**bits - 1); ValueError as above."""
    check_bits(bits)
    step: np.float32 = np.float32((1 + _GUARD_REST) / (2**bits - 1))
    return step


def activation_series(
    x: FloatArray, bits: int, terms: int, *, signed: bool = False, nonnegative: bool = False
) -> tuple[Term, ...]:
    """The terms of x, most significant first, bit for bit as the ONNX nodes make them.

    x: float32, finite, any shape. signed: int8 integers, those of the terms after the first around
    0; else uint8, around 2**(bits-1). nonnegative: x is known to be >= 0 without looking (only its
    maximum is used). Each term's scale is a float32 scalar, its zero_point a number. Unsigned 8
    bits are ONNX DynamicQuantizeLinear. |x - Σ terms| <= t_m / 2 within float32 rounding.
    Raises ValueError for bits outside 2..8, no terms, or an unfit x.
    """
    check_bits(bits)
    check_term_count(terms)
    check_float(x, "x")
    if x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype}; activations are float32")
    check_finite(x, "x")
    scale, zero_point = _first_params(x, bits, signed=signed, nonnegative=nonnegative)
    made: list[Term] = []
    rest = x
    for j in range(terms):
        if j:
            rest = rest - made[-1].dequantize()
            scale = np.asarray(scale * residual_step(bits))
            zero_point = 0 if signed else 1 << (bits - 1)
        # In the range of the type, as the nodes do: see above why `bits` bits are enough.
        q = quantize(rest, scale, zero_point, bits=8, granularity=PerTensor(), signed=signed)
        made.append(Term(q, scale, zero_point, bits, PerTensor()))
    return tuple(made)


def _first_params(
    x: FloatArray, bits: int, *, signed: bool, nonnegative: bool
) -> tuple[FloatArray, int]:
    if bits == 8 and not signed:
        scale, zero_point = affine_params(x, 8, PerTensor())
        return scale, int(zero_point)
    lowest, _ = qrange(bits, signed=signed)
    rmax = np.maximum(x.max(), TINY_RANGE)
    if nonnegative:
        return np.asarray(rmax * first_step(bits)), lowest
    rmin = np.minimum(x.min(), np.float32(0))
    scale = np.asarray((rmax - rmin) * first_step(bits))
    return scale, int(lowest - np.rint(rmin / scale))


@dataclass(frozen=True, eq=False)
class SeriesProduct:
    """The products of two series.

    Attributes:
        integers: int32 Q_i·(A_j - z_j) by (i, j), counted from 0.
        total: float64 Σ s_i t_j Q_i·(A_j - z_j).
        magnitude: float64, the sum of the summands' magnitudes, for rounding bounds.
    """

    integers: dict[tuple[int, int], Int32Array]
    total: FloatArray
    magnitude: FloatArray


def series_product(
    activation: Sequence[Term],
    weight: Sequence[tuple[IntArray, FloatArray]],
    kept: Iterable[tuple[int, int]],
    product: Product,
) -> SeriesProduct:
    """Multiply the kept pairs (weight term i, activation term j) and sum them up.

    weight: per term the integers as the operator reads them, and their scales, spread over the
    operator's output by broadcasting. product: called with (A_j, Q_i, z_j), such as
    `conv_integer` with its attributes. Raises ValueError where nothing is kept, and as `product`.
    """
    integers = {}
    total = magnitude = np.zeros(())
    for i, j in kept:
        q, scale = weight[i]
        term = activation[j]
        integers[i, j] = product(term.q, q, term.zero_point)
        part = integers[i, j] * np.float64(term.scale) * scale.astype(np.float64)
        total, magnitude = total + part, magnitude + np.abs(part)
    if not integers:
        raise ValueError("no product is kept; give at least one pair")
    return SeriesProduct(integers, total, magnitude)
