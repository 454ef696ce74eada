"""Nodes aim at the sum that they are part of, where nothing else reads what is between."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from small import model, run, weights

from onnxq.calibrate_weights import calibrate_weights
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import Expand, SelectNodes, required_opset
from onnxq.passes.added_tensor import added_tensor
from onnxq.pipeline import canonicalize

W = {"w": weights(4, 4, 1, 1), "b": weights(1, 4, 1, 1, seed=1)}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("y = Add (p, x)", "x"),
        ("y = Add (x, p)", "x"),
        ("q = Add (p, b)  y = Add (q, x)", "x"),
        ("y = Relu (p)", None),
        ("y = Add (p, b)", None),
        ("y = Add (p, p)", None),
        ("q = Relu (p)  r = Add (p, x)  y = Add (q, r)", None),
    ],
)
def test_the_other_operand(body: str, wanted: str | None) -> None:
    text = f"g (float[1,4,5,5] x) => (float[1,4,5,5] y) {{ [a] p = Conv (x, w)  {body} }}"
    made = load(model(text, W))
    (node,) = (n for n in made.graph.nodes if n.name == "a")
    assert added_tensor(made, node) == wanted


def test_an_output_in_between_counts() -> None:
    text = """g (float[1,4,5,5] x) => (float[1,4,5,5] p, float[1,4,5,5] y) {
        [a] p = Conv (x, w)
        y = Add (p, x)
    }"""
    made = load(model(text, W))
    (node,) = (n for n in made.graph.nodes if n.name == "a")
    assert added_tensor(made, node) is None


NET = """g (float[1,6,6,6] x) => (float[1,6,6,6] y) {
    [a] p = Conv <pads = [1,1,1,1]> (x, w1)
    r = Relu (p)
    [b] q = Conv <pads = [1,1,1,1]> (r, w2)
    y = Add (q, p)
}"""


def test_what_the_skip_got_wrong_is_made_up_for() -> None:
    given = {"w1": weights(6, 6, 3, 3, scale=0.3), "w2": weights(6, 6, 3, 3, seed=1, scale=0.1)}
    proto = model(NET, given)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 6, 6, 6)).astype(np.float32)} for _ in range(48)]
    made = load(proto)
    canonicalize(made)
    # Only the first node has few levels, so that all that is wrong comes over the skip.
    plan = SelectNodes(bits=2, terms=1, activations="none", layout="merged")(made)
    nodes = [n.model_copy(update={"bits": 8}) if n.name == "b" else n for n in plan.nodes]
    plan = plan.model_copy(update={"nodes": nodes})

    def error(sums: bool) -> float:
        found, notes = calibrate_weights(made, plan, feeds[:32], sums=sums)
        assert notes == ()
        newer = raise_opset(load(to_proto(made)), required_opset(found))
        Expand(found)(newer)
        pairs = [(run(proto, f)[0], run(to_proto(newer), f)[0]) for f in feeds[32:]]
        return float(np.sqrt(np.mean([np.square(a - b).mean() for a, b in pairs])))

    assert error(True) < 0.9 * error(False)
    onnx.checker.check_model(to_proto(made))
