"""Rounding of kernels whose inputs at neighbouring positions are alike.

A feature map is smooth: what a kernel's taps read is correlated, so that errors of opposite sign at
neighbouring taps cancel in the output. Second-order rounding (second_order.py) uses that, and needs
no samples for it where the correlation is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.second_order import round_second_order
from onnxq.kernels_ref.series import SeriesKind


def neighbour_correlation(
    kernel: Sequence[int], dilations: Sequence[int], rho: float
) -> Float64Array:
    """The correlation of what the taps of a kernel read, float64 [taps, taps].

    rho to the power of their distance along all axes together, as in a separable first-order
    process. kernel, dilations: one number per space axis. Raises ValueError for rho outside 0..1.
    """
    if not 0 <= rho < 1:
        raise ValueError(f"rho is {rho}; give a correlation from 0 up to, not including, 1")
    places = np.indices(tuple(kernel)).reshape(len(kernel), -1).T * np.asarray(dilations)
    distance = np.abs(places[:, np.newaxis] - places).sum(axis=2)
    return np.asarray(np.power(float(rho), distance), np.float64)


def round_alike(
    w: FloatArray,
    scales: Sequence[FloatArray],
    correlation: FloatArray,
    *,
    bits: int,
    kind: SeriesKind,
    full_range: bool = False,
) -> tuple[npt.NDArray[np.int8], ...]:
    """Round w so that eᵀCe is small, e being the errors of one channel's taps; int8 [out, in] each.

    w: float [out, channels * taps], finite, less the offset if there is one. scales: [out] per
    term. correlation: C, [taps, taps]. full_range: as in `round_second_order`. Channels are taken
    for uncorrelated and rounded apart, which takes a time linear in the size of w; no channel gets
    worse by the measure above than by rounding to nearest. Raises ValueError as
    `round_second_order`.
    """
    taps = len(correlation)
    if w.ndim != 2 or w.shape[1] % taps:
        raise ValueError(f"w has shape {w.shape}; give [out, a multiple of {taps}]")
    channels = w.shape[1] // taps
    rounded = round_second_order(
        w.reshape(-1, taps),
        [np.repeat(scale, channels) for scale in scales],
        correlation,
        bits=bits,
        kind=kind,
        damping=0.0,
        act_order=False,
        full_range=full_range,
    )
    return tuple(term.reshape(w.shape) for term in rounded.terms)
