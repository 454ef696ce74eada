"""Changing single integers never makes a row worse, and ends where no single change helps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import descend


def problem(seed: int, groups: int = 1) -> tuple[np.ndarray, ...]:
    """(target, q, steps, hessian): 3 bits, rounded to nearest, correlated inputs."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, 12, 12))
    x = rng.standard_normal((groups, 60, 12)) @ mix
    target = rng.standard_normal((6 * groups, 12))
    steps = np.broadcast_to(np.abs(target).max(axis=1, keepdims=True) / 3, target.shape)
    q = np.clip(np.rint(target / steps), -3, 3).astype(np.int8)
    return target, q, steps, x.transpose(0, 2, 1) @ x


def cost(error: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    split = error.reshape(len(hessian), -1, error.shape[1])
    return np.einsum("gri,gij,grj->gr", split, hessian, split).reshape(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.sampled_from([None, 1, 50]))
def test_no_row_gets_worse(seed: int, groups: int, changes: int | None) -> None:
    target, q, steps, h = problem(seed, groups)
    found = descend(q, steps, target - q * steps, h, bits=3, damping=0.0, changes=changes)
    before, after = cost(target - q * steps, h), cost(target - found * steps, h)
    assert (after <= before * (1 + 1e-9)).all()
    assert found.dtype == np.int8 and np.abs(found).max() <= 3
    assert (np.abs(found.astype(int) - q).sum(axis=1) <= (changes or 2)).all()


def test_the_full_range_has_one_level_more_and_uses_it() -> None:
    target, q, steps, h = problem(0)
    target = target - 1.5 * steps  # so that the lowest level is wanted
    found = descend(q, steps, target - q * steps, h, bits=3, changes=1000, full_range=True)
    assert (found.min(), found.max()) == (-4, 3)
    narrow = descend(q, steps, target - q * steps, h, bits=3, changes=1000)
    assert narrow.min() == -3
    assert cost(target - found * steps, h).sum() < cost(target - narrow * steps, h).sum()


def test_in_the_end_no_single_change_helps() -> None:
    target, q, steps, h = problem(0)
    found = descend(q, steps, target - q * steps, h, bits=3, damping=0.0, changes=1000)
    least = cost(target - found * steps, h)
    assert least.sum() < 0.9 * cost(target - q * steps, h).sum()
    for column in range(12):
        for change in (-1, 1):
            trial = found.copy()
            trial[:, column] += change
            allowed = np.abs(trial[:, column]) <= 3
            # A change that gains less than a millionth of the first error is not made.
            limit = least - 1e-6 * cost(target - q * steps, h)
            assert (cost(target - trial * steps, h) >= limit)[allowed].all()


def test_groups_are_independent_and_one_not_finite_is_left_alone() -> None:
    target, q, steps, h = problem(1, 3)
    h[1, 0, 0] = np.nan
    found = descend(q, steps, target - q * steps, h, bits=3)
    np.testing.assert_array_equal(found[6:12], q[6:12])
    for group in (0, 2):
        rows = slice(6 * group, 6 * group + 6)
        error = target[rows] - q[rows] * steps[rows]
        alone = descend(q[rows], steps[rows], error, h[group], bits=3)
        np.testing.assert_array_equal(found[rows], alone)


def test_the_given_integers_stay_as_they_are() -> None:
    target, q, steps, h = problem(2)
    before = q.copy()
    descend(q, steps, target - q * steps, h, bits=3)
    np.testing.assert_array_equal(q, before)


def test_what_does_not_fit_is_refused() -> None:
    target, q, steps, h = problem(3)
    with pytest.raises(ValueError, match="differ"):
        descend(q[:2], steps, target, h, bits=3)
    with pytest.raises(ValueError, match="damping"):
        descend(q, steps, target, h, bits=3, damping=-1.0)
