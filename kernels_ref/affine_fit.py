"""One slope and one offset per output channel, fitted after rounding (QPRep).

wanted ≈ γ * actual + β. With symmetric weights it merges for nothing: the scale is multiplied by
γ, the bias becomes γ b + β. The affine is that of RepAPQ (arXiv 2402.16121); the closed form, in
the least absolute deviations, is our own.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, check_finite, check_float
from onnxq.kernels_ref.moments import Float64Array

FitMeasure = Literal["mae", "mse"]

# A slope outside says that the rounding is broken, or the channel too quiet to be fitted.
SMALLEST_GAMMA, LARGEST_GAMMA = 0.5, 2.0
# Each step goes to a better line through two samples; a handful is usual.
MAX_STEPS = 50
PIECE_ELEMENTS = 1 << 20


def fit_affine(
    actual: FloatArray, wanted: FloatArray, *, measure: FitMeasure = "mae"
) -> tuple[Float64Array, Float64Array]:
    """(γ, β), float64 [out] each, that bring γ * actual + β nearest to wanted per channel.

    actual, wanted: float [n, out], finite. mae: least absolute deviations; mse: least squares.
    A channel whose γ would lie outside 0.5..2, or that does not vary, has γ = 1 and only β. The
    result is on these samples never worse than no change.
    Raises ValueError for an unknown measure, other shapes, NaN or infinity.
    """
    _check_pair(actual, wanted)
    _check_measure(measure)
    channels = actual.shape[1]
    gamma, beta = np.ones(channels), np.zeros(channels)
    step = max(1, PIECE_ELEMENTS // len(actual))
    for start in range(0, channels, step):
        piece = slice(start, start + step)
        # One channel per row: sorting runs along memory.
        x = np.ascontiguousarray(actual[:, piece].T, dtype=np.float64)
        y = np.ascontiguousarray(wanted[:, piece].T, dtype=np.float64)
        gamma[piece], beta[piece] = _fit(x, y, measure)
    return gamma, beta


def keep_if_better(
    gamma: FloatArray,
    beta: FloatArray,
    actual: FloatArray,
    wanted: FloatArray,
    *,
    measure: FitMeasure = "mae",
) -> tuple[Float64Array, Float64Array]:
    """(γ, β) where they are not worse on held-out samples, and (1, 0) for the other channels.

    gamma, beta: [out]; actual, wanted: [n, out], samples that the fit has not seen.
    Raises ValueError as `fit_affine`, and for a gamma or beta of another length.
    """
    _check_pair(actual, wanted)
    _check_measure(measure)
    if gamma.shape != actual.shape[1:] or beta.shape != actual.shape[1:]:
        raise ValueError(
            f"gamma has shape {gamma.shape} and beta {beta.shape}; "
            f"both need one value for each of the {actual.shape[1]} channels"
        )
    x, y = actual.T.astype(np.float64), wanted.T.astype(np.float64)
    one, zero = np.ones(len(x)), np.zeros(len(x))
    keep = _error(x, y, gamma, beta, measure) <= _error(x, y, one, zero, measure)
    return np.where(keep, gamma, one), np.where(keep, beta, zero)


def weighted_median(values: FloatArray, weights: FloatArray) -> npt.NDArray[np.intp]:
    """Per row, the index of the lower weighted median: the least of Σ weights * |values - m|.

    values, weights: [rows, n], weights >= 0. Returns [rows].
    """
    order = np.argsort(values, axis=1, kind="stable")
    below = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    middle = np.argmax(below >= 0.5 * below[:, -1:], axis=1)
    return np.asarray(np.take_along_axis(order, middle[:, np.newaxis], axis=1)[:, 0])


def _fit(
    x: Float64Array, y: Float64Array, measure: FitMeasure
) -> tuple[Float64Array, Float64Array]:
    gamma, beta = _least_squares(x, y)
    if measure == "mae":
        gamma, beta = _least_deviations(x, y, gamma)
    refused = ~((gamma >= SMALLEST_GAMMA) & (gamma <= LARGEST_GAMMA))
    shift = np.median(y - x, axis=1) if measure == "mae" else np.mean(y - x, axis=1)
    gamma, beta = np.where(refused, 1.0, gamma), np.where(refused, shift, beta)
    one, zero = np.ones(len(x)), np.zeros(len(x))
    better = _error(x, y, gamma, beta, measure) < _error(x, y, one, zero, measure)
    return np.where(better, gamma, one), np.where(better, beta, zero)


def _least_squares(x: Float64Array, y: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Slope 1 where x does not vary."""
    x_mean, y_mean = x.mean(axis=1), y.mean(axis=1)
    dx = x - x_mean[:, np.newaxis]
    power = np.einsum("ij,ij->i", dx, dx)
    product = np.einsum("ij,ij->i", dx, y - y_mean[:, np.newaxis])
    varies = power > np.finfo(np.float64).tiny
    gamma = np.where(varies, product / np.where(varies, power, 1.0), 1.0)
    return gamma, y_mean - gamma * x_mean


def _least_deviations(
    x: Float64Array, y: Float64Array, gamma: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """The line of least absolute deviations, from the slope `gamma` on.

    A best line passes through two samples. From one of them on, the best slope is a weighted
    median, and the sample that is that median is the next to turn about: every step is the
    exact best of its line, and where no three samples lie on the final line it is the optimum.
    Alternating between γ and β instead stalls early: the two are correlated.
    """
    rows = np.arange(len(x))
    pivot = weighted_median(y - gamma[:, np.newaxis] * x, np.ones_like(x))
    beta = y[rows, pivot] - gamma * x[rows, pivot]
    error = _error(x, y, gamma, beta, "mae")
    for _ in range(MAX_STEPS):
        px, py = x[rows, pivot][:, np.newaxis], y[rows, pivot][:, np.newaxis]
        dx, dy = x[rows] - px, y[rows] - py
        slopes = np.divide(dy, dx, out=np.zeros_like(dy), where=dx != 0)
        pivot = weighted_median(slopes, np.abs(dx))
        found = slopes[np.arange(len(rows)), pivot]
        offset = py[:, 0] - found * px[:, 0]
        found_error = _error(x[rows], y[rows], found, offset, "mae")
        # Also false where all dx are 0: such a channel has no slope to find.
        better = found_error < error[rows]
        if not better.any():
            break
        rows, pivot = rows[better], pivot[better]
        gamma[rows], beta[rows] = found[better], offset[better]
        error[rows] = found_error[better]
    return gamma, beta


def _error(
    x: Float64Array, y: Float64Array, gamma: FloatArray, beta: FloatArray, measure: FitMeasure
) -> Float64Array:
    rest = y - gamma[:, np.newaxis] * x - beta[:, np.newaxis]
    return np.asarray(np.mean(np.abs(rest) if measure == "mae" else np.square(rest), axis=1))


def _check_pair(actual: FloatArray, wanted: FloatArray) -> None:
    for values, name in ((actual, "actual"), (wanted, "wanted")):
        check_float(values, name)
        check_finite(values, name)
    if actual.ndim != 2 or actual.shape != wanted.shape:
        raise ValueError(
            f"actual has shape {actual.shape} and wanted {wanted.shape}; give [n, out] for both"
        )


def _check_measure(measure: str) -> None:
    if measure not in ("mae", "mse"):
        raise ValueError(f"measure is {measure!r}; choose mae or mse")
