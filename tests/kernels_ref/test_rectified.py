"""Moments of functions of normal variables, against closed forms."""

from __future__ import annotations

from math import erf, exp, pi, sqrt

import numpy as np
import pytest

from onnxq.kernels_ref.rectified import mapped_normal

MEAN = np.array([0.0, 1.0, -3.0, 5.0, 2.0])
VARIANCE = np.array([1.0, 4.0, 0.5, 9.0, 0.0])


def relu_moments(mean: float, variance: float) -> tuple[float, float]:
    """E and Var of max(x, 0), arXiv 1906.04721, appendix C."""
    if variance == 0:
        return max(mean, 0.0), 0.0
    s = sqrt(variance)
    density, below = exp(-((mean / s) ** 2) / 2) / sqrt(2 * pi), (1 + erf(mean / s / sqrt(2))) / 2
    first = s * density + mean * below
    return first, (mean**2 + variance) * below + mean * s * density - first**2


def test_relu():
    mean, variance = mapped_normal(MEAN, VARIANCE, lambda x: np.maximum(x, 0.0))
    wanted = np.array([relu_moments(m, v) for m, v in zip(MEAN, VARIANCE, strict=True)])
    # The rule's bound for a bend: 1e-5 deviations; twice that, of a size below 5, for squares.
    assert np.abs(mean - wanted[:, 0]).max() < 1e-5 * 3
    assert np.abs(variance - wanted[:, 1]).max() < 2e-4


def test_a_linear_function_is_exact():
    mean, variance = mapped_normal(MEAN, VARIANCE, lambda x: 2 * x - 1)
    np.testing.assert_allclose(mean, 2 * MEAN - 1, atol=1e-12)
    np.testing.assert_allclose(variance, 4 * VARIANCE, atol=1e-12)


@pytest.mark.parametrize("low", [-1.0, 0.5])
def test_cut_off_channels_are_constant(low):
    mean, variance = mapped_normal(
        np.array([-1e6]), np.array([1.0]), lambda x: np.clip(x, low, 6.0)
    )
    assert mean[0] == pytest.approx(low, abs=1e-12)
    assert variance[0] == pytest.approx(0, abs=1e-12)
