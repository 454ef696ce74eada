"""Further terms for a share of the channels, as a candidate of the allocation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from budgeting import classifier, images, planned, shared
from small import model, run, weights

import onnxq
from onnxq.allocate import Goal, allocate
from onnxq.candidates import EFFICIENT, WITH_POINTS, bits, partial_bytes, with_points
from onnxq.costs import Costs
from onnxq.feeds import Feed
from onnxq.passes.plan_points import point_bytes
from onnxq.passes.search_scales import match_plan
from onnxq.plan import Plan
from onnxq.sensitivity import estimate, measure
from onnxq.trial import Trial

EIGHTH = with_points(bits(4, terms=2), 8)
LOUD = [3, 17, 40, 63, 77, 90, 101, 127]  # channels of `fc` with weights eight times as large


def loud() -> onnx.ModelProto:
    """One large MatMul, a few of whose channels make most of its error."""
    w = weights(512, 128, seed=1, scale=0.1)
    w[:, LOUD] *= 8
    return model(
        """g (float[N,512] x) => (float[N,8] y) {
            [fc] a = MatMul (x, w)
            r = Relu (a)
            [out] y = MatMul (r, u)
        }""",
        {"w": w, "u": weights(128, 8, seed=2, scale=0.1)},
    )


def feeds(count: int, seed: int = 0) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((4, 512)).astype(np.float32)} for _ in range(count)]


def test_which_channels() -> None:
    """Those whose own error is the largest, not those with the largest relative to the output."""
    loaded, plan = planned(loud())
    table = estimate(loaded, plan, [bits(4), with_points(bits(4, terms=2), 16)])
    assert np.flatnonzero(table.points[0, 1] == 2).tolist() == LOUD
    # ε² of 120 channels at one term, of 8 · 8² = 512 that hardly anything is left of
    assert table.error[0, 1] < 0.3 * table.error[0, 0]


def test_the_error_lies_between_that_of_one_term_and_of_all() -> None:
    loaded, plan = planned(classifier())
    set_ = [bits(4), EIGHTH, with_points(bits(4, terms=2), 4), bits(4, terms=2)]
    for table in (estimate(loaded, plan, set_), measure(loaded, plan, set_, images(4))):
        there = np.isfinite(table.error[:, 1])
        assert there.sum() == 4  # fc2 has ten channels: one of them
        assert (np.diff(table.error[there], axis=1) < 0).all()
        assert np.isfinite(table.bytes[there]).all()


def test_where_there_are_none() -> None:
    loaded, plan = planned(classifier(), activations="dynamic")
    assert np.isinf(estimate(loaded, plan, [EIGHTH]).error).all()
    loaded, plan = planned(classifier(), layout="parallel")
    assert np.isinf(estimate(loaded, plan, [EIGHTH]).error).all()
    loaded, plan = planned(classifier())
    few = with_points(bits(4, terms=2), 32)  # of ten channels none
    assert np.isinf(estimate(loaded, plan, [few]).error[3, 0])


def test_bytes_hold_the_numbers() -> None:
    loaded, plan = planned(classifier())
    entry, (_, weight) = next(site for site in match_plan(loaded, plan) if site[0].name == "fc1")
    made = EIGHTH.apply(entry, weight)
    assert made is not None
    assert point_bytes(weight, made, 8) == 256 / 2 + 4 + 1
    difference = partial_bytes(made, weight, 16) - partial_bytes(made, weight, 8)
    assert difference == 8 * point_bytes(weight, made)


@pytest.mark.parametrize("proto", [classifier(), shared()], ids=["classifier", "shared"])
def test_exact_bytes_are_those_of_the_file(proto: onnx.ModelProto) -> None:
    loaded, plan = planned(proto)
    table = estimate(loaded, plan, [EIGHTH])
    with Trial(loaded, ()) as trial:
        exact = trial.exact_bytes(table, plan)
        weighed = sum(4 * unit.weight.size for unit in table.units)
        rest = trial.float_bytes - weighed
        size = trial.size(table.plan(plan, [0] * len(table.units)))
    assert size == pytest.approx(rest + exact.bytes.sum(), abs=1)
    # what was said before is within a few hundred bytes a node
    assert np.abs(exact.bytes - table.bytes).max() < 800


def test_the_plan_holds_the_points(tmp_path: Path) -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(4), EIGHTH])
    chosen = table.plan(plan, [0, 1, 1, 0])
    assert set(chosen.points) == {"conv2", "fc1"}
    assert all(p.dtype == np.int8 for p in chosen.points.values())
    again = table.plan(chosen, [1, 0, 1, 0])
    assert set(again.points) == {"conv1", "fc1"}
    chosen.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    with Trial(loaded, images(2)) as trial:
        assert trial(read)[0] == trial(chosen)[0]


def test_shared_weights_have_them_together() -> None:
    loaded, plan = planned(shared())
    table = estimate(loaded, plan, [EIGHTH])
    made = table.plan(plan, [0, 0])
    np.testing.assert_array_equal(made.points["m1"], made.points["m2"])


def test_weights_are_those_of_the_plan() -> None:
    """What is probed is what the file will hold."""
    loaded, plan = planned(loud())
    costs = Costs(loaded, plan, [EIGHTH])
    ((_, weight, energy),) = costs.weights(0)
    exact = costs.units[0].weight.matrix().T
    assert energy == pytest.approx(
        np.square(weight - exact, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum()
    )
    made = onnxq.quantize(loud(), plan=estimate(loaded, plan, [EIGHTH]).plan(plan, [0, 0]))
    x = np.eye(512, dtype=np.float32)
    hidden = onnx.ModelProto()
    hidden.CopyFrom(made.model)
    hidden.graph.output.append(onnx.ValueInfoProto(name="a"))
    found = run(hidden, {"x": x}, optimize=False)[1]
    np.testing.assert_allclose(found, weight, rtol=0, atol=np.abs(weight).max() * 1e-6)


def test_the_allocation_chooses_them_where_they_pay() -> None:
    """Five bits and a sixteenth of the channels with ten, against six for all of them."""
    loaded, plan = planned(loud())
    goal = Goal(max_bytes=50_000, minimize="error")
    with_, without = (
        allocate(loaded, plan, feeds(16), goal, candidates=candidates)
        for candidates in ((*WITH_POINTS, *EFFICIENT), EFFICIENT)
    )
    assert with_.size <= 50_000 and without.size <= 50_000
    assert any("@" in name for name in with_.chosen) and with_.plan.points
    assert with_.measured is not None and without.measured is not None
    assert with_.measured.energy.value < 0.8 * without.measured.energy.value


@pytest.mark.parametrize("calibrated", [False, True])
def test_by_option(calibrated: bool) -> None:
    samples = {"x": np.concatenate([feed["x"] for feed in feeds(8)])}
    found = onnxq.quantize(
        loud(),
        points="auto",
        max_size="50000B",
        activations="none",
        calibration=samples if calibrated else None,
    )
    (line,) = (line for line in found.report.planning if line.startswith("at most"))
    assert "@1/" in line and line.endswith("@ channels with all terms)")
    assert (
        found.plan.points and found.report.size_after <= 50_000 + 1500
    )  # the plan is in the file, too
