"""A small classifier whose layers differ in how much quantization hurts them, and samples of it."""

from __future__ import annotations

import numpy as np
import onnx
from small import model, weights

from onnxq.feeds import Feed
from onnxq.model import Model, load
from onnxq.passes import SelectNodes
from onnxq.pipeline import canonicalize
from onnxq.plan import Plan


def classifier() -> onnx.ModelProto:
    """x [N, 3, 8, 8] -> conv1, conv2 (grouped), fc1, fc2 -> logits [N, 10].

    conv2 has one large weight per channel, so that its step is large; fc1 is the largest.
    """
    rough = weights(16, 8, 3, 3, seed=2, scale=0.05)
    rough[:, 0, 1, 1] = 1.0
    return model(
        """g (float[N,3,8,8] x) => (float[N,10] logits) {
            [conv1] a = Conv <pads = [1,1,1,1]> (x, w1)
            ra = Relu (a)
            [conv2] b = Conv <pads = [1,1,1,1], group = 2> (ra, w2)
            rb = Relu (b)
            p = AveragePool <kernel_shape = [2,2], strides = [2,2]> (rb)
            f = Flatten (p)
            [fc1] c = MatMul (f, w3)
            rc = Relu (c)
            [fc2] logits = MatMul (rc, w4)
        }""",
        {
            "w1": weights(16, 3, 3, 3, seed=1, scale=0.3),
            "w2": rough,
            "w3": weights(256, 64, seed=3, scale=0.1),
            "w4": weights(64, 10, seed=4, scale=0.3),
        },
    )


def shared() -> onnx.ModelProto:
    """Two MatMul that read one weight, and one with its own."""
    return model(
        """g (float[N,32] x) => (float[N,32] y) {
            [m1] a = MatMul (x, w)
            ra = Relu (a)
            [m2] b = MatMul (ra, w)
            rb = Relu (b)
            [m3] y = MatMul (rb, v)
        }""",
        {"w": weights(32, 32, seed=1, scale=0.2), "v": weights(32, 32, seed=2, scale=0.2)},
    )


def planned(proto: onnx.ModelProto, **options: object) -> tuple[Model, Plan]:
    """The canonical model and its plan, float compute, one term of 4 bits."""
    loaded = load(proto)
    canonicalize(loaded)
    chosen = {"bits": 4, "terms": 1, "activations": "none", "layout": "merged", **options}
    return loaded, SelectNodes(**chosen)(loaded)  # type: ignore[arg-type]


def drawn(count: int, *shape: int, seed: int = 5, name: str = "x") -> list[Feed]:
    """Feeds of one sample each."""
    rng = np.random.default_rng(seed)
    return [{name: rng.standard_normal((1, *shape)).astype(np.float32)} for _ in range(count)]


def images(count: int, seed: int = 5) -> list[Feed]:
    """Feeds of `classifier`."""
    return drawn(count, 3, 8, 8, seed=seed)
