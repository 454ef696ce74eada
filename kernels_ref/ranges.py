"""The range of an activation over calibration samples, in bounded memory, and its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import AnyArray
from onnxq.kernels_ref.granularity import PerTensor
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.quantize import affine_params

Range = tuple[float, float]
Loss = Callable[[Float64Array], Float64Array]

PIECE_ELEMENTS = 1 << 20
# Thresholds tried by `entropy` over the histogram, and by `mse` and `mae` along each side.
ENTROPY_STEPS, CLIP_STEPS, ROUNDS = 128, 48, 2
# Points at which the rounding error of one bin is evaluated.
POINTS_PER_BIN = 4
# Probability given to what a quantized distribution has lost altogether.
LOST = 1e-4
# The exponent of float64's smallest number.
SMALLEST_EXPONENT = -1074


class RangeHistogram:
    """Counts of values in equal bins aligned at zero, whose width doubles as the range grows.

    Zeros are counted apart: they are exact in every quantization, and after a Relu they would
    drown the rest. Memory is `bins` counters, whatever the number of samples.

    Attributes:
        not_finite: how many NaN and infinities were given; they count nowhere else.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 16:
            raise ValueError(f"bins is {bins}; give at least 16")
        self.not_finite = 0
        self._counts: npt.NDArray[np.int64] = np.zeros(bins, dtype=np.int64)
        # Bin i covers [(first + i) * 2**exponent, (first + i + 1) * 2**exponent); first <= 0.
        self._first = 0
        self._exponent: int | None = None
        self._zeros = 0
        self._min, self._max = 0.0, 0.0

    @property
    def count(self) -> int:
        """How many finite values were given."""
        return int(self._counts.sum()) + self._zeros

    @property
    def bin_width(self) -> float:
        """In the units of the values; 0 before the first value that is not zero."""
        return 0.0 if self._exponent is None else math.ldexp(1.0, self._exponent)

    def add(self, x: AnyArray) -> None:
        """Take in an array of numbers of any shape."""
        flat = np.asarray(x).reshape(-1)
        for start in range(0, flat.size, PIECE_ELEMENTS):
            piece = flat[start : start + PIECE_ELEMENTS].astype(np.float64)
            finite = piece[np.isfinite(piece)]
            values = finite[finite != 0.0]
            self.not_finite += piece.size - finite.size
            self._zeros += finite.size - values.size
            if values.size:
                self._count_in(values)

    def min_max(self) -> Range:
        """The smallest and the largest value, exactly, widened to include 0; (0, 0) for none."""
        return self._min, self._max

    def percentile(self, p: float) -> Range:
        """The range that holds the middle p percent of all values, widened to include 0.

        As onnxruntime's, it cuts (100 - p) / 2 percent on each side. Right within a bin width.
        Raises ValueError for a p outside 0..100.
        """
        if not 0.0 <= p <= 100.0:
            raise ValueError(f"p is {p}; give a percentage from 0 to 100")
        if self._exponent is None:
            return 0.0, 0.0
        tail = (100.0 - p) / 200.0
        counts = self._counts.copy()
        counts[-self._first] += self._zeros
        low, high = self._quantile(counts, tail), self._quantile(counts, 1.0 - tail)
        return float(np.clip(low, self._min, 0.0)), float(np.clip(high, 0.0, self._max))

    def entropy(self, levels: int = 255) -> Range:
        """The range whose quantization to `levels` steps loses least information (KL divergence).

        Both sides are cut at one magnitude t, as far as the values reach. What lies beyond counts
        at the edge of the reference and nowhere in the quantized distribution. Zeros are left out.
        Source: Migacz, 8-bit inference with TensorRT, GTC 2017; here for affine ranges too.
        Raises ValueError for less than 2 levels.
        """
        _check_levels(levels)
        if self._exponent is None:
            return 0.0, 0.0
        low, high = self._extent(self._exponent)
        largest = max(-self._min, self._max) / self.bin_width
        # With fewer bins than levels nothing is merged and no loss is seen.
        sides = 2.0 if self._min < 0.0 < self._max else 1.0
        best, least = largest, math.inf
        for reach in np.linspace(largest, min(levels / sides, largest), ENTROPY_STEPS):
            start, stop = max(math.floor(-reach), low), min(math.ceil(reach), high + 1)
            lost = _divergence(self._counts, start - self._first, stop - self._first, levels)
            if lost < least:
                best, least = float(reach), lost
        t = best * self.bin_width
        return max(self._min, -t), min(self._max, t)

    def mse(self, levels: int = 255) -> Range:
        """The range of the least mean squared error, values quantized to `levels` steps.

        From the histogram, by trial: one factor for both ends, then each end.
        Raises ValueError for less than 2 levels.
        """
        return self._least_error(levels, np.square)

    def mae(self, levels: int = 255) -> Range:
        """The range of the least mean absolute error; as `mse` in all else."""
        return self._least_error(levels, np.abs)

    def _count_in(self, values: Float64Array) -> None:
        self._min = min(self._min, float(values.min()))
        self._max = max(self._max, float(values.max()))
        exponent = self._widen()
        places = np.floor(np.ldexp(values, -exponent)).astype(np.int64) - self._first
        self._counts += np.bincount(places, minlength=len(self._counts))

    def _widen(self) -> int:
        """Double the bins until zero and all values fit, and move the counts; the exponent."""
        bins = len(self._counts)
        # Divided first: the span of float64 values may overflow.
        width = self._max / bins - self._min / bins
        exponent = math.frexp(width)[1] - 1 if width > 0.0 else SMALLEST_EXPONENT
        if self._exponent is not None:
            exponent = max(exponent, self._exponent)
        while self._extent(exponent)[1] - self._extent(exponent)[0] >= bins:
            exponent += 1
        first = self._extent(exponent)[0]
        if self._exponent is None:
            self._first, self._exponent = first, exponent
        elif (first, exponent) != (self._first, self._exponent):
            # A bin's index halved and rounded down is the index of the bin twice as wide. From 62
            # on every index is 0 or -1 already, and a longer shift has no defined result.
            shift = min(exponent - self._exponent, 62)
            places = ((self._first + np.arange(bins)) >> shift) - first
            counts, filled = np.zeros_like(self._counts), self._counts > 0
            np.add.at(counts, places[filled], self._counts[filled])
            self._counts, self._first, self._exponent = counts, first, exponent
        return exponent

    def _extent(self, exponent: int) -> tuple[int, int]:
        """Indices of the bins in which the smallest and the largest value lie, 0 included."""
        low, high = math.ldexp(self._min, -exponent), math.ldexp(self._max, -exponent)
        return math.floor(low), math.floor(high)

    def _quantile(self, counts: npt.NDArray[np.int64], fraction: float) -> float:
        """Where the sorted values reach `fraction` of their number."""
        below = np.cumsum(counts)
        rank = max(fraction * float(below[-1]), 1.0)
        place = min(int(np.searchsorted(below, rank)), int(np.flatnonzero(counts)[-1]))
        within = 1.0 - (float(below[place]) - rank) / float(counts[place])
        return (self._first + place + min(within, 1.0)) * self.bin_width

    def _least_error(self, levels: int, loss: Loss) -> Range:
        _check_levels(levels)
        if self._exponent is None:
            return 0.0, 0.0
        filled = np.flatnonzero(self._counts)
        inside = (np.arange(POINTS_PER_BIN) + 0.5) / POINTS_PER_BIN
        points = ((self._first + filled)[:, np.newaxis] + inside) * self.bin_width
        points = points.clip(self._min, self._max)
        weights = np.repeat(self._counts[filled], POINTS_PER_BIN).astype(np.float64)
        cost = _Cost(points.reshape(-1), weights, levels, loss)
        steps = np.linspace(1.0, 1.0 / CLIP_STEPS, CLIP_STEPS)
        full = (self._min, self._max)
        best = cost.best([(full[0] * f, full[1] * f) for f in steps])
        for _ in range(ROUNDS):
            best = cost.best([best, *((best[0], full[1] * f) for f in steps)])
            best = cost.best([best, *((full[0] * f, best[1]) for f in steps)])
        return best


class _Cost:
    """The error of quantizing weighted points to a range."""

    def __init__(
        self, points: Float64Array, weights: Float64Array, levels: int, loss: Loss
    ) -> None:
        self.points, self.weights, self.levels, self.loss = points, weights, levels, loss

    def best(self, ranges: list[Range]) -> Range:
        """The first of the ranges with the least error; empty ranges do not count."""
        real = [(float(low), float(high)) for low, high in ranges if high > low]
        return min(real, key=self._error)

    def _error(self, ends: Range) -> float:
        step = ends[1] / self.levels - ends[0] / self.levels
        if step <= 0.0:  # underflow
            return math.inf
        zero = np.rint(-ends[0] / step)
        level = np.rint(self.points / step)
        level.clip(-zero, self.levels - zero, out=level)
        return float(self.weights @ self.loss(level * step - self.points))


def activation_params(
    rmin: float, rmax: float, *, bits: int = 8, signed: bool = False
) -> tuple[np.float32, int]:
    """(scale, zero_point) of the range rmin..rmax, widened to include 0; `affine_params` in all.

    Raises ValueError for NaN, infinity, rmin > rmax, or bits outside 2..8.
    """
    if not rmin <= rmax:
        raise ValueError(f"rmin is {rmin} and rmax {rmax}; rmin must not exceed rmax")
    ends = np.array([rmin, rmax], dtype=np.float32)
    scale, zero_point = affine_params(ends, bits, PerTensor(), signed=signed)
    return np.float32(scale), int(zero_point)


def _divergence(counts: npt.NDArray[np.int64], start: int, stop: int, levels: int) -> float:
    """KL divergence of counts[start:stop], quantized to `levels`, from all the counts."""
    inner = counts[start:stop].astype(np.float64)
    reference = inner.copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    if not inner.any():
        return math.inf
    held = reference > 0
    level = np.arange(len(inner)) * levels // len(inner)
    sums, sharing = np.bincount(level, inner), np.bincount(level, held)
    quantized = (sums / np.maximum(sharing, 1))[level][held]
    p = reference[held] / reference.sum()
    q = np.maximum(quantized / quantized.sum(), LOST * p)
    return float(np.sum(p * np.log(p / q)))


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels is {levels}; give at least 2, 255 for 8 bits")
