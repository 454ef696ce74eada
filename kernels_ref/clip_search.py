"""How far to clip the scales of a weight so that the OUTPUT of its node is right.

Clipping judged by the weights themselves destroys models: it trades the few large weights, which
carry the output, for the many small ones. Here a ratio is judged by dᵀHd (d the error of the
weights, H the second moments of the inputs) or by the output's mean absolute error on sample
inputs. One ratio is shared by all terms of a series: the terms stay matched to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from onnxq.kernels_ref.checks import FloatArray, check_float
from onnxq.kernels_ref.granularity import PerAxis, PerBlock
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.series import SeriesKind, realize

ClipMeasure = Literal["absmax", "mse", "mae"]

# From no clipping down to what 2 bits may want.
CLIP_RATIOS = tuple(round(1.0 - 0.05 * i, 2) for i in range(14))


@dataclass(frozen=True, eq=False)
class OutputSamples:
    """Inputs of a node and the outputs it should have.

    Attributes:
        x: float [n, in], or [groups, n, in]; some hundred rows are enough.
        wanted: float [n, out], without the bias; None: what the unrounded weight makes of x.
    """

    x: FloatArray
    wanted: FloatArray | None = None


def search_clip(
    w: FloatArray,
    scales: Sequence[FloatArray],
    *,
    bits: int,
    kind: SeriesKind,
    block_size: int | None = None,
    measure: ClipMeasure = "mse",
    hessian: FloatArray | None = None,
    samples: OutputSamples | None = None,
    ratios: Sequence[float] = CLIP_RATIOS,
) -> tuple[FloatArray, ...]:
    """The scales times the ratio that makes the node's output error least, per channel or block.

    w: float [out, in]. scales: those of `series_scales`, one array per term, [out], or
    [out, blocks] with block_size; the result has their shapes and dtypes. absmax: scales as they
    are. mse: needs the hessian Σ x xᵀ, [in, in] or [groups, in, in] (rows of w group after
    group). mae: needs samples. No clipping is always a candidate, so the error under plain
    rounding never grows. Blocks are searched one after the other, each against what the others
    leave at that moment.
    Raises ValueError for an unknown measure, missing or misshapen data, a ratio that is not
    positive, and as `realize`.
    """
    if measure not in ("absmax", "mse", "mae"):
        raise ValueError(f"measure is {measure!r}; choose absmax, mse or mae")
    check_ratios(ratios)
    check_float(w, "w")
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}; give [out, in]")
    values = w.astype(np.float64)
    own = tuple(np.asarray(scale) for scale in scales)
    trial = _Trial(values, bits, kind)
    if measure == "absmax":
        return own
    output: _Output
    if measure == "mse":
        if hessian is None:
            raise ValueError("measure mse needs the hessian of the inputs")
        output = _SquaredOutput(hessian, values)
    else:
        if samples is None:
            raise ValueError("measure mae needs samples of the inputs")
        output = _AbsoluteOutput(samples, values)
    search = _Search(trial, output, tuple(ratios))
    return search.rows(own) if block_size is None else search.blocks(own, block_size)


class _Trial:
    """The rounding error of columns of w under given scales."""

    def __init__(self, w: Float64Array, bits: int, kind: SeriesKind) -> None:
        self.w, self.bits, self.kind = w, bits, kind

    def error(self, scales: Sequence[FloatArray], columns: slice) -> Float64Array:
        piece = np.ascontiguousarray(self.w[:, columns])
        found = realize(self.kind, piece, scales, bits=self.bits, granularity=PerAxis(0))
        return np.asarray(piece - found.dequantize())


class _Output(Protocol):
    """The output error of an error of the weights, with some columns changed at a time."""

    def start(self, error: Float64Array) -> None:
        """Begin from the weights' error [out, in]."""

    def cost(self, change: Float64Array, columns: slice) -> Float64Array:
        """[out]: the output error (up to a constant) with `change` added to those columns."""

    def accept(self, change: Float64Array, columns: slice) -> None:
        """Make the change the new state."""


class _SquaredOutput:
    """(d + c)ᵀ H (d + c) - dᵀHd = 2 cᵀ H d + cᵀ H c, with H d kept up to date."""

    def __init__(self, hessian: FloatArray, w: Float64Array) -> None:
        h = hessian[np.newaxis] if hessian.ndim == 2 else hessian
        if h.ndim != 3 or h.shape[1:] != (w.shape[1],) * 2 or w.shape[0] % len(h):
            raise ValueError(
                f"hessian has shape {hessian.shape} and w {w.shape}; give [in, in] or "
                f"[groups, in, in]"
            )
        self.h = h.astype(np.float64)
        self.product: Float64Array = np.zeros_like(w)

    def start(self, error: Float64Array) -> None:
        self.product = self._times(error, self.h)

    def cost(self, change: Float64Array, columns: slice) -> Float64Array:
        inner = self._times(change, self.h[:, columns, columns])
        inner += 2.0 * self.product[:, columns]
        return np.asarray(np.einsum("oi,oi->o", change, inner))

    def accept(self, change: Float64Array, columns: slice) -> None:
        self.product += self._times(change, self.h[:, columns])

    def _times(self, left: Float64Array, h: Float64Array) -> Float64Array:
        split = left.reshape(len(h), -1, left.shape[1])
        return np.asarray(np.matmul(split, h).reshape(len(left), -1))


class _AbsoluteOutput:
    """Mean |wanted - actual| per channel, with the difference [groups, n, rows] kept."""

    def __init__(self, samples: OutputSamples, w: Float64Array) -> None:
        x = samples.x[np.newaxis] if samples.x.ndim == 2 else samples.x
        check_float(x, "samples.x")
        if x.ndim != 3 or x.shape[2] != w.shape[1] or w.shape[0] % len(x):
            raise ValueError(
                f"samples.x has shape {samples.x.shape} and w {w.shape}; give [n, in] or "
                f"[groups, n, in]"
            )
        self.x = x.astype(np.float64)
        self.rest = np.zeros((len(x), x.shape[1], w.shape[0] // len(x)))
        if samples.wanted is not None:
            if samples.wanted.shape != (x.shape[1], w.shape[0]):
                raise ValueError(
                    f"samples.wanted has shape {samples.wanted.shape}; "
                    f"give {(x.shape[1], w.shape[0])}"
                )
            wanted = samples.wanted.astype(np.float64)
            self.rest += wanted.reshape(x.shape[1], len(x), -1).transpose(1, 0, 2)
            self.rest -= self._output(w, slice(None))

    def start(self, error: Float64Array) -> None:
        self.rest += self._output(error, slice(None))

    def cost(self, change: Float64Array, columns: slice) -> Float64Array:
        rest = self._output(change, columns)
        rest += self.rest
        return np.asarray(np.abs(rest, out=rest).mean(axis=1).reshape(-1))

    def accept(self, change: Float64Array, columns: slice) -> None:
        self.rest += self._output(change, columns)

    def _output(self, weights: Float64Array, columns: slice) -> Float64Array:
        split = weights.reshape(len(self.x), -1, weights.shape[1]).transpose(0, 2, 1)
        return np.asarray(np.matmul(self.x[:, :, columns], split))


@dataclass(frozen=True, eq=False)
class _Search:
    trial: _Trial
    output: _Output
    ratios: tuple[float, ...]

    def rows(self, scales: tuple[FloatArray, ...]) -> tuple[FloatArray, ...]:
        every = slice(None)
        error = self.trial.error(scales, every)
        self.output.start(error)
        return self._best(scales, error, every)[0]

    def blocks(self, scales: tuple[FloatArray, ...], block_size: int) -> tuple[FloatArray, ...]:
        w, bits = self.trial.w, self.trial.bits
        granularity = PerBlock(1, block_size)
        series = realize(self.trial.kind, w, scales, bits=bits, granularity=granularity)
        self.output.start(w - series.dequantize())
        result = tuple(scale.copy() for scale in scales)
        for block, start in enumerate(range(0, w.shape[1], block_size)):
            columns = slice(start, start + block_size)
            here = tuple(scale[:, block] for scale in scales)
            error = self.trial.error(here, columns)
            best, found = self._best(here, error, columns)
            self.output.accept(found - error, columns)
            for scale, chosen in zip(result, best, strict=True):
                scale[:, block] = chosen
        return result

    def _best(
        self, scales: tuple[FloatArray, ...], error: Float64Array, columns: slice
    ) -> tuple[tuple[FloatArray, ...], Float64Array]:
        """The best scales [out] of some columns, and the error of the weights with them."""
        best, best_error = scales, error
        best_cost = self.output.cost(np.zeros_like(error), columns)
        for ratio in self.ratios:
            if ratio == 1.0:
                continue
            trial = tuple(clipped(scale, ratio) for scale in scales)
            found = self.trial.error(trial, columns)
            cost = self.output.cost(found - error, columns)
            better = cost < best_cost
            pairs = zip(trial, best, strict=True)
            best = tuple(np.where(better, new, old) for new, old in pairs)
            best_error = np.where(better[:, np.newaxis], found, best_error)
            best_cost = np.where(better, cost, best_cost)
        return best, best_error


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise ValueError unless all ratios are positive, finite numbers."""
    if not all(np.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios are {list(ratios)}; give positive numbers")


def clipped(scale: FloatArray, ratio: float) -> FloatArray:
    """The product with one ratio, of scale's dtype: scales powers of two apart stay exactly so."""
    product = scale * scale.dtype.type(ratio)
    return np.asarray(np.maximum(product, np.finfo(scale.dtype).tiny))
