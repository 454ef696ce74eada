"""Scales and integers of weights whose output channels have different numbers of terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref import Series
from onnxq.kernels_ref.offset import spanned_offset, spanning_scales
from onnxq.kernels_ref.partial import Coverage, partial_scales
from onnxq.passes.stored_scales import storable
from onnxq.plan import NodePlan

Array = npt.NDArray[Any]


def terms_per_channel(series: Series) -> Array | None:
    """How many terms each channel of a series has, int8 [out]; None where all have all."""
    if all(term.rows is None for term in series.terms):
        return None
    counts = np.zeros(len(series.terms[0].q), np.int8)
    for term in series.terms:
        counts[slice(None) if term.rows is None else term.rows] += 1
    return counts


def unclipped_scales(target: Array, entry: NodePlan, points: Array | None) -> tuple[Array, ...]:
    """The scales with which nothing of a weight [out, in] is cut off, as the file can hold them.

    points: int [out], the number of each channel's terms; all if not given.
    """
    _, found = partial_scales(
        entry.series,
        target,
        Coverage(points),
        bits=entry.bits,
        terms=entry.terms,
        granularity=entry.matrix_granularity(),
    )
    return storable([positive(scale) for scale in found], entry)


def spanning(target: Array, entry: NodePlan, points: Array | None) -> tuple[Array, ...]:
    """The same of a series with an offset: levels that just span each row."""
    found = tuple(np.empty(len(target), target.dtype) for _ in range(entry.terms))
    for rows, terms in Coverage(points).groups(entry.terms):
        made = spanning_scales(target[rows], bits=entry.bits, terms=terms)
        for i, scale in enumerate(found):
            beyond = np.ldexp(made[-1], entry.bits * (terms - 1 - i))
            scale[rows] = made[i] if i < terms else positive(beyond)
    return found


def offset_of(target: Array, scales: Sequence[Array], bits: int, points: Array | None) -> Array:
    """`spanned_offset` of a weight [out, in] with such scales, [out]."""
    found = np.empty(len(target), scales[0].dtype)
    for rows, terms in Coverage(points).groups(len(scales)):
        found[rows] = spanned_offset(target[rows], scales[terms - 1][rows], bits, terms)
    return found


def of_each(arrays: Sequence[Array], which: Array) -> Array:
    """Each row [out, in] of that one of the arrays that `which`, int [out], says."""
    found = np.empty_like(arrays[0])
    for i, array in enumerate(arrays):
        rows = which == i
        found[rows] = array[rows]
    return found


def positive(scale: Array) -> Array:
    """Float32, with no scale so small that it vanishes."""
    return np.asarray(np.maximum(scale, np.finfo(np.float32).tiny), np.float32)
