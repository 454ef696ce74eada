"""Which tensors are quantized, which share a range, and what ranges samples give them."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import pytest
from small import conv_model, model, weights

from onnxq.errors import CalibrationError
from onnxq.kernels_ref import activation_params
from onnxq.model import load
from onnxq.passes import NameNodes, SearchScales, SelectNodes
from onnxq.passes.fit_bias import LARGEST_BIAS, FitBias
from onnxq.passes.search_ranges import RangeMethod, SearchRanges, align
from onnxq.passes.select_tensors import Group, Selection, SelectTensors
from onnxq.plan import Plan

W = {"w": weights(4, 4, 1, 1), "v": weights(4, 4, 1, 1, seed=2)}


def selected(proto: onnx.ModelProto, **options: object) -> Selection:
    source = load(proto)
    NameNodes()(source)
    chosen = {"bits": 8, "terms": 1, "layout": "merged", **options}
    plan = SelectNodes(activations="static", **chosen)(source)  # type: ignore[arg-type]
    return SelectTensors()(source, plan)


def groups(text: str, **constants: np.ndarray) -> list[tuple[str, ...]]:
    """The groups of a graph from x to y, whose text has no declared output shape."""
    body = f"""g (float[2,4,6,6] x) => (float[a,b,c,d] y) {{ {text} }}"""
    return [group.names for group in selected(model(body, {**W, **constants})).groups]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # what a Conv writes, behind its Relu; the ends stay float where no Conv is
        ("a = Conv (x, w) y = Relu (a)", [("x",), ("y",)]),
        ("a = Conv (x, w) r = Relu (a) y = Sigmoid (r)", [("x",), ("r",)]),
        # moves share; the one behind the last Conv is free, so it is taken
        (
            "a = Conv (x, w) p = MaxPool <kernel_shape = [2,2]> (a) y = Conv (p, v)",
            [("x",), ("a", "p"), ("y",)],
        ),
        ("a = Conv (x, w) y = Transpose (a)", [("x",), ("a", "y")]),
        # a sum is quantized where a Conv reads it in the end, not for its own sake
        (
            "a = Conv (x, w) s = Add (a, x) y = Conv (s, v)",
            [("x",), ("a",), ("s",), ("y",)],
        ),
        ("a = Conv (x, w) y = Add (a, x)", [("x",), ("a",)]),
        # not beside a float tensor
        (
            "a = Conv (x, w) f = Tanh (x) s = Add (a, f) y = Conv (s, v)",
            [("x",), ("a",), ("s",), ("y",)],
        ),
        # a Relu that others than it read before cannot be saturation
        (
            "a = Conv (x, w) r = Relu (a) s = Add (a, r) y = Conv (s, v)",
            [("x",), ("a",), ("r",), ("s",), ("y",)],
        ),
        # before the first Conv nothing is quantized but what it reads
        ("f = Transpose <perm = [0,1,3,2]> (x) y = Conv (f, w)", [("f",), ("y",)]),
    ],
)
def test_groups(text: str, expected: list[tuple[str, ...]]) -> None:
    found = groups(text)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_concat_shares_with_what_it_alone_reads() -> None:
    text = """a = Conv (x, w) b = Conv (x, v) c = Concat <axis = 2> (a, b) d = Conv (c, w)
              e = Concat <axis = 2> (a, d) y = Conv (e, v)"""
    found = {frozenset(group) for group in groups(text)}
    assert {frozenset(("b", "c")), frozenset(("d", "e")), frozenset("a")} <= found


def test_the_widest_tensor_is_observed() -> None:
    body = """g (float[2,4,6,6] x) => (float[a,b,c,d] y) {
        a = Conv (x, w) b = Conv (x, v) p = MaxPool <kernel_shape = [1,1]> (a)
        c = Concat <axis = 2> (p, b) y = Conv (c, w) }"""
    found = selected(model(body, W)).groups
    observed = {group.observed: set(group.names) for group in found}
    assert observed["c"] == {"b", "c"} and observed["a"] == {"a", "p"}


def test_a_gate_asks_for_a_level() -> None:
    text = """g (float[2,4,6,6] x) => (float[a,b,c,d] y) {
        t = Conv (x, w) h = HardSigmoid <alpha = 0.25, beta = 0.5> (t) u = Mul (t, h)
        y = Conv (u, v) }"""
    levels = {group.observed: group.level for group in selected(model(text, W)).groups}
    assert levels["t"] == -2.0 and levels["x"] == 0.0


REASONS = [
    ("y = Conv (x, w, x1)", {}, "bias 'x1' is computed"),
    ("y = MatMul (x, m)", {"m": weights(4, 6, 6)}, "batched weight"),
]


@pytest.mark.parametrize(("text", "constants", "reason"), REASONS)
def test_reasons(text: str, constants: Mapping[str, np.ndarray], reason: str) -> None:
    proto = model(
        f"g (float[2,4,6,6] x, float[4] x1) => (float[a,b,c,d] y) {{ [op] {text} }}",
        {**W, **constants},
    )
    assert reason in selected(proto).left["op"]


def fake(tensors: Mapping[str, Sequence[np.ndarray]]):  # type: ignore[no-untyped-def]
    """An Observe that gives one mapping per tensor and sample."""

    def observe(names: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]]:
        for name in names:
            for array in tensors[name]:
                yield {name: array}

    return observe


PAIR = Selection((Group(("a", "b"), "a"), Group(("c",), "c")))


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "mae", "entropy"])
def test_ranges_hold_zero_and_no_more_than_was_seen(method: RangeMethod) -> None:
    rng = np.random.default_rng(0)
    a = [rng.standard_normal(500).astype(np.float32) for _ in range(3)]
    c = [rng.uniform(1, 2, 500).astype(np.float32)]
    plan = SearchRanges(fake({"a": a, "c": c}), method)(Plan(nodes=[]), PAIR)
    assert plan.ranges["a"] == plan.ranges["b"]
    low, high = plan.ranges["a"]
    assert np.min(a) <= low < 0 < high <= np.max(a)
    assert plan.ranges["c"][0] == 0 and 1 < plan.ranges["c"][1] <= 2
    if method == "minmax":
        assert (low, high) == (np.min(a), np.max(a))


def test_given_ranges_are_kept_and_hold_for_the_group() -> None:
    arrays = {"a": [np.float32([3])], "c": [np.float32([4])]}
    plan = Plan(nodes=[], ranges={"b": (0.0, 9.0)})
    found = SearchRanges(fake(arrays))(plan, PAIR).ranges
    assert found == {"b": (0.0, 9.0), "a": (0.0, 9.0), "c": (0.0, 4.0)}


def test_a_tensor_of_nan_is_refused() -> None:
    arrays = {"a": [np.full(3, np.nan, np.float32)], "c": [np.float32([4])]}
    with pytest.raises(CalibrationError, match="'a' has no finite value"):
        SearchRanges(fake(arrays))(Plan(nodes=[]), PAIR)


@pytest.mark.parametrize("found", [(-1.0, 5.0), (0.0, 3.5), (-30.0, 0.0), (-3.0, 100.0)])
def test_align(found: tuple[float, float]) -> None:
    low, high = align(found, -3.0)
    assert low <= min(found[0], -3.0) and high >= found[1]
    scale, zero = activation_params(low, high)
    steps = -3.0 / float(scale)
    assert abs(steps - round(steps)) < 1e-3 and zero + round(steps) >= 0


@pytest.mark.parametrize(
    "found",
    [
        (-400.0, 400.0),  # one step is longer than 3
        (-0.1, 0.1),  # the other readers would see a tenth of the levels
        (-0.1, -0.02),
    ],
)
def test_a_level_out_of_proportion_changes_nothing(found: tuple[float, float]) -> None:
    assert align(found, -3.0) == found


def test_a_level_that_a_tensor_cannot_reach_is_not_asked_for() -> None:
    text = "g (float[2,4,6,6] x) => (float[2,4,6,6] y) { a = Conv (x, w) %s y = Conv (h, v) }"
    relu = selected(model(text % "r = Relu (a) h = HardSigmoid (r)", W))
    plain = selected(model(text % "h = HardSigmoid (a)", W))
    assert [group.level for group in relu.groups] == [0.0] * 4
    levels = {group.names: group.level for group in plain.groups}
    assert levels[("a",)] == pytest.approx(-2.5) and not any(
        levels[n] for n in levels if "a" not in n
    )


def test_what_saturates_does_not_take_a_wider_range() -> None:
    beside = "c = Concat <axis = 1> (%s, r) p = MaxPool <kernel_shape = [1,1]> (c) y = Conv (p, u)"
    ends = {"u": weights(4, 8, 1, 1)}
    relu = "a = Conv (x, w) r = Relu (a) b = Conv (x, v) "
    assert ("r",) in groups(relu + beside % "b", **ends)
    both = groups(relu + "q = Relu (b) " + beside % "q", **ends)
    assert {"c", "p", "q", "r"} in map(set, both)
    gate = "a = Conv (x, w) r = HardSigmoid (a) b = Conv (x, v) "
    assert ("r",) in groups(gate + beside % "b", **ends)


def test_depthwise_in_parallel_layout() -> None:
    proto = model(
        """g (float[1,4,6,6] x) => (float[1,4,6,6] y) {
            [deep] a = Conv <group = 4> (x, d)
            [two] y = Conv (a, v)
        }""",
        {"d": weights(4, 1, 1, 1), "v": W["v"]},
    )
    found = selected(proto, bits=4, terms=2, layout="parallel")
    assert "depthwise" in found.left["deep"]
    assert [group.names for group in found.groups] == [("a",)]


def test_bias_fits_into_int32_steps() -> None:
    proto = conv_model()
    bias = np.float32([0.1, 1e6, -1e9, 0.0])
    for tensor in proto.graph.initializer:
        if tensor.name == "b":
            tensor.CopyFrom(onnx.numpy_helper.from_array(bias, "b"))
    source = load(proto)
    plan = SelectNodes(activations="static", bits=4, terms=2, layout="merged")(source)
    plan = SearchScales()(source, plan)
    plan.ranges.update(x=(0.0, 1e-3), y=(0.0, 1.0))
    before = [scale.copy() for scale in plan.scales["conv"]]
    after = FitBias()(source, plan).scales["conv"]
    steps = np.abs(bias) / (activation_params(0.0, 1e-3)[0] * after[-1].astype(np.float64))
    assert (steps <= LARGEST_BIAS * (1 + 2.0**-22)).all()
    factor = after[-1] / before[-1]
    np.testing.assert_array_equal(after[0] / before[0], factor)  # the ratio of the terms stays
    assert (np.log2(factor) == np.round(np.log2(factor))).all()
    np.testing.assert_array_equal(factor[[0, 3]], 1)
    assert factor[2] > 1
