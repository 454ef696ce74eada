"""What flips are expected to cost: right where it can be known, and from few samples."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.flips import Distances, Flips, Noise, expected_flips
from onnxq.meter import Meter

CLASSES = 10


def _logits(rows: int, seed: int) -> np.ndarray:
    return np.asarray(2 * np.random.default_rng(seed).standard_normal((rows, CLASSES)))


def _noise(rows: int, size: float, seed: int) -> np.ndarray:
    return np.asarray(size * np.random.default_rng(seed).standard_normal((rows, CLASSES)))


def _distances(rows: np.ndarray | None) -> list[Distances]:
    found = [Distances.of(row[None]) for row in ([] if rows is None else rows)]
    return [one for one in found if one is not None]


def _noises(wanted: np.ndarray, got: np.ndarray) -> list[Noise]:
    return [
        one.noise(w[None], g[None])
        for one, w, g in zip(_distances(wanted), wanted, got, strict=True)
    ]


def _expected(
    wanted: np.ndarray,
    got: np.ndarray,
    beside: np.ndarray | None = None,
    fitted: np.ndarray | None = None,
) -> Flips:
    """Row by row; of `beside`, `fitted` are the quantized outputs, if known."""
    noises = [] if beside is None or fitted is None else _noises(beside, fitted)
    return expected_flips([*_distances(beside), *_distances(wanted)], _noises(wanted, got), noises)


def _happened(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    likely = np.exp(wanted) / np.exp(wanted).sum(axis=1, keepdims=True)
    rows, own, other = np.arange(len(wanted)), wanted.argmax(axis=1), got.argmax(axis=1)
    return float(np.mean(likely[rows, own] - likely[rows, other])), float(np.mean(own != other))


def test_margins_and_gaps() -> None:
    found = Distances.of(np.log([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    assert found is not None
    np.testing.assert_allclose(found.margins[0], np.log([2, 4, 8, 8]))
    np.testing.assert_allclose(found.gaps[0], [0.25, 0.375, 0.4375, 0.4375])
    got = np.log([[0.5, 0.5, 0.125, 0.0625, 0.0625]])  # the second class came nearer by log 2
    near, wide = found.noise(np.log([[0.5, 0.25, 0.125, 0.0625, 0.0625]]), got)
    assert near[0] == pytest.approx(np.log(2) / 2)  # of four margins, one changed by log 2
    assert wide[0] == pytest.approx(np.log(2) * (2 / 5) ** 0.5)  # variance of (x, 0, 0, 0, 0): x²/5


def test_outputs_that_are_no_distribution_have_no_distances() -> None:
    assert Distances.of(np.array([[0.9, 0.8, 0.1]])) is None
    assert Distances.of(np.array([[0.7, 0.2, 0.1]])) is not None


@pytest.mark.parametrize("size", [0.05, 0.1, 0.3])
def test_it_is_what_happens_on_many_samples(size: float) -> None:
    """Equal noise in every logit: differences share the first class's, which is not modelled.

    The mean of |N| over such differences is at most 1 and, for the mean of four with a common part,
    at least (2 / pi)**0.5 of their root mean square: the loss, its square, between 0.64 and 1.
    """
    wanted = _logits(40_000, 1)
    lost, changed = _happened(wanted, wanted + _noise(len(wanted), size, 2))
    few = _logits(1500, 3)
    found = _expected(few, few + _noise(len(few), size, 4))
    for (value, error), truth, least in (
        (found.lost, lost, 0.64),
        (found.changed, changed, 0.64**0.5),
    ):
        # 4 standard errors, and up to 10 % more where three classes are close to each other
        assert least * truth - 4 * error < value < 1.1 * truth + 4 * error


def test_samples_beside_make_it_surer() -> None:
    """Distances of 4 times as many samples: nearly half the standard error, and the same mean."""
    found = []
    for seed in range(30):
        wanted, beside = _logits(16, seed), _logits(48, 100 + seed)
        got = wanted + _noise(16, 0.15, 200 + seed)
        found.append((_expected(wanted, got), _expected(wanted, got, beside)))
    alone, both = (np.array([one[i].lost for one in found]) for i in (0, 1))
    assert both[:, 0].std() < 0.8 * alone[:, 0].std()
    assert both[:, 1].mean() < 0.8 * alone[:, 1].mean()
    # means of 30, each of about the standard error that it says
    assert abs(both[:, 0].mean() - alone[:, 0].mean()) < 4 * alone[:, 1].mean() / 30**0.5
    # what it says is what it varies by, within what 30 draws tell (4 / sqrt(2 * 29))
    assert both[:, 0].std() == pytest.approx(both[:, 1].mean(), rel=4 / 58**0.5)


def test_samples_that_were_fitted_to_make_it_surer_still() -> None:
    """Their noise, a third of what it is elsewhere, does not count; how it is shared out does."""
    found = []
    for seed in range(30):
        wanted, beside = _logits(16, seed), _logits(48, 100 + seed)
        got = wanted + _noise(16, 0.15, 200 + seed)
        fitted = beside + _noise(48, 0.05, 300 + seed)
        found.append((_expected(wanted, got, beside), _expected(wanted, got, beside, fitted)))
    alone, both = (np.array([one[i].lost for one in found]) for i in (0, 1))
    assert both[:, 0].std() < 0.9 * alone[:, 0].std()
    assert both[:, 1].mean() < 0.9 * alone[:, 1].mean()
    assert abs(both[:, 0].mean() - alone[:, 0].mean()) < 4 * alone[:, 1].mean() / 30**0.5


def test_no_noise_and_bad_noise() -> None:
    wanted = _logits(5, 0)
    assert _expected(wanted, wanted) == Flips((0.0, 0.0), (0.0, 0.0))
    got = wanted.copy()
    got[3, 2] = np.nan
    assert _expected(wanted, got).lost[0] == np.inf
    assert _expected(wanted, wanted, wanted, got).lost[0] == np.inf
    assert _expected(wanted, wanted, wanted, wanted) == Flips((0.0, 0.0), (0.0, 0.0))


def test_the_meter_takes_distances_beside() -> None:
    wanted, beside = _logits(16, 1), _logits(48, 2)
    got, fitted = wanted + _noise(16, 0.2, 3), beside + _noise(48, 0.1, 4)
    meter = Meter(_distances(beside))
    for noise in _noises(beside, fitted):
        meter.add_fitted(noise)
    for w, g in zip(wanted, got, strict=True):
        meter.add([w[None]], [g[None]])
    measured = meter.measured()
    assert measured.samples == 16
    assert measured.top1 is not None and measured.changed is not None
    found = _expected(wanted, got, beside, fitted)
    assert (measured.top1.value, measured.top1.spread) == pytest.approx(found.lost)
    assert (measured.changed.value, measured.changed.spread) == pytest.approx(found.changed)
