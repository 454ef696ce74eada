"""Refined plans are better where blocks end, and whatever happens stay plans that work."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from small import model, run, weights

from onnxq.calibrate_weights import calibrate_weights
from onnxq.errors import CalibrationError
from onnxq.kernels_ref import PerAxis, expand
from onnxq.model import Model, load, raise_opset, to_proto
from onnxq.passes import Expand, SelectNodes, required_opset
from onnxq.passes.block_moves import moves
from onnxq.passes.node_samples import Numbers
from onnxq.pipeline import canonicalize
from onnxq.plan import Plan
from onnxq.refine_blocks import refine_blocks

NET = """g (float[N,4,8,8] x) => (float[N,6] y) {
    [a] p = Conv <pads = [1,1,1,1]> (x, w1, b1)
    p1 = Relu (p)
    [b] q = Conv <pads = [1,1,1,1]> (p1, w2)
    q1 = Relu (q)
    [c] r = Conv <pads = [1,1,1,1]> (q1, w3)
    s = Add (r, p1)
    s1 = Relu (s)
    m = GlobalAveragePool (s1)
    f = Flatten (m)
    [d] y = MatMul (f, w4)
}"""
NET_WEIGHTS = {
    "w1": weights(8, 4, 3, 3, scale=0.3),
    "b1": weights(8, seed=1),
    "w2": weights(8, 8, 3, 3, seed=2, scale=0.2),
    "w3": weights(8, 8, 3, 3, seed=3, scale=0.2),
    "w4": weights(8, 6, seed=4),
}


def images(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((count, 4, 8, 8)) + 0.5
    smooth = (raw + np.roll(raw, 1, 2) + np.roll(raw, 1, 3)).astype(np.float32)
    return [{"x": smooth[i : i + 1]} for i in range(count)]


def planned(**options: Any) -> tuple[onnx.ModelProto, Model, Plan]:
    """With scales that are 8 % too small, so that there is something to find."""
    proto = model(NET, NET_WEIGHTS)
    made = load(proto)
    canonicalize(made)
    select = SelectNodes(bits=4, terms=1, activations="none", layout="merged")
    plan, _ = calibrate_weights(made, select(made), images(16, 0), **options)
    for name, (scale,) in plan.scales.items():
        plan.scales[name] = ((0.92 * scale).astype(np.float32),)
    return proto, made, plan


def error(proto: onnx.ModelProto, made: Model, plan: Plan, feeds: list[Any]) -> float:
    newer = raise_opset(load(to_proto(made)), required_opset(plan))
    Expand(plan)(newer)
    quantized = to_proto(newer)
    return float(np.mean([np.abs(run(proto, f)[0] - run(quantized, f)[0]).mean() for f in feeds]))


@pytest.mark.parametrize("stage_weight", [0.0, 1.0, 10.0])
def test_fresh_samples_gain(stage_weight: float) -> None:
    proto, made, plan = planned()
    found, notes = refine_blocks(made, plan, images(16, 0), stage_weight=stage_weight)
    fresh = images(16, 1)
    assert error(proto, made, found, fresh) < 0.9 * error(proto, made, plan, fresh)
    assert "changes kept" in notes[0]


def test_integers_stay_and_the_callers_plan_too() -> None:
    _, made, plan = planned()
    before = {name: scale.copy() for name, (scale,) in plan.scales.items()}
    found, _ = refine_blocks(made, plan, images(8, 0))
    for name, scale in before.items():
        np.testing.assert_array_equal(plan.scales[name][0], scale)
        np.testing.assert_array_equal(found.integers[name][0], plan.integers[name][0])
        assert found.scales[name][0].dtype == np.float32 and (found.scales[name][0] > 0).all()


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_less_effort_changes_nothing(effort: Any) -> None:
    _, made, plan = planned()
    found, notes = refine_blocks(made, plan, images(8, 0), effort=effort)
    assert notes == ()
    for name, (scale,) in plan.scales.items():
        np.testing.assert_array_equal(found.scales[name][0], scale)


def test_too_few_samples_are_said() -> None:
    _, made, plan = planned()
    found, notes = refine_blocks(made, plan, images(3, 0))
    assert "4 samples" in notes[0] and set(found.scales) == set(plan.scales)


def test_the_budget_cuts_the_number_of_samples() -> None:
    _, made, plan = planned()
    feeds = images(16, 0)
    largest = 8 * 8 * 8 * 4  # [1, 8, 8, 8] in float32, four variants of it per sample
    _, notes = refine_blocks(made, plan, feeds, budget_bytes=4 * 6 * 2 * largest)
    assert any("of 16 samples, memory bound" in note for note in notes)
    _, notes = refine_blocks(made, plan, feeds, budget_bytes=1)
    assert notes[0].startswith("refining blocks: 4 of 16 samples")
    _, notes = refine_blocks(made, plan, feeds)
    assert not any("memory" in note for note in notes)


def test_ctrl_c_keeps_what_was_found() -> None:
    def stop(_what: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    proto, made, plan = planned()
    found, notes = refine_blocks(made, plan, images(16, 0), progress=stop)
    assert "interrupted after 2 of 4 nodes" in notes[0]
    same = {n for n in plan.scales if np.array_equal(plan.scales[n][0], found.scales[n][0])}
    assert {"c", "d"} <= same and not {"a", "b"} <= same
    fresh = images(8, 1)
    assert error(proto, made, found, fresh) < error(proto, made, plan, fresh)


def test_runs_agree() -> None:
    _, made, plan = planned()
    one, other = (refine_blocks(made, plan, images(8, 0))[0] for _ in range(2))
    for name in one.scales:
        np.testing.assert_array_equal(one.scales[name][0], other.scales[name][0])


def test_a_bad_weight_of_the_stage_is_refused() -> None:
    _, made, plan = planned()
    with pytest.raises(CalibrationError, match="stage_weight is -1"):
        refine_blocks(made, plan, images(8, 0), stage_weight=-1)


def test_moves_mend_what_an_affine_can_mend() -> None:
    rng = np.random.default_rng(0)
    w, own = rng.standard_normal((3, 5)), rng.standard_normal(3)
    series = expand("fixed_ratio", w, bits=8, terms=1, granularity=PerAxis(0))
    numbers = Numbers(series, np.zeros(3))
    x = rng.standard_normal((200, 5))

    def output(some: Numbers) -> np.ndarray:
        return x @ some.series.dequantize().T + some.bias + own

    wanted = np.array([1.2, 0.8, 1.1]) * output(numbers) + np.array([0.5, -1.0, 2.0])
    first = next(iter(moves((output(numbers), wanted), own)))
    # The new scale is rounded to float32.
    np.testing.assert_allclose(output(first(numbers)), wanted, rtol=0, atol=1e-5)
    half = numbers.affine(np.float64(0.5), 1.0)
    np.testing.assert_allclose(output(half) - own, 0.5 * (output(numbers) - own) + 1, atol=1e-5)
