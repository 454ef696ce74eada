"""Calibrated weights make the outputs better, and whatever happens leave a plan that works."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from small import model, run, weights

from onnxq import calibrate_weights as driver
from onnxq.calibrate_weights import calibrate_weights
from onnxq.errors import CalibrationError, ModelError
from onnxq.model import Model, load, raise_opset, to_proto
from onnxq.passes import Expand, SearchScales, SelectNodes, required_opset
from onnxq.pipeline import canonicalize
from onnxq.plan import Plan

NET = """g (float[N,6,10,10] x) => (float[N,5,10,10] y) {
    [a] p = Conv <pads = [1,1,1,1]> (x, w1, b1)
    q = Relu (p)
    [depthwise] r = Conv <pads = [1,1,1,1], group = 8> (q, w2)
    [b] s = Conv (r, w3)
    t = Add (s, q)
    u = Relu (t)
    [c] y = Conv <pads = [1,1,1,1]> (u, w4)
}"""
NET_WEIGHTS = {
    "w1": weights(8, 6, 3, 3, scale=0.3),
    "b1": weights(8, seed=1),
    "w2": weights(8, 1, 3, 3, seed=2, scale=0.5),
    "w3": weights(8, 8, 1, 1, seed=3, scale=0.5),
    "w4": weights(5, 8, 3, 3, seed=4, scale=0.2),
}
NODES = {"a", "depthwise", "b", "c"}
MIX = weights(6, 6, seed=9)


def images(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Correlated and smooth, as real ones are; one per feed."""
    raw = np.random.default_rng(seed).standard_normal((count, 6, 10, 10)) + 0.5
    smooth = raw + np.roll(raw, 1, 2) + np.roll(raw, 1, 3) + np.roll(raw, (1, 1), (2, 3))
    mixed = np.einsum("nchw,dc->ndhw", smooth, MIX).astype(np.float32)
    return [{"x": mixed[i : i + 1]} for i in range(count)]


def prepared(proto: onnx.ModelProto, **options: Any) -> tuple[Model, Plan]:
    made = load(proto)
    canonicalize(made)
    options = {"bits": 3, "terms": 1, "activations": "none", "layout": "merged", **options}
    return made, SelectNodes(**options)(made)


def expanded(made: Model, plan: Plan) -> onnx.ModelProto:
    newer = raise_opset(load(to_proto(made)), required_opset(plan))
    Expand(plan)(newer)
    return to_proto(newer)


def error(proto: onnx.ModelProto, quantized: onnx.ModelProto, feeds: list[Any]) -> float:
    """Relative, of the first output."""
    pairs = [(run(proto, feed)[0], run(quantized, feed)[0]) for feed in feeds]
    off = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(off / sum(float(np.square(a).sum()) for a, _ in pairs)))


def both_errors(proto: onnx.ModelProto, feeds: list[Any], fresh: list[Any], **options: Any) -> Any:
    made, plan = prepared(proto)
    without, _ = calibrate_weights(
        made, plan, feeds, measure="absmax", rounding="nearest", bias_correction=False
    )
    found, _ = calibrate_weights(made, plan, feeds, **options)
    return tuple(error(proto, expanded(made, p), fresh) for p in (without, found))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": "mae", "affine": "mae"},
        {"measure": "absmax"},
        {"rounding": "nearest"},
        {"bias_correction": False},
        {"affine": "mse"},
    ],
    ids=str,
)
def test_outputs_on_fresh_samples_get_better(options: dict[str, Any]) -> None:
    proto = model(NET, NET_WEIGHTS)
    without, found = both_errors(proto, images(32, 0), images(16, 1), **options)
    assert found < without


def test_second_order_rounding_and_bias_bring_most() -> None:
    proto = model(NET, NET_WEIGHTS)
    without, found = both_errors(proto, images(32, 0), images(16, 1))
    assert found < 0.5 * without


@pytest.mark.parametrize("terms", [1, 2])
def test_an_offset_uses_all_levels_and_is_more_exact(terms: int) -> None:
    proto, feeds, fresh = model(NET, NET_WEIGHTS), images(24, 0), images(8, 1)
    errors = []
    for offset in (False, True):
        made, plan = prepared(proto, bits=2, terms=terms, series="digit", offset=offset)
        found, notes = calibrate_weights(made, plan, feeds)
        assert not notes and set(found.integers) == NODES
        assert (set(found.offsets) == NODES) == offset
        lowest = min(int(found.integers[name][0].min()) for name in NODES)
        assert lowest == (-2 if offset else -1)
        errors.append(error(proto, expanded(made, found), fresh))
    assert errors[1] < errors[0]


def test_rounded_to_nearest_the_offset_stays_that_without_data() -> None:
    proto, feeds = model(NET, NET_WEIGHTS), images(8, 0)
    made, plan = prepared(proto, offset=True)
    without = SearchScales()(made, plan.model_copy(deep=True))
    found, _ = calibrate_weights(made, plan, feeds, rounding="nearest")
    for name in NODES:
        np.testing.assert_array_equal(found.offsets[name], without.offsets[name])
        np.testing.assert_array_equal(found.scales[name][0], without.scales[name][0])
    assert found.bias
    expanded(made, found)


@pytest.mark.parametrize("measure", ["mae", "mse"])
def test_an_affine_moves_the_offset_too(measure: Any) -> None:
    proto, feeds, fresh = model(NET, NET_WEIGHTS), images(24, 0), images(8, 1)
    made, plan = prepared(proto, bits=2, offset=True)
    errors = [
        error(proto, expanded(made, calibrate_weights(made, plan, feeds, affine=one)[0]), fresh)
        for one in ("none", measure)
    ]
    assert errors[1] < 1.1 * errors[0]


def test_every_node_has_integers_scales_and_a_bias_that_fit() -> None:
    made, plan = prepared(model(NET, NET_WEIGHTS))
    found, notes = calibrate_weights(made, plan, images(8, 0))
    assert notes == ()
    assert set(found.integers) == set(found.scales) == NODES
    assert set(found.bias) <= NODES
    for name in NODES:
        (q,), (scale,) = found.integers[name], found.scales[name]
        out = plan[name].shape[0]
        assert q.dtype == np.int8 and q.shape[0] == out and np.abs(q).max() <= 3
        assert scale.dtype == np.float32 and scale.shape == (out,) and (scale > 0).all()


def test_the_callers_plan_stays_as_it_is() -> None:
    made, plan = prepared(model(NET, NET_WEIGHTS))
    calibrate_weights(made, plan, images(4, 0))
    assert (plan.scales, plan.integers, plan.bias) == ({}, {}, {})


def test_saved_and_loaded_it_makes_the_same_model(tmp_path: Any) -> None:
    made, plan = prepared(model(NET, NET_WEIGHTS))
    found, _ = calibrate_weights(made, plan, images(8, 0))
    found.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert expanded(made, again) == expanded(made, found)


@pytest.mark.parametrize(
    "options", [{"terms": 2}, {"block_size": 3}, {"bits": 2, "terms": 3}], ids=str
)
def test_several_terms_and_blocks(options: dict[str, Any]) -> None:
    proto = model(NET, NET_WEIGHTS)
    made, plan = prepared(proto, **options)
    free, _ = calibrate_weights(
        made, plan, images(16, 0), measure="absmax", rounding="nearest", bias_correction=False
    )
    found, _ = calibrate_weights(made, plan, images(16, 0))
    errors = [error(proto, expanded(made, p), images(8, 1)) for p in (free, found)]
    assert errors[1] < errors[0]


def test_matmuls_on_either_side_and_batched_ones() -> None:
    text = """g (float[N,2,7,6] x) => (float[N,2,4,5] y) {
        [right] a = MatMul (x, w1)
        [batched] b = MatMul (a, w2)
        [left] y = MatMul (w3, b)
    }"""
    given = {"w1": weights(6, 6), "w2": weights(2, 6, 5, seed=1), "w3": weights(4, 7, seed=2)}
    proto = model(text, given)
    made, plan = prepared(proto)
    rng = np.random.default_rng(0)
    scale = np.array([4, 2, 1, 1, 0.5, 0.5])
    feeds = [
        {"x": (rng.standard_normal((1, 2, 7, 6)) * scale).astype(np.float32)} for _ in range(40)
    ]
    free, _ = calibrate_weights(
        made, plan, feeds[:32], measure="absmax", rounding="nearest", bias_correction=False
    )
    found, notes = calibrate_weights(made, plan, feeds[:32])
    assert notes == () and set(found.integers) == {"right", "batched", "left"}
    errors = [error(proto, expanded(made, p), feeds[32:]) for p in (free, found)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "feeds",
    [
        images(1, 0),
        [{"x": np.zeros((1, 6, 10, 10), np.float32)}] * 5,
        [{"x": np.full((3, 6, 10, 10), 0.7, np.float32)}] * 5,
        [{"x": np.concatenate([f["x"] for f in images(5, 0)])}] * 2,
    ],
    ids=["one", "zeros", "constant", "batches"],
)
def test_poor_samples_do_no_harm(feeds: list[Any]) -> None:
    proto = model(NET, NET_WEIGHTS)
    made, plan = prepared(proto)
    found, _ = calibrate_weights(made, plan, feeds, affine="mae")
    quantized = expanded(made, found)
    free, _ = calibrate_weights(
        made, plan, feeds, measure="absmax", rounding="nearest", bias_correction=False
    )
    assert np.isfinite(run(quantized, feeds[0])[0]).all()
    worst = error(proto, expanded(made, free), feeds)
    assert error(proto, quantized, feeds) <= worst


def test_dead_channels_stay_dead() -> None:
    given = {**NET_WEIGHTS, "w4": NET_WEIGHTS["w4"].copy()}
    given["w4"][2] = 0
    made, plan = prepared(model(NET, given))
    found, _ = calibrate_weights(made, plan, images(8, 0), affine="mae")
    assert not found.integers["c"][0][2].any()


def test_inputs_that_are_not_finite_are_noted() -> None:
    feeds = images(4, 0)
    feeds[1]["x"][0, 0, 0, 0] = np.inf
    made, plan = prepared(model(NET, NET_WEIGHTS))
    found, notes = calibrate_weights(made, plan, feeds)
    assert "a" not in found.integers and "a" in found.scales
    assert any("not finite" in note and "'a'" in note for note in notes)


SHARED = """g (float[N,4,6] x) => (float[N,4,6] y) {
    [one] a = MatMul (x, w)
    b = Relu (a)
    [two] y = MatMul (b, w)
}"""


def test_nodes_that_share_a_weight_share_its_integers() -> None:
    made, plan = prepared(model(SHARED, {"w": weights(6, 6)}))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 4, 6)).astype(np.float32) + 1} for _ in range(8)]
    found, _ = calibrate_weights(made, plan, feeds, affine="mse")
    np.testing.assert_array_equal(found.integers["one"][0], found.integers["two"][0])
    np.testing.assert_array_equal(found.scales["one"][0], found.scales["two"][0])
    stored = [t for t in expanded(made, found).graph.initializer if tuple(t.dims) == (6, 6)]
    assert len(stored) == 1


def test_ctrl_c_keeps_what_is_done() -> None:
    def stop(_what: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    proto = model(NET, NET_WEIGHTS)
    made, plan = prepared(proto)
    found, notes = calibrate_weights(made, plan, images(8, 0), progress=stop)
    assert len(found.integers) == 2 and set(found.scales) == NODES
    assert any("after 2 of 4 nodes" in note for note in notes)
    assert np.isfinite(run(expanded(made, found), images(1, 1)[0])[0]).all()


def test_the_budget_cuts_the_number_of_samples() -> None:
    made, plan = prepared(model(NET, NET_WEIGHTS))
    read: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return 100

        def __iter__(self) -> Any:
            for i, feed in enumerate(images(100, 0)):
                read.append(i)
                yield feed

    # The widest cut holds q and r, [8, 10, 10] float32 each, in two variants.
    budget = 2 * 2 * 8 * 100 * 4 * 7
    _, notes = calibrate_weights(made, plan, Counted(), budget_bytes=budget)
    assert notes[0].startswith("weights: 7 of 100 samples, memory bound")


def test_what_is_not_calibrated_is_said() -> None:
    text = """g (float[N,4,5,5] x, bool c) => (float[N,3,6,6] y) {
        [conv] a = Conv (x, w1)
        b = If (c) <
            then_branch = t () => (float[N,4,5,5] p) { [inner] p = Conv (a, w1) },
            else_branch = e () => (float[N,4,5,5] q) { q = Identity (a) }
        >
        [up] y = ConvTranspose (b, w2)
    }"""
    given = {"w1": weights(4, 4, 1, 1), "w2": weights(4, 3, 2, 2, seed=1)}
    made, plan = prepared(model(text, given))
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.standard_normal((1, 4, 5, 5)).astype(np.float32), "c": np.array(True)}
        for _ in range(4)
    ]
    found, notes = calibrate_weights(made, plan, feeds)
    assert set(found.integers) == {"conv"} and {"inner", "up"} <= set(found.scales)
    assert any("'inner'" in note and "inside If" in note for note in notes)
    assert any("'up'" in note and "ConvTranspose" in note for note in notes)


def test_integers_of_the_plan_are_kept_and_made_up_for() -> None:
    proto = model(NET, NET_WEIGHTS)
    made, plan = prepared(proto)
    half, _ = calibrate_weights(made, plan, images(16, 0))
    kept = half.model_copy(update={"integers": {"a": (np.zeros((8, 54), np.int8),)}})
    found, notes = calibrate_weights(made, kept, images(16, 0))
    assert notes == ()
    assert not found.integers["a"][0].any() and found.integers["c"][0].any()


def test_no_samples_and_models_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plan = prepared(model(NET, NET_WEIGHTS))
    with pytest.raises(CalibrationError, match="no samples"):
        calibrate_weights(made, plan, [])

    def refuse(_model: Model) -> onnx.ModelProto:
        raise ModelError("the model takes 3.0 GiB")

    monkeypatch.setattr(driver, "to_proto", refuse)
    with pytest.raises(ModelError, match=r"calibration .* 3.0 GiB"):
        calibrate_weights(made, plan, images(1, 0))


def test_seeded_runs_agree() -> None:
    made, plan = prepared(model(NET, NET_WEIGHTS))
    one, other = (calibrate_weights(made, plan, images(8, 0), seed=3)[0] for _ in range(2))
    for name in NODES:
        np.testing.assert_array_equal(one.integers[name][0], other.integers[name][0])
        np.testing.assert_array_equal(one.scales[name][0], other.scales[name][0])
