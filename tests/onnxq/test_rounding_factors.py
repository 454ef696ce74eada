"""Factors say what rounding to samples does to the error of a node."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from budgeting import classifier, images, planned
from small import model, weights

from onnxq.calibrate_weights import calibrate_weights
from onnxq.candidates import LEFT_IN_FLOAT, bits
from onnxq.errors import CalibrationError
from onnxq.feeds import Feed
from onnxq.model import Model
from onnxq.plan import Plan
from onnxq.rounding_factors import rounding_factors, with_rounding
from onnxq.sensitivity import Table, estimate
from onnxq.trial import Trial

CANDIDATES = [bits(4), bits(4, block_size=16), bits(8), bits(8, terms=2), LEFT_IN_FLOAT]
WIDTH = 48


def linear() -> onnx.ModelProto:
    return model(
        "g (float[N,48] x) => (float[N,32] y) { [fc] y = MatMul (x, w) }",
        {"w": weights(WIDTH, 32, seed=1, scale=0.2)},
    )


def feeds(count: int, correlated: bool, seed: int = 0) -> list[Feed]:
    """64 rows each: white, or of nine tenths a common part in eight directions."""
    mix = np.random.default_rng(9).standard_normal((8, WIDTH)) / 8**0.5
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = rng.standard_normal((64, WIDTH))
        if correlated:
            x = 0.1**0.5 * x + 0.9**0.5 * rng.standard_normal((64, 8)) @ mix
        made.append({"x": x.astype(np.float32)})
    return made


def factors(proto: onnx.ModelProto, samples: list[Feed]) -> tuple[Model, Plan, Table, np.ndarray]:
    loaded, plan = planned(proto)
    table = estimate(loaded, plan, CANDIDATES)
    return loaded, plan, table, rounding_factors(loaded, plan, table, samples)


@pytest.mark.parametrize("option", [0, 1, 2])
def test_they_are_what_calibration_does_on_unseen_samples(option: int) -> None:
    """Calibration also tries finer clip ratios and moves single integers: it may gain more."""
    samples = feeds(32, correlated=True)
    loaded, plan, table, found = factors(linear(), samples)
    nearest = table.plan(plan, [option])
    rounded, _ = calibrate_weights(loaded, table.plan(plan, [option]), samples)
    with Trial(loaded, feeds(32, correlated=True, seed=1)) as trial:
        before, after = (trial(one)[0].energy for one in (nearest, rounded))
    happened = after.value / before.value
    error = happened * (before.spread / before.value + after.spread / after.value)
    assert happened - 3 * error < found[0, option] * 1.1
    assert happened > found[0, option] / 2


def test_correlated_inputs_gain_and_white_ones_do_not() -> None:
    white = factors(linear(), feeds(32, correlated=False))[3]
    correlated = factors(linear(), feeds(32, correlated=True))[3]
    # of white inputs H is the identity but for what 2048 rows of 48 vary by: the ratio of a
    # rounding made for such an H to the best is at most 1 + 2 * 48 / 1536
    assert 0.9 < white[0, 2] <= 1.0
    assert (correlated[0, :3] < 0.6 * white[0, :3]).all()
    assert white[0, -1] == correlated[0, -1] == 1.0  # left in float


def test_finer_candidates_have_the_factor_of_the_first_fine_one() -> None:
    found = factors(linear(), feeds(16, correlated=True))[3]
    assert found[0, 3] == found[0, 2] != found[0, 0]


def test_groups_convolutions_and_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, plan, table, found = factors(classifier(), images(12))
    assert found.shape == table.error.shape
    assert ((found > 0) & (found <= 1)).all()
    assert (found[:, 0] < 1).all()
    monkeypatch.setattr("onnxq.rounding_factors._ELEMENTS", 1)  # one clip ratio at a time
    np.testing.assert_allclose(rounding_factors(loaded, plan, table, images(12)), found, rtol=1e-9)
    sizes = [8 * 27**2, 8 * 2 * 72**2, 8 * 256**2, 8 * 64**2]
    monkeypatch.setattr("onnxq.rounding_factors._MOMENT_BYTES", max(sizes))
    # several runs, of a few nodes each; onnxruntime's sums then differ a little
    np.testing.assert_allclose(rounding_factors(loaded, plan, table, images(12)), found, rtol=1e-3)
    monkeypatch.setattr("onnxq.rounding_factors._MOMENT_BYTES", max(sizes) - 1)
    assert (rounding_factors(loaded, plan, table, images(12))[2] == 1).all()  # fc1 is too wide


def test_one_sample_fits_and_judges() -> None:
    found = factors(linear(), feeds(1, correlated=True))[3]
    assert (found[0, :2] < 1).all()


def test_what_is_not_rounded_keeps_its_error() -> None:
    proto = model(
        """g (float[N,48] x, bool c) => (float[N,32] y) {
            y = If (c) <
                then_branch = t () => (float[N,32] a) { [fc] a = MatMul (x, w) },
                else_branch = e () => (float[N,32] b) { [other] b = MatMul (x, v) }
            >
        }""",
        {"w": weights(WIDTH, 32, seed=1), "v": weights(WIDTH, 32, seed=2)},
    )
    samples = [{**feed, "c": np.array(True)} for feed in feeds(4, correlated=True)]
    assert (factors(proto, samples)[3] == 1).all()


def test_only_the_error_changes() -> None:
    loaded, plan, table, found = factors(linear(), feeds(8, correlated=True))
    made = with_rounding(loaded, plan, table, feeds(8, correlated=True))
    np.testing.assert_allclose(made.error, table.error * found)
    np.testing.assert_array_equal(made.bytes, table.bytes)
    assert made.stated == f"{table.stated}, rounded to samples"


def test_a_sample_that_fails_is_named() -> None:
    bad = [*images(2), {"x": np.zeros((1, 4, 8, 8), np.float32)}]
    with pytest.raises(CalibrationError, match="sample 2"):
        factors(classifier(), bad)


def test_one_row_to_judge_by_is_not_fitted_by_its_own_mean() -> None:
    """Six samples of one row each, of which one is held out: no error is taken to vanish."""
    samples = [{"x": feed["x"][:1]} for feed in feeds(6, correlated=False)]
    *_, found = factors(linear(), samples)
    quantized = [i for i, one in enumerate(CANDIDATES) if one.quantized]
    assert (found[:, quantized] > 0.05).all()
