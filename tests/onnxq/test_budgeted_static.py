"""Bounds with static activations: each plan is tried with its ranges, as it will be written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from budgeting import classifier, images

from onnxq.budgeted import Budgeted
from onnxq.calibration import Calibration, open_calibration
from onnxq.feeds import Feed
from onnxq.meter import Measured, Meter
from onnxq.model import load, to_proto
from onnxq.options import Options
from onnxq.pipeline import Rewritten, rewrite
from onnxq.session import input_specs, open_session, run
from onnxq.tolerance import Tolerance

FLOAT = classifier()


def silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""


def samples(count: int = 24) -> Calibration:
    data = {"x": np.concatenate([feed["x"] for feed in images(count)])}
    return open_calibration(data, input_specs(open_session(FLOAT.SerializeToString())))


def chosen(**options: object) -> Rewritten:
    made = Options(activations="static", **options)  # type: ignore[arg-type]
    choose = Budgeted(made, samples(), len(FLOAT.SerializeToString()), silent)
    return rewrite(load(FLOAT), made.select(calibrated=True), None, silent, choose=choose)


def judged(proto: onnx.ModelProto, feeds: list[Feed]) -> Measured:
    sessions = [open_session(one.SerializeToString()) for one in (FLOAT, proto)]
    meter = Meter()
    for feed in feeds:
        meter.add(*(run(session, feed) for session in sessions))
    return meter.measured()


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_a_tolerance_is_kept_with_static_activations(effort: str) -> None:
    found = chosen(tolerance="error=10%", effort=effort)
    proto = to_proto(found.model)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    assert found.plan.ranges
    assert any(node.activations == "static" for node in found.plan.quantized)
    assert all(node.granularity == "per_channel" for node in found.plan.quantized)
    unseen = judged(proto, images(100, seed=77)).energy
    # kept at a standard error above the mean of six; the truth is within three of the mean, whose
    # own standard error is that of 100 times (100 / 6)**0.5
    limit = Tolerance.parse("error=10%").limit
    assert unseen.value <= limit + (2 * (100 / 6) ** 0.5 + 3) * unseen.spread


def test_ranges_are_those_of_all_samples() -> None:
    found = chosen(tolerance="error=10%")
    x = np.concatenate([feed["x"] for feed in images(24)])
    rmin, rmax = found.plan.ranges["x"]
    assert rmin <= x.min() and rmax >= x.max()


def test_a_size_is_kept_with_static_activations() -> None:
    larger, smaller = (
        len(to_proto(chosen(max_size=size, effort="fast").model).SerializeToString())
        for size in ("0.35x", "0.25x")
    )
    assert smaller <= 0.25 * len(FLOAT.SerializeToString()) < larger
