"""The table of what candidates cost and how much error they make, against running the model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from budgeting import classifier, drawn, images, planned, shared
from small import model, run, weights

from onnxq.candidates import EFFICIENT, LEFT_IN_FLOAT, TERM_OVERHEAD, bits, products, stored_bytes
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import Expand, required_opset
from onnxq.passes.probe import open_weights
from onnxq.passes.search_scales import match_plan
from onnxq.plan import Plan
from onnxq.sensitivity import estimate, measure
from onnxq.trial import Trial


def expanded(proto: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    made = raise_opset(load(proto), required_opset(plan))
    Expand(plan)(made)
    return to_proto(made)


def energy(proto: onnx.ModelProto, plan: Plan, feeds: list[dict[str, np.ndarray]]) -> float:
    """Of the expanded model's error, relative to the output's."""
    other = expanded(proto, plan)
    pairs = [(run(proto, feed)[0], run(other, feed)[0]) for feed in feeds]
    exact, found = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return float(np.sum((found - exact) ** 2) / np.sum(exact**2))


def test_each_entry_is_the_error_of_that_node_alone() -> None:
    loaded, plan = planned(classifier())
    canonical = to_proto(loaded)
    feeds = images(4)
    table = measure(loaded, plan, EFFICIENT, feeds)
    exact = EFFICIENT.index(LEFT_IN_FLOAT)
    for unit in range(len(table.units)):
        for option in (0, EFFICIENT.index(bits(8))):
            chosen = [exact] * len(table.units)
            chosen[unit] = option
            found = energy(canonical, table.plan(plan, chosen), feeds)
            # the first below LINEAR is measured, too; what float32 rounds is far less
            assert table.error[unit, option] == pytest.approx(found, rel=1e-2)


def test_finer_candidates_are_scaled_from_coarser_ones() -> None:
    """Both are draws of the same noise: few of its directions reach the 10 outputs, so that single
    draws differ by a factor of some (F with 10 degrees of freedom: above 5 once in 100), means of
    four by less.
    """
    loaded, plan = planned(classifier())
    canonical = to_proto(loaded)
    feeds = images(8)
    table = measure(loaded, plan, EFFICIENT, feeds)
    exact = EFFICIENT.index(LEFT_IN_FLOAT)
    option = EFFICIENT.index(bits(4, terms=3))
    ratios = []
    for unit in range(len(table.units)):
        chosen = [exact] * len(table.units)
        chosen[unit] = option
        found = energy(canonical, table.plan(plan, chosen), feeds)
        ratios.append(table.error[unit, option] / found)
    assert all(0.2 < ratio < 5 for ratio in ratios)
    assert 0.5 < np.exp(np.mean(np.log(ratios))) < 2


def test_errors_fall_with_bits_and_float_has_none() -> None:
    loaded, plan = planned(classifier())
    options = [bits(4), bits(6), bits(8), LEFT_IN_FLOAT]
    for table in (measure(loaded, plan, options, images(4)), estimate(loaded, plan, options)):
        for row in table.error:
            assert all(one > other for one, other in pairwise(row))
            assert row[-1] == 0


def test_the_estimate_is_the_energy_of_the_weights_error() -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(4)])
    for unit, what in enumerate(table.units):
        made = table.plan(plan, [0] * len(table.units))
        scale = made.scales[what.name][0][:, None]
        w = what.weight.matrix()
        noise = np.clip(np.round(w / scale), -7, 7) * scale - w
        assert table.error[unit, 0] == pytest.approx(
            float(np.sum(noise**2) / np.sum(w**2)), rel=1e-5
        )


def test_the_model_and_the_plan_are_left_as_they_were() -> None:
    loaded, plan = planned(classifier())
    before = to_proto(loaded).SerializeToString(), plan.model_dump()
    measure(loaded, plan, EFFICIENT, images(1))
    assert (to_proto(loaded).SerializeToString(), plan.model_dump()) == before
    assert not plan.scales


def test_nodes_that_share_a_weight_are_one_unit() -> None:
    loaded, plan = planned(shared())
    table = measure(loaded, plan, EFFICIENT, drawn(3, 32))
    assert [[e.name for e in unit.entries] for unit in table.units] == [["m1", "m2"], ["m3"]]
    made = table.plan(plan, [EFFICIENT.index(bits(8)), 0])
    assert [node.bits for node in made.nodes] == [8, 8, 4]
    # stored once
    assert table.bytes[0, 0] == table.bytes[1, 0]
    found = energy(to_proto(loaded), table.plan(plan, [0, 7]), drawn(3, 32))
    assert table.error[0, 0] == pytest.approx(found, rel=1e-2)


def test_weights_in_bodies_are_inputs_too() -> None:
    proto = model(
        """g (bool c, float[2,8] x) => (float[2,8] y) {
            y = If (c) <
                then_branch = t () => (float[2,8] a) { [inner] a = MatMul (x, w) },
                else_branch = e () => (float[2,8] b) { b = Identity (x) }
            >
        }""",
        {"w": weights(8, 8)},
    )
    loaded, plan = planned(proto)
    feed = {"c": np.array(True), "x": weights(2, 8, seed=3)}
    opened = open_weights(loaded, plan)
    assert list(opened.inputs) == ["inner"]
    assert not opened.proto.graph.initializer
    doubled = {opened.inputs["inner"]: 2 * weights(8, 8)}
    np.testing.assert_allclose(
        run(opened.proto, {**feed, **doubled})[0], 2 * run(proto, feed)[0], rtol=1e-5
    )
    table = measure(loaded, plan, [bits(4), LEFT_IN_FLOAT], [feed])
    assert table.error[0, 0] > 0


def test_what_a_node_cannot_have_is_not_there() -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(4, block_size=64), bits(4), LEFT_IN_FLOAT])
    names = [unit.name for unit in table.units]
    # rows of 27, 72, 256 and 64 inputs
    there = dict(zip(names, np.isfinite(table.error[:, 0]), strict=True))
    assert there == {"conv1": False, "conv2": True, "fc1": True, "fc2": False}
    dynamic = planned(classifier(), activations="dynamic")
    assert not np.isfinite(estimate(*dynamic, [bits(4, block_size=32)]).error).any()


def test_an_output_that_is_not_finite_rules_a_candidate_out() -> None:
    """4 bits make a weight of 0.01 zero, whose reciprocal is no number."""
    proto = model(
        """g (float[N,4] x) => (float[N,4] y) {
            [m] a = MatMul (x, w)
            y = Reciprocal (a)
        }""",
        {"w": np.array([[1.0] * 4, [0.01] * 4] * 2, np.float32)},
    )
    loaded, plan = planned(proto)
    feed = {"x": np.array([[0, 1, 0, 1]], np.float32)}
    table = measure(loaded, plan, [bits(4), bits(8)], [feed])
    assert np.isinf(table.error[0, 0]) and np.isfinite(table.error[0, 1])


@pytest.mark.parametrize("option", range(len(EFFICIENT)), ids=lambda i: EFFICIENT[i].name)
def test_bytes_are_those_of_the_file(option: int) -> None:
    """Summed over all nodes, once the table knows what names and nodes take."""
    loaded, plan = planned(classifier())
    with Trial(loaded, ()) as trial:
        table = trial.exact_bytes(estimate(loaded, plan, EFFICIENT), plan)
        exact = len(EFFICIENT) - 1
        chosen = [option if np.isfinite(row[option]) else exact for row in table.bytes]
        weights_taken = sum(4 * unit.weight.size for unit in table.units)
        rest = trial.float_bytes - weights_taken
        size = trial.size(table.plan(plan, chosen))
    assert rest + sum(table.bytes[range(4), chosen]) == pytest.approx(size, abs=1)


def test_stored_bytes_hold_the_numbers() -> None:
    loaded, plan = planned(classifier())
    entry, (_, weight) = next(site for site in match_plan(loaded, plan) if site[0].name == "fc1")
    apply = {c.name: c.apply(entry, weight) for c in EFFICIENT}
    size, out = 256 * 64, 64
    expected = {
        "4x1": size // 2 + 4 * out,
        "4x1/64": size // 2 + 4 * out * 4,
        "4x1/16": size // 2 + 4 * out * 16,
        "8x1": size + 4 * out,
        "4x3": 3 * (size // 2 + 4 * out),
        "8x2": 2 * (size + 4 * out),
    }
    for name, numbers in expected.items():
        made = apply[name]
        assert made is not None
        assert stored_bytes(made, weight) == numbers + made.terms * TERM_OVERHEAD
    assert apply["float"] is not None and stored_bytes(apply["float"], weight) == 4 * size


def test_products() -> None:
    loaded, plan = planned(classifier(), activations="dynamic", terms=2, layout="parallel")
    entry, (_, weight) = next(site for site in match_plan(loaded, plan) if site[0].name == "fc1")
    size = 256 * 64
    assert products(entry, weight) == 2 * size
    assert products(entry.model_copy(update={"activation_terms": 2}), weight) == 3 * size
    every = entry.model_copy(update={"activation_terms": 2, "products": "all"})
    assert products(every, weight) == 4 * size
    assert products(entry.model_copy(update={"activations": "none"}), weight) == 8 * size
    merged = entry.model_copy(update={"activations": "none", "layout": "merged"})
    assert products(merged, weight) == 4 * size
