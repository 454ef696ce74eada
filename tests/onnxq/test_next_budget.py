"""The step from trial to trial: straight to the aim in theory, and little misled by noise."""

import math

import numpy as np
import pytest

from onnxq.next_budget import next_budget
from onnxq.tolerance import Tolerance

ERROR = Tolerance.parse("error=10%")  # loss 0.01, power 1
MAE = Tolerance.parse("mae=1%")  # power 1/2
OPEN = 0.0, math.inf


def test_one_trial_tells_by_theory():
    assert next_budget({0.02: 0.02}, ERROR, OPEN) == pytest.approx(0.0094)
    assert next_budget({0.02: 0.02}, MAE, OPEN) == pytest.approx(0.02 * 0.47**2)


def test_trials_on_a_line_lead_to_where_it_reaches_the_aim():
    """Whatever the slope within bounds, and the closer the farther the trials lie apart."""
    for slope in (0.7, 1.0, 1.4):
        known = {p: 0.005 * (p / 0.01) ** slope for p in (0.002, 0.05)}
        wanted = 0.01 * (0.0094 / 0.005) ** (1 / slope)
        assert next_budget(known, ERROR, OPEN) == pytest.approx(wanted, rel=0.15)


def test_noise_does_not_turn_the_slope_around():
    """A finer plan that measured worse says that both are noise, not that finer is worse."""
    found = next_budget({0.020: 0.0136, 0.015: 0.0188}, ERROR, (0.0, 0.015))
    pooled = math.exp(np.mean(np.log([0.0094 / 0.0136 * 0.020, 0.0094 / 0.0188 * 0.015])))
    assert found == pytest.approx(pooled, rel=0.15)


def test_it_stays_within_the_bracket():
    assert next_budget({0.02: 0.005, 0.01: 0.02}, ERROR, (0.012, 0.013)) == pytest.approx(
        math.sqrt(0.012 * 0.013)
    )
    assert next_budget({0.02: 0.02}, ERROR, (0.0, 0.005)) == 0.0025
    assert next_budget({0.02: 0.0}, ERROR, (0.02, math.inf)) == pytest.approx(0.6)
    # exact weights, whose error is that of activations
    assert next_budget({0.0: 0.02}, ERROR, OPEN) == 0.0
