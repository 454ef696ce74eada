"""Run a small model through planning with samples, and the rest of static compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxq.calibration import open_calibration
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import Expand, GemmToMatMul, SearchScales, SelectNodes, required_opset
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.split_hard_swish import SplitHardSwish
from onnxq.pipeline import apply
from onnxq.plan import Plan
from onnxq.session import input_specs, open_session
from onnxq.static import plan_static

Feed = Mapping[str, np.ndarray]


def static(
    proto: onnx.ModelProto,
    samples: Sequence[Feed],
    plan: Plan | None = None,
    *,
    avoid_saturation: bool = True,
    **options: Any,
) -> tuple[onnx.ModelProto, Plan]:
    """The model in static compute, checked by onnx, and its plan; the pass is run twice."""
    source = load(proto)
    apply(GemmToMatMul(), source)
    apply(SplitHardSwish(), source)
    if plan is None:
        chosen = {"bits": 8, "terms": 1, "layout": "merged", **options}
        plan = SelectNodes(activations="static", **chosen)(source)
        plan = SearchScales()(source, plan)
        specs = input_specs(open_session(proto.SerializeToString(), threads=1))
        calibration = open_calibration(list(samples), specs)
        plan = plan_static(source, plan, calibration, avoid_saturation=avoid_saturation)
    model = raise_opset(source, max(13, required_opset(plan)))
    apply(Expand(plan), model)
    apply(InsertQDQ(plan), model)
    after = to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert not apply(InsertQDQ(plan), model).modified, "a second run is not a no-op"
    return after, plan
