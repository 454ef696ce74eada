import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import affine_fit, fit_affine, keep_if_better


def deviation(x, y, gamma, beta):
    return np.abs(y - gamma * x - beta).mean(axis=0)


def least_deviation(x, y):
    """The optimum by trying every line through two samples: one of them is always best."""
    lines = []
    for i, j in itertools.combinations(range(len(x)), 2):
        if x[i] != x[j]:
            slope = (y[j] - y[i]) / (x[j] - x[i])
            lines.append(np.abs(y - y[i] - slope * (x - x[i])).mean())
    return min(lines)


@pytest.mark.parametrize("n", [3, 8, 25])
def test_mae_reaches_the_optimum_of_all_lines(n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 40)) + 1
    y = 1.1 * x - 0.2 + 0.1 * rng.standard_t(2, (n, 40))
    gamma, beta = fit_affine(x, y)
    free = (gamma > 0.5) & (gamma < 2) & (gamma != 1)
    assert free.sum() > 20
    best = np.array([least_deviation(x[:, c], y[:, c]) for c in range(40)])
    # Both sides round each of n terms of size <= 20 once or twice.
    slack = 20 * 4 * np.finfo(np.float64).eps
    assert np.all(deviation(x, y, gamma, beta)[free] <= best[free] + slack)


def test_outliers_do_not_move_the_mae_fit_but_do_the_mse_fit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((101, 3))
    y = 1.2 * x + 0.3
    y[:20] += 100
    gamma, beta = fit_affine(x, y)
    np.testing.assert_allclose(gamma, 1.2, rtol=1e-12)
    np.testing.assert_allclose(beta, 0.3, rtol=1e-12)
    assert np.all(np.abs(fit_affine(x, y, measure="mse")[1] - 0.3) > 1)


def test_mse_is_the_least_squares_line():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 4)).astype(np.float32)
    y = (0.9 * x + 0.1 + 0.1 * rng.standard_normal((50, 4))).astype(np.float32)
    gamma, beta = fit_affine(x, y, measure="mse")
    for c in range(4):
        slope, offset = np.polyfit(x[:, c].astype(float), y[:, c].astype(float), 1)
        assert (gamma[c], beta[c]) == pytest.approx((slope, offset), rel=1e-9)


def test_weighted_median_is_the_least_weighted_deviation():
    rng = np.random.default_rng(2)
    values, weights = rng.standard_normal((30, 7)), rng.random((30, 7))
    chosen = affine_fit.weighted_median(values, weights)
    cost = np.einsum("rj,rij->ri", weights, np.abs(values[:, :, None] - values[:, None, :]))
    np.testing.assert_array_equal(chosen, cost.argmin(axis=1))


@settings(deadline=None)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 12), st.integers(1, 4))),
    st.data(),
    st.sampled_from(["mae", "mse"]),
)
def test_is_never_worse_than_no_change_even_with_ties(x, data, measure):
    y = data.draw(hnp.arrays(np.int8, x.shape)).astype(np.float64)
    x = x.astype(np.float64)
    gamma, beta = fit_affine(x, y, measure=measure)
    assert np.all((gamma >= 0.5) & (gamma <= 2))
    power = 1 if measure == "mae" else 2
    fitted, plain = np.abs(y - gamma * x - beta) ** power, np.abs(y - x) ** power
    slack = 1e-12 * (1 + plain.mean(axis=0))
    assert np.all(fitted.mean(axis=0) <= plain.mean(axis=0) + slack)


@pytest.mark.parametrize("measure", ["mae", "mse"])
def test_absurd_slopes_and_dead_channels_keep_slope_one(measure):
    x = np.random.default_rng(3).standard_normal((40, 4))
    x[:, 3] = 2.0
    y = x * np.array([-1.0, 5.0, 0.1, 1.0]) + np.array([0.0, 0.0, 0.0, 0.5])
    y[:, 0] += 50
    gamma, beta = fit_affine(x, y, measure=measure)
    np.testing.assert_array_equal(gamma, 1.0)
    assert beta[3] == 0.5
    middle = np.median if measure == "mae" else np.mean
    assert beta[0] == pytest.approx(middle(y[:, 0] - x[:, 0]))


def test_pieces_of_channels_give_the_same_as_all_at_once(monkeypatch):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((30, 11))
    y = 1.1 * x + 0.1 * rng.standard_normal((30, 11))
    whole = fit_affine(x, y)
    monkeypatch.setattr(affine_fit, "PIECE_ELEMENTS", 100)
    np.testing.assert_array_equal(np.stack(fit_affine(x, y)), np.stack(whole))


def test_held_out_samples_decide_channel_by_channel():
    rng = np.random.default_rng(5)
    actual = rng.standard_normal((60, 3))
    wanted = actual * np.array([1.2, 1.0, 1.0]) + np.array([0.0, 0.3, 0.0])
    gamma, beta = np.array([1.2, 1.0, 1.1]), np.array([0.0, 0.3, 0.2])
    kept = keep_if_better(gamma, beta, actual, wanted)
    np.testing.assert_array_equal(kept[0], [1.2, 1.0, 1.0])
    np.testing.assert_array_equal(kept[1], [0.0, 0.3, 0.0])


def test_refuses_what_cannot_be_fitted():
    ok = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"give \[n, out\] for both"):
        fit_affine(ok, np.zeros((3, 1)))
    with pytest.raises(ValueError, match="measure is 'max'"):
        fit_affine(ok, ok, measure="max")
    with pytest.raises(ValueError, match="wanted holds NaN"):
        fit_affine(ok, np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="one value for each of the 2"):
        keep_if_better(np.ones(3), np.ones(2), ok, ok)
