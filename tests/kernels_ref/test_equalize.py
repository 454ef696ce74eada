import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import PerAxis, equalization_scales, reduce_absmax

RANGES = hnp.arrays(np.float64, 5, elements=st.floats(1e-2, 1e2))


@given(RANGES, RANGES)
def test_both_ranges_become_the_geometric_mean(first, second):
    s = equalization_scales(first, second)
    mean = np.sqrt(first * second)
    # Two roots, a quotient and one product: a few roundings of eps/2 each.
    np.testing.assert_allclose(first / s, mean, rtol=8 * np.finfo(np.float64).eps)
    np.testing.assert_allclose(second * s, mean, rtol=8 * np.finfo(np.float64).eps)


def test_two_layers_around_a_relu_compute_the_same():
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((8, 5)) * np.geomspace(0.01, 10, 8)[:, np.newaxis]
    w2, b = rng.standard_normal((3, 8)), rng.standard_normal(8)
    s = equalization_scales(reduce_absmax(w1, PerAxis(0)), reduce_absmax(w2, PerAxis(1)))
    x = rng.standard_normal((5, 20))
    before = w2 @ np.maximum(w1 @ x + b[:, np.newaxis], 0)
    scaled = (w1 / s[:, np.newaxis]) @ x + (b / s)[:, np.newaxis]
    after = (w2 * s) @ np.maximum(scaled, 0)
    size = np.abs(w2) @ (np.abs(w1) @ np.abs(x) + np.abs(b)[:, np.newaxis])
    assert np.all(np.abs(after - before) <= 20 * np.finfo(np.float64).eps * size)


def test_dead_channels_are_left_alone_and_the_rest_limited():
    first = np.array([0.0, 1.0, 0.0, 1e9, 1e-9, 1e300], dtype=np.float64)
    second = np.array([1.0, 0.0, 0.0, 1e-9, 1e9, 1e300], dtype=np.float64)
    s = equalization_scales(first, second, limit=100.0)
    np.testing.assert_array_equal(s, [1.0, 1.0, 1.0, 100.0, 0.01, 1.0])


@pytest.mark.parametrize(
    ("first", "second", "limit", "message"),
    [
        ([1.0, 2.0], [1.0], 10.0, "one range per channel"),
        ([[1.0]], [[1.0]], 10.0, "one range per channel"),
        ([1.0], [1.0], 0.5, "limit is 0.5"),
        ([-1.0], [1.0], 10.0, "first holds negative"),
        ([1.0], [np.nan], 10.0, "second holds NaN"),
    ],
)
def test_refuses_what_are_no_ranges(first, second, limit, message):
    with pytest.raises(ValueError, match=message):
        equalization_scales(np.array(first), np.array(second), limit=limit)
