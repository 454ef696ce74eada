"""Tolerances as users write them, and the measures they bound."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import ConfigError
from onnxq.meter import Measured, Meter
from onnxq.tolerance import Tolerance

RNG = np.random.default_rng(0)


def metered(wanted: np.ndarray, got: np.ndarray, label: np.ndarray | None = None) -> Measured:
    """Rows one by one."""
    meter = Meter()
    for i in range(len(wanted)):
        rows = slice(i, i + 1)
        meter.add([wanted[rows]], [got[rows]], None if label is None else label[rows])
    return meter.measured()


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("top1=0.5pt", 0.005, "top1=0.5pt"),
        (" TOP1 = .5 PT ", 0.005, "top1=0.5pt"),
        ("agreement=99%", 0.01, "agreement=99%"),
        ("sqnr=30dB", 1e-3, "sqnr=30dB"),
        ("mae=1%", 0.01, "mae=1%"),
        ("cosine=0.999", 1e-3, "cosine=0.999"),
        ("error=1%", 1e-4, "error=1%"),
    ],
)
def test_parse(text: str, limit: float, shown: str) -> None:
    tolerance = Tolerance.parse(text)
    assert tolerance.limit == pytest.approx(limit)
    assert str(tolerance) == shown
    assert Tolerance.parse(shown) == tolerance
    assert Tolerance.model_validate_json(tolerance.model_dump_json()) == tolerance


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "give one of top1=0.5pt"),
        ("psnr=30dB", "give one of"),
        ("0.5pt", "give one of"),
        ("top1", "write it as top1=0.5pt"),
        ("top1=0.5", "write it as"),
        ("top1=0.5%", "write it as"),
        ("top1=x", "write it as"),
        ("top1=1e999pt", "write it as"),
        ("sqnr=30", "write it as sqnr=30dB"),
        ("cosine=0.999%", "write it as"),
        ("top1=0pt", "more than 0"),
        ("top1=-1pt", "more than 0"),
        ("top1=100pt", "less than 100"),
        ("sqnr=0dB", "more than 0"),
        ("cosine=1", "less than 1"),
        ("error=0%", "more than 0"),
        ("agreement=100%", "less than 100"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Tolerance.parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_measures_are_those_of_the_definitions() -> None:
    wanted = RNG.standard_normal((20, 3, 5))
    got = wanted + 0.01 * RNG.standard_normal(wanted.shape)
    found = metered(wanted, got)
    difference = got - wanted
    assert found.samples == 20
    assert found.relative_error == pytest.approx(
        np.linalg.norm(difference) / np.linalg.norm(wanted)
    )
    assert found.sqnr_db == pytest.approx(-20 * np.log10(found.relative_error))
    assert found.mae.value == pytest.approx(np.abs(difference).sum() / np.abs(wanted).sum())
    angles = [
        1 - np.vdot(w, g) / np.linalg.norm(w) / np.linalg.norm(g)
        for w, g in zip(wanted, got, strict=True)
    ]
    assert found.angle.value == pytest.approx(np.mean(angles))
    assert found.angle.spread == pytest.approx(np.std(angles, ddof=1) / np.sqrt(20))
    assert found.top1 is None
    assert Tolerance.parse("error=1.2%").met(found)
    assert not Tolerance.parse("error=0.8%").met(found)
    with pytest.raises(ConfigError, match="first output"):
        Tolerance.parse("top1=1pt").met(found)


def test_the_worst_output_counts() -> None:
    meter = Meter()
    good, bad = np.ones((1, 4, 4)), np.ones((1, 4, 4))
    meter.add([good, bad], [good, bad * 1.1])
    assert meter.measured().relative_error == pytest.approx(0.1)


def test_integers_count_and_other_outputs_do_not() -> None:
    meter = Meter()
    meter.add([np.array([2, 2]), ["text"]], [np.array([2, 3]), ["other"]])
    assert meter.measured().energy.value == pytest.approx(1 / 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_kept(bad: float) -> None:
    wanted = RNG.standard_normal((3, 10))
    got = wanted.copy()
    got[1, 2] = bad
    found = metered(wanted, got)
    for text in ("top1=50pt", "sqnr=1dB", "mae=99%", "cosine=0.01", "error=99%"):
        assert not Tolerance.parse(text).met(found), text


def test_exact_is_always_kept() -> None:
    wanted = RNG.standard_normal((3, 10))
    found = metered(wanted, wanted)
    for text in ("top1=0.001pt", "agreement=99.99%", "sqnr=300dB", "cosine=0.999999"):
        assert Tolerance.parse(text).met(found, deviations=3)


def test_accuracy_is_counted_with_labels() -> None:
    wanted = np.eye(4)[[0, 1, 2, 3]] * 5
    got = np.eye(4)[[0, 1, 2, 0]] * 5
    assert metered(wanted, got, np.array([0, 1, 2, 3])).top1.value == pytest.approx(0.25)  # type: ignore[union-attr]
    found = metered(wanted, got, np.array([0, 1, 2, 0]))
    assert found.top1 is not None and found.top1.value == pytest.approx(-0.25)
    assert found.disagreement is not None and found.disagreement.value == pytest.approx(0.25)


def _noisy(rows: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((rows, 10))
    return logits, logits + noise * rng.standard_normal(logits.shape)


def _lost(wanted: np.ndarray, got: np.ndarray) -> float:
    """Expected accuracy lost, if the float model's probabilities are right."""
    likely = np.exp(wanted) / np.exp(wanted).sum(axis=1, keepdims=True)
    rows = np.arange(len(wanted))
    return float(np.mean(likely[rows, wanted.argmax(1)] - likely[rows, got.argmax(1)]))


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.parametrize("probabilities", [False, True])
def test_without_labels_it_is_expected_from_few_samples(noise: float, probabilities: bool) -> None:
    """The truth of 100 000 samples lies within four standard errors of what 100 tell."""
    truth = _lost(*_noisy(100_000, noise, 1))
    wanted, got = _noisy(100, noise, 2)
    if probabilities:
        wanted, got = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (wanted, got))
    found = metered(wanted, got).top1
    assert found is not None
    assert abs(found.value - truth) < 4 * found.spread
    assert 0 < found.spread < 2 * truth


def test_it_varies_less_than_counting() -> None:
    counted, expected = [], []
    for seed in range(40):
        wanted, got = _noisy(50, 0.2, seed)
        counted.append(_lost(wanted, got))
        found = metered(wanted, got).top1
        assert found is not None
        expected.append(found.value)
    assert np.std(expected) < 0.7 * np.std(counted)


def test_what_is_no_distribution_counts_changes() -> None:
    wanted = np.array([[0.9, 0.8, 0.1], [0.9, 0.2, 0.1]])
    got = np.array([[0.8, 0.9, 0.1], [0.9, 0.2, 0.1]])
    found = metered(wanted, got)
    assert found.top1 == found.disagreement
    assert found.top1 is not None and found.top1.value == pytest.approx(0.5)


def test_the_loss_grows_as_it_says() -> None:
    """Twice the noise, four times the energy: loss ~ energy ** power."""
    wanted, got = _noisy(4000, 0.02, 3)
    twice = wanted + 2 * (got - wanted)
    small, large = metered(wanted, got), metered(wanted, twice)
    for text in ("top1=1pt", "agreement=99%", "sqnr=30dB", "mae=1%", "cosine=0.9", "error=1%"):
        tolerance = Tolerance.parse(text)
        ratio = tolerance.loss(large).value / tolerance.loss(small).value
        assert ratio == pytest.approx(4**tolerance.power, rel=0.1), text
