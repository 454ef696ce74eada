"""The knapsack against trying every choice."""

from __future__ import annotations

import ctypes
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.knapsack import Limit, choose, total

ITEMS, OPTIONS = 6, 4
# whole numbers: sums are exact, and different sums differ by more than the solver's tolerances
NUMBERS = hnp.arrays(np.float64, (ITEMS, OPTIONS), elements=st.integers(0, 1000).map(float))


def brute(costs: np.ndarray, limits: list[Limit]) -> float | None:
    sums = (
        total(costs, chosen)
        for chosen in product(range(costs.shape[1]), repeat=len(costs))
        if all(total(limit.amounts, chosen) <= limit.most for limit in limits)
    )
    return min(sums, default=None)


@settings(max_examples=25, deadline=None)
@given(costs=NUMBERS, values=NUMBERS, share=st.floats(0, 1))
def test_as_brute_force(costs: np.ndarray, values: np.ndarray, share: float) -> None:
    least, largest = values.min(axis=1).sum(), values.max(axis=1).sum()
    limits = [Limit(values, float(np.floor(least - 1 + share * (largest - least + 1))))]
    best = brute(costs, limits)
    chosen = choose(costs, limits)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert total(values, chosen) <= limits[0].most
        assert total(costs, chosen) == best


@settings(max_examples=10, deadline=None)
@given(costs=NUMBERS, one=NUMBERS, other=NUMBERS)
def test_several_limits(costs: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    limits = [Limit(v, float(np.floor(v.mean(axis=1).sum()))) for v in (one, other)]
    best = brute(costs, limits)
    chosen = choose(costs, limits)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        assert total(costs, chosen) == best


def test_as_brute_force_with_real_magnitudes() -> None:
    """Bytes by the million and error energies by the millionth."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 2, 3, 8]) * rng.integers(1e3, 1e6, (ITEMS, 1))
    errors = np.array([1e-2, 1e-3, 1e-4, 0]) * rng.uniform(0.1, 2, (ITEMS, 1))
    for budget in (1e-5, 1e-4, 1e-3, 1e-2):
        limits = [Limit(errors, budget)]
        chosen = choose(sizes, limits)
        assert chosen is not None
        assert total(errors, chosen) <= budget
        assert total(sizes, chosen) == brute(sizes, limits)


def test_options_that_are_not_there() -> None:
    costs = np.array([[1.0, np.inf, 3.0], [np.nan, 2.0, 1.0]])
    errors = np.array([[9.0, 0.0, 1.0], [0.0, 2.0, np.inf]])
    assert choose(costs, [Limit(errors, 11)]) == (0, 1)
    assert choose(costs, [Limit(errors, 10)]) == (2, 1)
    assert choose(costs, [Limit(errors, 2)]) is None
    with pytest.raises(ValueError, match="item 1 has no option"):
        choose(np.array([[1.0], [np.inf]]), [])


def test_no_limits_no_items_and_wrong_shapes() -> None:
    assert choose(np.array([[3.0, 1.0, 2.0]]), []) == (1,)
    assert choose(np.zeros((0, 3)), []) == ()
    with pytest.raises(ValueError, match="shape"):
        choose(np.zeros((2, 3)), [Limit(np.zeros((2, 2)), 1)])


def test_equal_options_and_nothing_to_gain() -> None:
    assert choose(np.ones((3, 4)), [Limit(np.zeros((3, 4)), 0)]) is not None


def test_many_items_within_a_ten_thousandth() -> None:
    """The bound is the fractional one: the lower hull of each item, cut where the budget ends."""
    rng = np.random.default_rng(1)
    costs = np.cumsum(rng.uniform(1, 2, (150, 5)), axis=1)
    errors = np.cumsum(rng.uniform(0.1, 1, (150, 5)), axis=1)[:, ::-1]
    budget = float(errors.mean(axis=1).sum())
    chosen = choose(costs, [Limit(errors, budget)])
    assert chosen is not None
    assert total(errors, chosen) <= budget
    prices = np.linspace(0, 20, 4001)  # any price gives a lower bound (Lagrange)
    bound = max(
        float((costs + price * errors).min(axis=1).sum() - price * budget) for price in prices
    )
    assert bound <= total(costs, chosen) <= bound * 1.005


def test_the_solver_prints_nothing(capfd):
    rng = np.random.default_rng(33)  # HiGHS of scipy 1.17 prints a line for this one
    errors, costs = (10.0 ** rng.uniform(*ends, (51, 8)) for ends in ((-9, -1), (2, 6.5)))
    choose(costs, [Limit(errors, 3 * float(np.quantile(errors.sum(axis=1), 0.3)))])
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")
