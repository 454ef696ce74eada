"""Weights whose channels have different numbers of terms are rounded to samples, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from budgeting import classifier, images, planned

import onnxq
from onnxq.calibrate_weights import calibrate_weights
from onnxq.candidates import bits, with_points
from onnxq.passes.plan_points import PlanPoints
from onnxq.passes.search_scales import SearchScales, match_plan, node_series
from onnxq.rounding_factors import rounding_factors
from onnxq.sensitivity import estimate
from onnxq.trial import Trial

SAMPLES = images(32)


def plan_of(tolerance: float = 0.01, **options: Any):
    offset = options.pop("offset", False)
    loaded, plan = planned(classifier(), terms=2, **options)
    nodes = [node.model_copy(update={"offset": offset}) for node in plan.nodes]
    return loaded, PlanPoints(tolerance=tolerance)(loaded, plan.model_copy(update={"nodes": nodes}))


FORMS = [
    ({}, {}),
    ({"series": "joint"}, {}),
    ({"series": "fixed_ratio", "block_size": 16, "tolerance": 0.006}, {}),
    ({"offset": True}, {}),
    ({}, {"measure": "absmax"}),
    ({}, {"measure": "mae", "affine": "mae"}),
    ({}, {"descent": False}),
]


@pytest.mark.parametrize(("options", "steps"), FORMS, ids=[f"{o} {s}" for o, s in FORMS])
def test_less_error_than_rounded_to_nearest(options: dict[str, Any], steps: dict[str, Any]) -> None:
    loaded, plan = plan_of(**options)
    assert len(plan.points) >= 2
    nearest = SearchScales()(loaded, plan.model_copy(deep=True))
    rounded, _ = calibrate_weights(loaded, plan, SAMPLES, **steps)
    assert set(rounded.integers) == {node.name for node in rounded.quantized}
    assert rounded.points.keys() == plan.points.keys()
    for entry, (_, weight) in match_plan(loaded, rounded):
        series = node_series(weight, entry, rounded)  # refuses integers beyond a row's terms
        for i, term in enumerate(series.terms):
            if entry.name in plan.points:
                assert not term.q[plan.points[entry.name] <= i].any()
    with Trial(loaded, images(32, seed=6)) as trial:
        before, after = (trial(one)[0].energy.value for one in (nearest, rounded))
    assert after < before


def test_nearest_keeps_what_was_found() -> None:
    loaded, plan = plan_of()
    nearest = SearchScales()(loaded, plan.model_copy(deep=True))
    made, _ = calibrate_weights(
        loaded, plan, SAMPLES, rounding="nearest", measure="absmax", bias_correction=False
    )
    for entry, (_, weight) in match_plan(loaded, made):
        found, wanted = (node_series(weight, entry, one) for one in (made, nearest))
        np.testing.assert_allclose(found.dequantize(), wanted.dequantize(), rtol=0, atol=1e-6)


def test_factors_are_those_of_such_rounding() -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(4), with_points(bits(4, terms=2), 4), bits(4, terms=2)])
    found = rounding_factors(loaded, plan, table, SAMPLES)
    assert (found[:, 1] < 1).all()


def test_weight_bits_are_those_that_are_stored() -> None:
    one, two = (
        onnxq.quantize(classifier(), weight_bits=4, terms=terms, activations="none", offset="off")
        for terms in (1, 2)
    )
    some = onnxq.quantize(classifier(), points="11%", activations="none", offset="off")
    share = float((some.plan.points["fc1"] > 1).mean())
    low, high = one.report.weight_bits, two.report.weight_bits
    assert 0 < share < 1 and low < some.report.weight_bits < high
    assert any("1 to 2 terms of 4 bits" in kind for kind in some.report.kinds)
