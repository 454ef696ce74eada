"""How many samples are expected to change class, and what that costs, from few samples.

Half a point of accuracy is one sample in 200: it cannot be counted on a few dozen. But of each
sample the float model says how far the classes behind the first are, and how likely they are; and
the quantized model's outputs say by how much these distances change. Taking the changes as normal
noise of one size gives the probability that a class overtakes the first. Distances need no
quantized model: samples that weights were rounded to, whose noise is too small, still tell them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

RUNNERS_UP = 4  # classes that may overtake the first
# Classes, from the first on, that tell how noisy a sample's logits are. On three classifiers, four
# plans each, this varied half as much from sample to sample (0.2 to 0.3 of the mean) as the noise
# on the margins of the four (0.5 to 0.6). The two were in a ratio of 0.86 to 1.17.
WIDE = 20
_SUMS_TO_ONE = 1e-3
_FAINT = 1e-6  # probabilities below it are all alike
_TINY = 1e-300
_STEP = 0.05  # of the noise, to see how the loss changes with it
# Few of the samples lie so close that small noise matters. What is lost grows as the square of the
# noise up to about two points, so that it is looked up at up to three times the noise, where more
# of them count, and divided. For half a point, 64 of 500 to 2000 samples of three classifiers, this
# made the mean square error 40 % less, and moved the mean by 3 to 8 %.
_SQUARE_UP_TO, _WIDEST = 0.02, 3.0


class Distances(NamedTuple):
    """The classes that come after the float model's first, float64 [samples, RUNNERS_UP] each.

    Attributes:
        margins: how far their logits lie below the first class's.
        gaps: how much less likely they are.
        order: the classes, the first one included; int [samples, WIDE] or all there are.
    """

    margins: Array
    gaps: Array
    order: Array

    @classmethod
    def of(cls, wanted: Array) -> Distances | None:
        """Of a float output [samples, classes]; None where it is no logits or probabilities."""
        logits = _logits(wanted, wanted)
        if logits is None:
            return None
        order = np.argsort(-logits, axis=1, kind="stable")[:, :WIDE]
        exact = np.take_along_axis(logits, order[:, : RUNNERS_UP + 1], axis=1)
        likely = np.exp(exact - exact[:, :1])
        likely /= np.exp(logits - exact[:, :1]).sum(axis=1, keepdims=True)
        return cls(exact[:, :1] - exact[:, 1:], likely[:, :1] - likely[:, 1:], order)

    def noise(self, wanted: Array, got: Array) -> Noise:
        """What quantization adds to these samples; NaN if not finite."""
        exact, found = _logits(wanted, wanted), _logits(wanted, got)
        assert exact is not None and found is not None
        added = np.take_along_axis(found - exact, self.order, axis=1)
        near = added[:, :1] - added[:, 1 : RUNNERS_UP + 1]
        wide = np.sqrt(2 * np.var(added, axis=1, ddof=1))
        return Noise(np.sqrt(np.mean(np.square(near), axis=1)), wide)


class Noise(NamedTuple):
    """Of a difference of two logits, float64 [samples] each.

    Attributes:
        near: root mean square of what is added to the margins of the RUNNERS_UP.
        wide: what the logits of the first WIDE classes vary by, times the root of two.
    """

    near: Array
    wide: Array


def _logits(wanted: Array, output: Array) -> Array | None:
    """An output as logits; `wanted` tells what kind it is."""
    exact = np.nan_to_num(wanted.astype(np.float64))
    found = exact if output is wanted else output.astype(np.float64)
    if not np.isfinite(found).all():
        found = np.full(found.shape, np.nan)
    if exact.min() < 0 or exact.max() > 1 + _SUMS_TO_ONE:
        return found
    if not np.allclose(exact.sum(axis=1), 1, atol=_SUMS_TO_ONE):
        return None
    return np.asarray(np.log(np.maximum(found, _FAINT)))


@dataclass(frozen=True)
class Flips:
    """(mean, standard error) over samples: the accuracy lost, and the share that changes class."""

    lost: tuple[float, float]
    changed: tuple[float, float]


def expected_flips(
    distances: Sequence[Distances], judged: Sequence[Noise], fitted: Sequence[Noise] = ()
) -> Flips:
    """What to expect of samples like these.

    Args:
        distances: of all samples, one entry per run.
        judged: the noise on samples that stand for all others, one entry per run.
        fitted: that on samples that weights were rounded to. It is too small, but tells how noise
            on margins compares with that of all classes.

    The standard error is that of the distances and that of the noise, taken as independent. Where
    noise is not finite, everything is lost.
    """
    if not all(np.isfinite(part).all() for one in (*judged, *fitted) for part in one):
        return Flips((np.inf, 0.0), (np.inf, 0.0))
    noise, spread = _pooled(judged, fitted)
    margins, gaps = (np.concatenate(part) for part in list(zip(*distances, strict=True))[:2])
    sizes = np.array([len(one.margins) for one in distances])
    lost = _mean(_per_run(margins, gaps, sizes, noise))
    wide = float(np.clip(np.sqrt(_SQUARE_UP_TO / max(lost, _TINY)), 1.0, _WIDEST))
    found = []
    for worth, share in ((gaps, wide**2), (np.ones_like(gaps), wide)):
        here, less, more = (
            _per_run(margins, worth, sizes, wide * noise * factor)
            for factor in (1, 1 - _STEP, 1 + _STEP)
        )
        slope = (_mean(more) - _mean(less)) / (2 * _STEP * noise)
        error = float(np.hypot(_ratio_error(here), slope * spread))
        found.append((_mean(here) / share, error / share))
    return Flips(*found)


def _pooled(judged: Sequence[Noise], fitted: Sequence[Noise]) -> tuple[float, float]:
    """The noise on margins, and its standard error.

    The mean, not the root mean square: where noise is large, classes mostly lie far apart. The
    latter says 1.1 to 1.9 times what happened on three classifiers, and varies more.
    """
    near, wide = (np.concatenate(part) for part in zip(*judged, strict=True))
    if not fitted or not wide.any():
        return max(float(np.mean(near)), _TINY), _standard_error(near)
    rows = np.concatenate([np.stack(one, axis=1) for one in (*judged, *fitted)])
    share, level = _mean(rows), float(np.mean(wide))
    spread = np.hypot(_ratio_error(rows) * level, _standard_error(wide) * share)
    return max(share * level, _TINY), float(spread)


def _per_run(margins: Array, worth: Array, sizes: Array, noise: float) -> Array:
    """[runs, 2]: what the samples of each run are expected to lose, and their number."""
    from scipy.special import ndtr  # noqa: PLC0415 - slow to import, for every command

    lost = np.minimum(np.sum(ndtr(-margins / noise) * worth, axis=1), worth.max(axis=1))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.stack([np.add.reduceat(lost, starts), sizes], axis=1)


def _mean(rows: Array) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _ratio_error(rows: Array) -> float:
    """Standard error of a ratio of sums, by the delta method."""
    count = len(rows)
    if count == 1:
        return 0.0
    rest = rows[:, 0] - _mean(rows) * rows[:, 1]
    total = float(rows[:, 1].sum())
    return float(np.sqrt(np.sum(rest**2) * count / (count - 1))) / total


def _standard_error(values: Array) -> float:
    count = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else 0.0
