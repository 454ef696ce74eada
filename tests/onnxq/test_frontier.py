"""Running a model in segments gives what the whole model gives, and keeps only what is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from small import feeds, model, run, weights

from onnxq.errors import CalibrationError
from onnxq.frontier import Frontier, Replacement, cut, live_bytes

RESIDUAL = """g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
    [first] a = Conv <pads = [1,1,1,1]> (x, w1)
    b = Relu (a)
    [second] c = Conv <pads = [1,1,1,1]> (b, w2)
    [skip] s = Conv (x, w3)
    d = Add (c, s)
    [last] e = Conv (d, w4)
    [aside] f = Conv (d, w4)
    h = Tanh (f)
    y = Add (e, h)
}"""
WEIGHTS = {
    "w1": weights(4, 3, 3, 3),
    "w2": weights(4, 4, 3, 3, seed=1),
    "w3": weights(4, 3, 1, 1, seed=2),
    "w4": weights(4, 4, 1, 1, seed=3),
}
NAMES = ("first", "second", "skip", "last", "aside")


def residual() -> onnx.ModelProto:
    return model(RESIDUAL, WEIGHTS)


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": weights(1, 3, 8, 8, seed=10 + i)} for i in range(count)]


def tensors(proto: onnx.ModelProto, names: list[str], feed: dict[str, np.ndarray]) -> list[Any]:
    """Tensors of the whole model, run once."""
    whole = onnx.ModelProto.FromString(proto.SerializeToString())
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return run(whole, feed, optimize=False)


def test_groups_hold_the_nodes_that_wait_for_no_other() -> None:
    groups = [segment.group for segment in cut(residual().graph, NAMES)]
    assert groups == [("first", "skip"), ("second",), ("last", "aside")]


def test_nodes_that_are_not_chosen_do_not_cut() -> None:
    segments = cut(residual().graph, ("second", "last"))
    assert [segment.group for segment in segments] == [("second",), ("last",)]
    assert cut(residual().graph, ()) == []


def test_only_what_leads_to_a_chosen_node_is_run() -> None:
    proto = residual()
    run_ = [i for segment in cut(proto.graph, ("second",)) for i in segment.nodes]
    assert [proto.graph.node[i].name or proto.graph.node[i].op_type for i in run_] == [
        "first",
        "Relu",
    ]


def test_inputs_of_every_group_are_those_of_the_whole_model() -> None:
    proto = residual()
    frontier = Frontier(proto, cut(proto.graph, NAMES), samples())
    seen = []
    for group in frontier:
        for name in group:
            node = next(node for node in proto.graph.node if node.name == name)
            exact, quantized = frontier.inputs(name, 0)
            for feed, x, x_hat in zip(samples(), exact, quantized, strict=True):
                wanted = (
                    feed["x"] if node.input[0] == "x" else tensors(proto, [node.input[0]], feed)[0]
                )
                np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-5)
                assert x is x_hat, "nothing is replaced: the second variant costs nothing"
            seen.append(name)
    assert sorted(seen) == sorted(NAMES)


def test_replaced_nodes_count_behind_them_and_only_in_the_quantized_variant() -> None:
    proto = residual()
    changed = {"w1": WEIGHTS["w1"] * 1.5, "w3": WEIGHTS["w3"] - 0.25}
    shift = np.full((4, 1, 1), 0.5, np.float32)
    other = model(
        RESIDUAL.replace("(x, w1)", "(x, w1, b1)"),
        {**WEIGHTS, **changed, "b1": np.full(4, 0.5, np.float32)},
    )
    frontier = Frontier(proto, cut(proto.graph, NAMES), samples())
    for group in frontier:
        if "first" in group:
            frontier.replace("first", Replacement(1, changed["w1"], shift))
            frontier.replace("skip", Replacement(1, changed["w3"], None))
        if "last" in group:
            exact, quantized = frontier.inputs("last", 0)
    for feed, x, x_hat in zip(samples(), exact, quantized, strict=True):
        np.testing.assert_allclose(x, tensors(proto, ["d"], feed)[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(x_hat, tensors(other, ["d"], feed)[0], rtol=0, atol=1e-4)
        assert np.abs(x - x_hat).max() > 0.1


def test_a_replaced_matmul_shifts_its_last_axis() -> None:
    text = """g (float[N,5,6] x) => (float[N,5,2] y) {
        [one] a = MatMul (x, w)
        [two] y = MatMul (a, v)
    }"""
    w, v = weights(6, 3), weights(3, 2, seed=1)
    proto = model(text, {"w": w, "v": v})
    frontier = Frontier(proto, cut(proto.graph, ("one", "two")), [{"x": weights(1, 5, 6, seed=2)}])
    shift = np.array([1, 2, 3], np.float32)
    for group in frontier:
        if group == ("one",):
            frontier.replace("one", Replacement(1, 2 * w, shift))
        else:
            exact, quantized = frontier.inputs("two", 0)
    np.testing.assert_allclose(quantized[0], 2 * exact[0] + shift, rtol=0, atol=1e-5)


def test_what_is_dead_is_dropped() -> None:
    proto = residual()
    segments = cut(proto.graph, NAMES)
    assert [sorted(segment.live) for segment in segments] == [["x"], ["b", "s"], ["d"]]
    frontier = Frontier(proto, segments, samples())
    for segment, _ in zip(segments, frontier, strict=True):
        for kept in (*frontier._float, *frontier._quantized):
            assert set(kept) == segment.live


def test_live_bytes_are_the_widest_cut() -> None:
    proto = residual()
    # b and s, [1, 4, 8, 8] float32 each
    assert live_bytes(proto, cut(proto.graph, NAMES), samples()[0]) == 2 * 4 * 64 * 4
    assert live_bytes(proto, cut(proto.graph, ("first",)), samples()[0]) == 3 * 64 * 4
    assert live_bytes(proto, [], samples()[0]) == 0


def test_constants_are_computed_where_they_are_read_not_kept() -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        big = Expand (one, shape)
        [one_] a = MatMul (x, w)
        b = Add (a, big)
        [two] y = MatMul (b, w)
    }"""
    constants = {
        "one": np.ones((1, 1), np.float32),
        "shape": np.array([1, 4], np.int64),
        "w": weights(4, 4),
    }
    proto = model(text, constants)
    segments = cut(proto.graph, ("one_", "two"))
    assert [sorted(segment.live) for segment in segments] == [["x"], ["b"]]
    frontier = Frontier(proto, segments, [{"x": weights(1, 4)}])
    *_, (exact, _) = (frontier.inputs(name, 0) for (name,) in frontier)
    np.testing.assert_allclose(exact[0], weights(1, 4) @ weights(4, 4) + 1, rtol=0, atol=1e-5)


def test_bodies_are_run_as_they_are_with_what_they_capture() -> None:
    text = """g (float[N,4] x, bool c) => (float[N,4] y) {
        [one] a = MatMul (x, w)
        b = If (c) <
            then_branch = t () => (float[N,4] p) { p = Add (a, x) },
            else_branch = e () => (float[N,4] q) { q = MatMul (a, v) }
        >
        [two] y = MatMul (b, w)
    }"""
    proto = model(text, {"w": weights(4, 4), "v": weights(4, 4, seed=1)})
    segments = cut(proto.graph, ("one", "two"))
    assert [sorted(segment.live) for segment in segments] == [["c", "x"], ["b"]]
    for flag in (True, False):
        feed = {"x": weights(2, 4, seed=2), "c": np.array(flag)}
        frontier = Frontier(proto, segments, [feed])
        *_, (exact, _) = (frontier.inputs(name, 0) for (name,) in frontier)
        np.testing.assert_allclose(exact[0], tensors(proto, ["b"], feed)[0], rtol=0, atol=1e-5)


def test_several_inputs_of_other_types_and_samples_of_other_sizes() -> None:
    text = """g (int64[N,L] ids, float[6,4] unused, bool[N,L] mask) => (float[N,L,3] y) {
        e = Gather (table, ids)
        [one] a = MatMul (e, w)
        m = Cast <to = 1> (mask)
        u = Unsqueeze (m, axis)
        z = Mul (a, u)
        [two] y = MatMul (z, w)
    }"""
    proto = model(
        text,
        {"table": weights(9, 3), "w": weights(3, 3, seed=1), "axis": np.array([2], np.int64)},
    )
    rng = np.random.default_rng(0)
    given = [
        {
            "ids": rng.integers(0, 9, (2, length)),
            "mask": rng.integers(0, 2, (2, length)).astype(bool),
            "unused": np.zeros((6, 4), np.float32),
        }
        for length in (3, 5)
    ]
    frontier = Frontier(proto, cut(proto.graph, ("one", "two")), given)
    *_, (exact, _) = (frontier.inputs(name, 0) for (name,) in frontier)
    for feed, x in zip(given, exact, strict=True):
        np.testing.assert_allclose(x, tensors(proto, ["z"], feed)[0], rtol=0, atol=1e-5)


def test_samples_that_the_model_refuses_are_named() -> None:
    proto = residual()
    frontier = Frontier(proto, cut(proto.graph, NAMES), [{"x": np.zeros((1, 5, 8, 8), np.float32)}])
    with pytest.raises(CalibrationError, match="check the samples"):
        list(frontier)


def test_the_kitchen_sink_of_feeds_stays_untouched() -> None:
    proto = residual()
    given = [feeds(proto)]
    before = given[0]["x"].copy()
    for _ in Frontier(proto, cut(proto.graph, NAMES), given):
        pass
    assert list(given[0]) == ["x"]
    np.testing.assert_array_equal(given[0]["x"], before)
