"""Kernels rounded for smooth inputs, and biases by BatchNormalization, without data."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from expanding import expand, rewritten
from small import model, run, weights

from onnxq.errors import ConfigError
from onnxq.model import load
from onnxq.passes import PIPELINE, SearchScales, SelectNodes, SplitBatchNorm
from onnxq.passes.channel_statistics import channel_statistics
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.plan import Plan
from onnxq.without_data import complete

CHANNELS = 6


def net() -> onnx.ModelProto:
    """A normalized input, a 3×3, a depthwise 3×3 and a 1×1 convolution, and a Gemm."""
    rng = np.random.default_rng(3)
    return model(
        f"""g (float[N,{CHANNELS},12,12] x) => (float[N,5] y) {{
            n = BatchNormalization (x, g, b, m, v)
            r = Relu (n)
            [first] c = Conv (r, w1, b1)
            [deep] d = Conv <group = 8> (c, w2)
            [point] e = Conv (d, w3)
            p = GlobalAveragePool (e)
            f = Flatten (p)
            [last] y = MatMul (f, w4)
        }}""",
        {
            "g": rng.uniform(0.5, 2, CHANNELS).astype(np.float32),
            "b": rng.standard_normal(CHANNELS).astype(np.float32),
            "m": np.zeros(CHANNELS, np.float32),
            "v": np.ones(CHANNELS, np.float32),
            "w1": weights(8, CHANNELS, 3, 3),
            "b1": weights(8, seed=1),
            "w2": weights(8, 1, 3, 3, seed=2),
            "w3": weights(7, 8, 1, 1, seed=3),
            "w4": weights(7, 5, seed=4),
        },
    )


def inputs(count: int = 16) -> np.ndarray:
    """Normal, as the BatchNormalization has it, and smooth: an average over 3×3 positions."""
    noise = np.random.default_rng(0).standard_normal((count, CHANNELS, 14, 14))
    windows = np.lib.stride_tricks.sliding_window_view(noise, (3, 3), axis=(2, 3))
    return (windows.sum(axis=(4, 5)) / 3).astype(np.float32)


def planned(**options: object) -> Plan:
    settings = {"activations": "none", "layout": "merged", "terms": 1, "bits": 3, **options}
    return SearchScales()(load(net()), SelectNodes(**settings)(load(net())))


def error(plan: Plan) -> float:
    x = {"x": inputs()}
    (wanted,), (found,) = run(net(), x), run(expand(net(), plan)[0], x)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_what_a_centre_term_leaves_is_rounded():
    plan = planned()
    centred = plan["first"].model_copy(update={"centre": True, "terms": 2})
    nodes = [centred if node.name == "first" else node for node in plan.nodes]
    plan = SearchScales()(load(net()), Plan(nodes=nodes))
    found, _ = complete(load(net()), plan, {})
    coarse, rest = found.integers["first"]
    before = node_series(match_plan(load(net()), plan)[0][1][1], centred, plan)
    assert np.array_equal(coarse, before.terms[0].q)
    assert not np.array_equal(rest, before.terms[1].q)
    assert error(found) < error(plan)


@pytest.mark.parametrize("offset", [False, True])
def test_the_error_on_smooth_inputs_falls(offset):
    """The errors of a depthwise kernel with an offset sum to 0 without more ado."""
    plan, notes = complete(load(net()), planned(offset=offset), channel_statistics(load(net())))
    rounded = {"first"} if offset else {"first", "deep"}
    assert set(plan.integers) == rounded
    assert set(plan.bias) == {"first", "deep", "point", "last"}
    assert error(plan) < 0.7 * error(planned(offset=offset))
    assert notes == (
        f"without data: {len(rounded)} of 4 rounded for inputs alike at neighbouring positions; "
        "4 of 4 biases corrected by BatchNormalization's means",
    )


def test_the_bias_makes_up_for_the_mean_alone():
    """W·m + b of the quantized node is that of the float one."""
    statistics = channel_statistics(load(net()))
    plan, _ = complete(load(net()), planned(), statistics)
    for entry, (candidate, weight) in match_plan(load(net()), plan):
        mean = statistics[candidate.node.inputs[0].name].mean
        off = (weight.matrix() - node_series(weight, entry, plan).dequantize()).astype(np.float64)
        groups = 8 if entry.name == "deep" else 1
        taps = 9 if candidate.node.op == "Conv" and weight.shape[2:] == (3, 3) else 1
        means = np.repeat(np.repeat(mean, taps).reshape(groups, -1), len(off) // groups, axis=0)
        np.testing.assert_allclose(plan.bias[entry.name], (off * means).sum(axis=1), rtol=1e-5)


def test_without_statistics_the_errors_of_a_row_sum_to_nothing_where_there_is_an_offset():
    plan, _ = complete(load(net()), planned(offset=True), {})
    assert not plan.bias
    for entry, (_, weight) in match_plan(load(net()), plan):
        if entry.name in plan.integers:
            off = weight.matrix() - node_series(weight, entry, plan).dequantize()
            # The offset is stored in float32: half a unit of it for each weight.
            assert np.abs(off.mean(axis=1)).max() < 1e-6


def test_what_is_planned_already_is_kept():
    before, _ = complete(load(net()), planned(), {})
    before.bias["first"] = np.ones(8, np.float32)
    integers = dict(before.integers)
    after, _ = complete(load(net()), before, channel_statistics(load(net())))
    assert all(after.integers[name] is integers[name] for name in integers)
    assert after.bias["first"].tolist() == [1] * 8
    assert set(before.bias) == {"first"}, "the given plan was changed"


def test_only_named_nodes_are_changed():
    plan, _ = complete(load(net()), planned(), channel_statistics(load(net())), {"deep", "last"})
    assert set(plan.integers) == {"deep"}
    assert set(plan.bias) == {"deep", "last"}


def test_a_kernel_along_one_axis_is_left_alone():
    """Neighbours in a sequence of tokens are not alike."""
    proto = model(
        """g (float[1,4,12] x) => (float[1,3,8] y) {
            [op] y = Conv (x, w)
        }""",
        {"w": weights(3, 4, 5)},
    )
    plan = rewritten(proto, activations="none", terms=1).plan
    found, notes = complete(load(proto), plan, {})
    assert not found.integers
    assert notes == ()


def test_names_keep_their_meaning_through_the_folds():
    """Statistics are taken before the folds and read after them."""
    proto = model(
        """g (float[N,4,8,8] x) => (float[N,3,6,6] y) {
            a = Conv (x, w1)
            n = BatchNormalization (a, g, b, m, v)
            r = Relu (n)
            [two] y = Conv (r, w2)
        }""",
        {
            "w1": weights(4, 4, 1, 1),
            "w2": weights(3, 4, 3, 3, seed=1),
            **{name: np.ones(4, np.float32) for name in "gbmv"},
        },
    )
    canonical, statistics = load(proto), {}
    for pass_ in PIPELINE:
        if isinstance(pass_, SplitBatchNorm):
            statistics = channel_statistics(canonical)
        pass_(canonical)
    settings = {"activations": "none", "layout": "merged", "terms": 1}
    plan = SearchScales()(canonical, SelectNodes(**settings)(canonical))
    assert "two" in complete(canonical, plan, statistics)[0].bias


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(ConfigError, match="another model"):
        complete(load(model("g (float[2] x) => (float[2] y) { y = Relu (x) }")), planned(), {})
