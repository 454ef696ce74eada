"""What BatchNormalization tells about the tensors behind it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto
from small import model, run

from onnxq.model import load
from onnxq.passes.channel_statistics import channel_statistics

CHANNELS, SIDE, SAMPLES = 4, 16, 400
MEAN = np.array([0.5, -2.0, 3.0, 0.0], np.float32)
VARIANCE = np.array([4.0, 0.25, 1.0, 1e-6], np.float32)
CONSTANTS = {
    "g": np.array([1.0, -0.5, 2.0, 3.0], np.float32),
    "b": np.array([0.3, 1.0, -1.0, 0.7], np.float32),
    "m": MEAN,
    "v": VARIANCE,
    "k": np.array([1.5, -1.0, 0.5, 2.0], np.float32).reshape(1, CHANNELS, 1, 1),
}
# The input of a network from here on: what the BatchNormalization was made for.
X = (
    MEAN.reshape(-1, 1, 1)
    + np.sqrt(VARIANCE).reshape(-1, 1, 1)
    * np.random.default_rng(0).standard_normal((SAMPLES, CHANNELS, SIDE, SIDE))
).astype(np.float32)


def net(body: str, **constants: np.ndarray) -> ModelProto:
    text = f"""g (float[N,{CHANNELS},{SIDE},{SIDE}] x) => (float[N,C,H,W] y) {{
        n = BatchNormalization <epsilon = 0.00001> (x, g, b, m, v)
        {body}
    }}"""
    return model(text, CONSTANTS | constants)


def check(body: str, **constants: np.ndarray) -> None:
    """Mean and variance of y per channel, to 6 standard errors of what was measured."""
    proto = net(body, **constants)
    found = channel_statistics(load(proto))["y"]
    (y,) = run(proto, {"x": X})
    y = y.astype(np.float64)
    axes, count = (0, 2, 3), SAMPLES * y.shape[2] * y.shape[3]
    mean, variance = y.mean(axis=axes), y.var(axis=axes)
    fourth = np.square(np.square(y - mean.reshape(1, -1, 1, 1))).mean(axis=axes)
    assert found.mean.shape == mean.shape
    assert (np.abs(found.mean - mean) <= 6 * np.sqrt(variance / count) + 2e-5).all()
    spread = np.sqrt(np.maximum(fourth - variance**2, 0) / count)
    assert (np.abs(found.variance - variance) <= 6 * spread + 2e-4).all()


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity (n)",
        "y = Relu (n)",
        "y = LeakyRelu <alpha = 0.2> (n)",
        "y = HardSwish (n)",
        "y = Sigmoid (n)",
        "y = HardSigmoid (n)",
        "y = Tanh (n)",
        "s = Sigmoid (n) y = Mul (n, s)",
        "y = Mul (n, k)",
        "y = Add (k, n)",
        "y = Sub (k, n)",
        "y = Div (n, k)",
        "r = Relu (n) y = Concat <axis = 1> (r, n)",
    ],
)
def test_functions_of_a_normalized_tensor(body):
    check(body)


def test_clip_with_bounds_as_inputs():
    bounds = {"low": np.array(0.0, np.float32), "high": np.array(1.0, np.float32)}
    check("y = Clip (n, low, high)", **bounds)


def test_a_pointwise_convolution_is_exact_for_independent_channels():
    w = np.random.default_rng(1).standard_normal((3, CHANNELS, 1, 1)).astype(np.float32)
    check("r = Relu (n) y = Conv (r, w, c)", w=w, c=np.ones(3, np.float32))


def test_grouped_convolution_has_the_right_mean():
    w = np.random.default_rng(1).standard_normal((4, 2, 3, 3)).astype(np.float32)
    proto = net("y = Conv <group = 2> (n, w)", w=w)
    found = channel_statistics(load(proto))["y"].mean
    (y,) = run(proto, {"x": X})
    error = 6 * y.std(axis=(0, 2, 3)) / np.sqrt(SAMPLES * 14 * 14 / 9)
    assert (np.abs(found - y.mean(axis=(0, 2, 3))) < error).all()


def test_pooling_keeps_the_mean():
    proto = net("y = GlobalAveragePool (n)")
    found = channel_statistics(load(proto))
    assert np.array_equal(found["y"].mean, found["n"].mean)
    assert (found["y"].variance < found["n"].variance).all()


def test_a_flat_tensor_repeats_or_keeps_channels():
    text = f"""g (float[N,{CHANNELS},2,2] x) => (float[N,16] y, float[N,4] z) {{
        n = BatchNormalization (x, g, b, m, v)
        y = Flatten (n)
        p = GlobalAveragePool (n)
        z = Flatten (p)
    }}"""
    constants = {name: CONSTANTS[name] for name in "gbmv"}
    found = channel_statistics(load(model(text, constants)))
    assert found["y"].mean.tolist() == np.repeat(found["n"].mean, 4).tolist()
    assert found["z"].mean.tolist() == found["n"].mean.tolist()


def test_nothing_is_said_of_what_is_not_known():
    found = channel_statistics(load(net("a = Abs (n) q = Add (a, n) y = Add (q, x)")))
    assert set(found) == {"n"}


def test_a_dead_channel_has_the_variance_that_epsilon_leaves():
    found = channel_statistics(load(net("y = Identity (n)")))["n"]
    assert found.variance[3] == pytest.approx(9 * 1e-6 / (1e-6 + 1e-5), rel=1e-3)
