import numpy as np
import pytest

from onnxq.kernels_ref import InputMoments, conv, conv_patches
from onnxq.kernels_ref import moments as module


def filled(x_hat, x, pieces=1):
    moments = InputMoments(len(x_hat), x_hat.shape[2])
    for hat, other in zip(
        np.array_split(x_hat, pieces, axis=1), np.array_split(x, pieces, axis=1), strict=True
    ):
        moments.add(hat, hat if x is x_hat else other)
    return moments


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("groups", [1, 4])
def test_moments_are_the_sums_of_products(groups, dtype, monkeypatch):
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 64)  # several pieces per call
    rng = np.random.default_rng(0)
    x_hat = rng.standard_normal((groups, 50, 6)).astype(dtype)
    x = rng.standard_normal((groups, 50, 6)).astype(dtype)
    moments = filled(x_hat, x, pieces=3)
    hat, other = x_hat.astype(np.float64), x.astype(np.float64)
    # Sums of 50 products of numbers below 5.
    close = {"rtol": 0, "atol": 50 * 50 * 25 * np.finfo(dtype).eps}
    assert moments.count == 50
    np.testing.assert_allclose(moments.hessian, np.einsum("gni,gnj->gij", hat, hat), **close)
    np.testing.assert_allclose(moments.cross, np.einsum("gni,gnj->gij", other, hat), **close)
    np.testing.assert_allclose(moments.mean_hat, hat.mean(axis=1), **close)
    np.testing.assert_allclose(moments.mean, other.mean(axis=1), **close)
    assert moments.hessian.dtype == moments.cross.dtype == np.float64


def test_the_same_inputs_need_no_second_sum_until_they_differ():
    rng = np.random.default_rng(1)
    x, hat = rng.standard_normal((2, 30, 4))
    moments = InputMoments(1, 4)
    moments.add(x, x)
    np.testing.assert_array_equal(moments.cross, moments.hessian)
    moments.add(hat, x)
    np.testing.assert_allclose(moments.cross[0], x.T @ x + x.T @ hat, atol=1e-12)
    np.testing.assert_allclose(moments.hessian[0], x.T @ x + hat.T @ hat, atol=1e-12)
    moments.add(x, x)  # and it must go on counting
    np.testing.assert_allclose(moments.cross[0], 2 * x.T @ x + x.T @ hat, atol=1e-12)


def test_centred_moments_are_those_about_the_means():
    rng = np.random.default_rng(2)
    x_hat = rng.standard_normal((2, 40, 5)) + 3
    x = x_hat + rng.standard_normal((2, 40, 5))
    hessian, cross = filled(x_hat, x).centred()
    hat, other = x_hat - x_hat.mean(axis=1, keepdims=True), x - x.mean(axis=1, keepdims=True)
    # The sums cancelled are about 40 * 4**2.
    np.testing.assert_allclose(hessian, np.einsum("gni,gnj->gij", hat, hat), atol=1e-10)
    np.testing.assert_allclose(cross, np.einsum("gni,gnj->gij", other, hat), atol=1e-10)
    hessian, cross = filled(x_hat, x_hat).centred()
    assert hessian is cross


def test_a_large_mean_costs_no_digits():
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((1, 400, 5)) + 1000).astype(np.float32)
    found, _ = filled(x, x).centred()
    exact = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    # Differences from a point near the mean are exact in float32; their squares are at most 25.
    bound = 400 * 400 * 25 * np.finfo(np.float32).eps
    np.testing.assert_allclose(found, np.einsum("gni,gnj->gij", exact, exact), rtol=0, atol=bound)


def test_the_bias_shift_makes_the_mean_output_right():
    rng = np.random.default_rng(3)
    x_hat, x = rng.standard_normal((2, 2, 40, 5)) + 1
    w, w_hat = rng.standard_normal((2, 6, 5))  # 2 groups of 3 channels
    shift = filled(x_hat, x).bias_shift(w, w_hat)
    assert shift.shape == (6,)
    for channel in range(6):
        group = channel // 3
        wanted = (x[group] @ w[channel]).mean()
        actual = (x_hat[group] @ w_hat[channel]).mean() + shift[channel]
        assert actual == pytest.approx(wanted, abs=1e-12)


def test_not_finite_inputs_show_and_shapes_are_checked():
    moments = InputMoments(1, 3)
    bad = np.full((2, 3), np.nan)
    moments.add(bad, bad)
    assert np.isnan(moments.hessian).all()
    two = InputMoments(2, 3)
    for shape in [(4, 3), (2, 4, 5), (1, 4, 3)]:
        x = np.zeros(shape)
        with pytest.raises(ValueError, match=r"give \[2, n, 3\]"):
            two.add(x, x)
    with pytest.raises(ValueError, match="must agree"):
        moments.add(np.zeros((4, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least 1"):
        InputMoments(0, 3)


CONVS = [
    ((2, 4, 9), (6, 4, 3), {}),
    ((2, 4, 9), (6, 2, 3), {"groups": 2, "strides": [2], "pads": [2, 1], "dilations": [2]}),
    ((2, 3, 8, 7), (5, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    ((1, 6, 8, 8), (6, 1, 3, 3), {"groups": 6, "pads": [1, 1, 1, 1]}),
    ((2, 3, 5, 5), (4, 3, 1, 1), {}),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "attributes"), CONVS)
def test_patches_times_weights_are_the_convolution(x_shape, w_shape, attributes):
    rng = np.random.default_rng(4)
    # Small integers: every sum is exact, so the two must be equal bit by bit.
    x = rng.integers(-8, 9, x_shape).astype(np.float32)
    w = rng.integers(-8, 9, w_shape).astype(np.float32)
    patches = conv_patches(x, w_shape[2:], **attributes)
    groups = attributes.get("groups", 1)
    assert patches.dtype == np.float32
    assert patches.shape[::2] == (groups, w[0].size)
    kernels = w.reshape(groups, w_shape[0] // groups, -1)
    y = np.einsum("gpi,goi->pgo", patches, kernels).reshape(-1, w_shape[0])
    own = {name: value for name, value in attributes.items() if name != "groups"}
    wanted = conv(x, w, group=groups, **own)
    np.testing.assert_array_equal(y, np.moveaxis(wanted, 1, -1).reshape(-1, w_shape[0]))


def test_a_limit_draws_the_same_positions_from_equal_generators():
    x = np.arange(2 * 3 * 6 * 6, dtype=np.float64).reshape(2, 3, 6, 6)
    every = conv_patches(x, (3, 3))[0]
    drawn = [conv_patches(x * k, (3, 3), limit=7, rng=np.random.default_rng(5))[0] for k in (1, 2)]
    assert drawn[0].shape == (7, 27)
    np.testing.assert_array_equal(drawn[0] * 2, drawn[1])
    places = [int(np.flatnonzero((every == row).all(axis=1))[0]) for row in drawn[0]]
    assert places == sorted(set(places))
    other = conv_patches(x, (3, 3), limit=7, rng=np.random.default_rng(6))[0]
    assert not np.array_equal(drawn[0], other)
    np.testing.assert_array_equal(conv_patches(x, (3, 3), limit=32)[0], every)
    with pytest.raises(ValueError, match="limit is 0"):
        conv_patches(x, (3, 3), limit=0)


@pytest.mark.parametrize("groups", [0, 2])
def test_refuses_groups_that_do_not_fit(groups):
    with pytest.raises(ValueError, match="does not fit"):
        conv_patches(np.zeros((1, 3, 5)), (3,), groups=groups)


def test_moments_about_a_point():
    rng = np.random.default_rng(5)
    x = rng.normal(3, 1, (2, 40, 3))
    moments = InputMoments(2, 3)
    for part in (x[:, :7], x[:, 7:]):
        moments.add(part, part)
    point = rng.normal(size=(2, 3))
    rest = x - point[:, None]
    np.testing.assert_allclose(moments.about(point), rest.transpose(0, 2, 1) @ rest, rtol=1e-12)
    np.testing.assert_allclose(moments.about(moments.mean_hat), moments.centred()[0], atol=1e-10)
    assert not InputMoments(2, 3).about(point).any()
