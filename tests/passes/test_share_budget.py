"""Which nodes share the bytes for further terms."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.kernels_ref.multipoint import points_for_budget
from onnxq.passes.share_budget import gained, share_budget


def alike(nodes: int, channels: int = 10) -> list[np.ndarray]:
    return [np.column_stack([np.full(channels, 1.0), np.full(channels, 0.1)])] * nodes


def spent(points: list[np.ndarray], costs: list[float], setup: float) -> float:
    return sum(
        setup * (each > 1).any() + cost * int((each - 1).sum())
        for each, cost in zip(points, costs, strict=True)
    )


@pytest.mark.parametrize("budget", [0, 60, 200, 450, 2000])
def test_what_is_spent_fits(budget: int) -> None:
    rng = np.random.default_rng(budget)
    errors = [-np.sort(-rng.random((8, 3)), axis=1) for _ in range(5)]
    costs = [10.0, 20.0, 5.0, 10.0, 40.0]
    assert spent(share_budget(errors, costs, budget, 50.0), costs, 50.0) <= budget


def test_nodes_that_are_alike_are_not_all_left_out() -> None:
    """Each takes 50 + 10 · 10; of four such, two and a part of a third fit into 400."""
    errors, costs = alike(4), [10.0] * 4
    assert max(each.max() for each in points_for_budget(errors, costs, 400, 50.0)) == 1
    points = share_budget(errors, costs, 400, 50.0)
    assert sum((each > 1).any() for each in points) == 2
    assert gained(errors, points) == (0, pytest.approx(20 * 0.9))


def test_never_less_than_by_price() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        errors = [-np.sort(-rng.random((6, 3)), axis=1) for _ in range(4)]
        costs = [float(c) for c in rng.integers(5, 40, 4)]
        by_price = points_for_budget(errors, costs, 300, 40.0)
        assert gained(errors, share_budget(errors, costs, 300, 40.0)) >= gained(errors, by_price)


def test_nothing_fits() -> None:
    points = share_budget(alike(3), [10.0] * 3, 55, 50.0)
    assert all((each == 1).all() for each in points)


def test_errors_that_are_infinite_come_first() -> None:
    errors = [np.array([[np.inf, 0.5], [1.0, 0.0], [np.inf, np.inf]])]
    assert gained(errors, [np.array([2, 1, 2])]) == (1, 0.0)
    assert gained(errors, [np.array([1, 2, 1])]) == (0, 1.0)
    assert share_budget(errors, [10.0], 62, 50.0)[0].tolist() == [2, 1, 1]
