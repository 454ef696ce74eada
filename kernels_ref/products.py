"""Which products of weight terms and activation terms are computed, and what the others are worth.

A product Q_i·A_j weighs s_i t_j. With X-bit weight terms and B-bit activation terms that falls by
about 2**X with every i and 2**B with every j.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from onnxq.kernels_ref.activation_series import first_step, residual_step
from onnxq.kernels_ref.checks import FloatArray, check_bits, check_term_count
from onnxq.kernels_ref.quantize import half_range
from onnxq.kernels_ref.series import Series

ProductRule = Literal["all", "triangular"] | int
Pair = tuple[int, int]


def kept_products(
    weight_terms: int,
    activation_terms: int,
    rule: ProductRule = "triangular",
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
) -> tuple[Pair, ...]:
    """The pairs (weight term, activation term), counted from 0, in order of weight term.

    all: every pair. triangular: without those whose numbers, counted from 1, sum to more than
    max(weight_terms, activation_terms) + 1. A number N: the N most significant ones, by nominal
    significance 2**-(weight_bits·i + activation_bits·j); of two equal ones that with the later
    activation term, as one scale for a whole activation is coarser than one per output channel.
    N beyond the number of pairs keeps all. Raises ValueError for N or numbers of terms below 1.
    """
    check_term_count(weight_terms)
    check_term_count(activation_terms)
    pairs = [(i, j) for i in range(weight_terms) for j in range(activation_terms)]
    if rule == "all":
        return tuple(pairs)
    if rule == "triangular":
        last = max(weight_terms, activation_terms) - 1
        return tuple((i, j) for i, j in pairs if i + j <= last)
    if rule < 1:
        raise ValueError(f"products is {rule}; at least 1 product is computed")
    pairs.sort(key=lambda pair: (weight_bits * pair[0] + activation_bits * pair[1], -pair[1]))
    return tuple(sorted(pairs[:rule]))


def dropped_bound(
    weight: Series,
    activation_bits: int,
    activation_terms: int,
    kept: Collection[Pair],
    activation_range: float = 1.0,
) -> FloatArray:
    """The most that the products left out can change an output, float64 [out].

    weight: the series of a weight [out, in]. activation_range: rmax - rmin, with 0 inside, of the
    activation; by default the bound is relative to it. Σ over the pairs left out of
    s_i · Σ|q_i| · t_j · max|A_j - z_j|, where max|A_j - z_j| is 2**bits - 1 for the first term
    and 2**(bits-1) - 1 for those after it. Exact up to float32 rounding of the scales.
    Raises ValueError for a weight that is not a matrix, or bits outside 2..8.
    """
    check_bits(activation_bits)
    check_term_count(activation_terms)
    shape = weight.terms[0].q.shape
    if len(shape) != 2:
        raise ValueError(f"the weight has shape {shape}; give it as [out, in]")
    scale = activation_range * float(first_step(activation_bits))
    reach = [scale * (2**activation_bits - 1)]
    for _ in range(1, activation_terms):
        scale *= float(residual_step(activation_bits))
        reach.append(scale * half_range(activation_bits))
    bound = np.zeros(shape[0])
    for i, term in enumerate(weight.terms):
        sums = np.abs(term.dequantize().astype(np.float64)).sum(axis=1)
        bound += sums * sum(reach[j] for j in range(activation_terms) if (i, j) not in kept)
    return bound
