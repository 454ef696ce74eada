import numpy as np
import pytest

from onnxq.kernels_ref import least_squares_target


def objective(w, target, x_hat, x):
    return np.square(x @ w.T - x_hat @ target.T).sum(axis=0)


def test_the_same_inputs_leave_the_weight_as_it_is():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 8)), rng.standard_normal((3, 8))
    h = x.T @ x
    np.testing.assert_array_equal(least_squares_target(w, h, h), w)


def test_undoes_a_linear_distortion_of_the_inputs():
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((5, 8)), rng.standard_normal((100, 8))
    mix = np.eye(8) + 0.1 * rng.standard_normal((8, 8))
    x_hat = x @ mix.T
    target = least_squares_target(w, x_hat.T @ x_hat, x.T @ x_hat, damping=1e-12)
    np.testing.assert_allclose(target @ mix, w, atol=1e-9)


def test_is_never_worse_on_its_samples_and_closer_with_less_damping():
    rng = np.random.default_rng(2)
    w, x = rng.standard_normal((6, 12)), rng.standard_normal((9, 12))  # fewer samples than inputs
    x_hat = x + 0.2 * rng.standard_normal(x.shape)
    moments = x_hat.T @ x_hat, x.T @ x_hat
    last = objective(w, w, x_hat, x)
    for damping in (10.0, 0.1, 1e-3, 1e-6):
        now = objective(w, least_squares_target(w, *moments, damping=damping), x_hat, x)
        assert np.all(now < last)
        last = now


def test_directions_without_samples_keep_the_weight():
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((4, 10)), rng.standard_normal((50, 10))
    x_hat = x + 0.1 * rng.standard_normal(x.shape)
    x_hat[:, 3] = 0.0
    target = least_squares_target(w, x_hat.T @ x_hat, x.T @ x_hat)
    np.testing.assert_array_equal(target[:, 3], w[:, 3])
    assert np.all(target[:, 4] != w[:, 4])
    nothing = np.zeros((10, 10))
    np.testing.assert_array_equal(least_squares_target(w, nothing, nothing), w)


def test_a_singular_hessian_without_damping_still_gives_finite_weights():
    w, x = np.ones((2, 3)), np.array([[1.0, 1.0, 0.0]])
    target = least_squares_target(w, x.T @ x, 2 * x.T @ x, damping=0.0)
    assert np.isfinite(target).all()
    np.testing.assert_array_equal(target[:, 2], 1.0)
    np.testing.assert_allclose(target @ x[0], 4.0, rtol=1e-4)


def test_groups_are_solved_as_if_alone_and_bad_ones_left():
    rng = np.random.default_rng(4)
    w = rng.standard_normal((6, 5))
    x = rng.standard_normal((3, 40, 5))
    x_hat = x + 0.1 * rng.standard_normal(x.shape)
    h, c = np.einsum("gni,gnj->gij", x_hat, x_hat), np.einsum("gni,gnj->gij", x, x_hat)
    h[2] = np.nan
    target = least_squares_target(w, h, c)
    for group in range(2):
        mine = slice(2 * group, 2 * group + 2)
        np.testing.assert_allclose(
            target[mine], least_squares_target(w[mine], h[group], c[group]), rtol=1e-12
        )
    np.testing.assert_array_equal(target[4:], w[4:])
    with pytest.raises(ValueError, match="cross has shape"):
        least_squares_target(w, h, c[:, :4])
    with pytest.raises(ValueError, match="damping is nan"):
        least_squares_target(w, h, c, damping=np.nan)
