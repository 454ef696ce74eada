"""Plans of one node `op` whose terms cover a part of its weight, and what they must make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from expanding import as_rows, basis_nodes, initializers, with_outputs
from onnx import numpy_helper
from small import feeds

from onnxq.kernels_ref import Series
from onnxq.kernels_ref.partial import Coverage, realize_partial
from onnxq.plan import NodePlan, Plan

OUT = 8
SOME = np.array([1, 2, 1, 3, 1, 1, 2, 1], np.int8)


def rows_of(proto: onnx.ModelProto) -> np.ndarray:
    """The weight as [out, in]."""
    (op,) = proto.graph.node
    w = numpy_helper.to_array(initializers(proto)["w"])
    if op.op_type == "MatMul":
        return as_rows(w, out_last=True)
    if op.op_type == "ConvTranspose":
        split = w.reshape(2, 2, OUT // 2, 3, 3).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(split.reshape(OUT, -1))
    return as_rows(w, out_last=False)


def planned(proto: onnx.ModelProto, points: np.ndarray | None = None, **fields: Any) -> Plan:
    (op,) = proto.graph.node
    entry = NodePlan(
        name="op",
        op_type=op.op_type,
        weight="w",
        shape=tuple(initializers(proto)["w"].dims),
        **{"terms": 3, "series": "digit", "layout": "merged", **fields},
    )
    plan = Plan(nodes=[entry])
    if points is not None:
        plan.points["op"] = points
    return plan


def oracle(proto: onnx.ModelProto, plan: Plan) -> Series:
    entry = plan["op"]
    centre = None
    if entry.centre:
        taps = int(np.prod(entry.shape[2:]))
        centre = np.arange(entry.shape[1]) * taps + taps // 2
    return realize_partial(
        entry.series,
        rows_of(proto),
        plan.scales["op"],
        Coverage(plan.points.get("op"), centre, entry.offset),
        plan.offsets.get("op"),
        bits=entry.bits,
        granularity=entry.matrix_granularity(),
    )


def as_weight(proto: onnx.ModelProto, rows: np.ndarray) -> np.ndarray:
    """Rows [out, in] as the weight `w` of the only node of a model holds them."""
    (op,) = proto.graph.node
    shape = tuple(initializers(proto)["w"].dims)
    if op.op_type == "MatMul":
        return rows.T
    if op.op_type == "ConvTranspose":
        return rows.reshape(2, OUT // 2, 2, 3, 3).transpose(0, 2, 1, 3, 4).reshape(shape)
    return rows.reshape(shape)


def used_weights(proto: onnx.ModelProto, after: onnx.ModelProto) -> list[np.ndarray]:
    """What the basis nodes of `op` multiply by, in float compute."""
    found = [node.input[1] for node in basis_nodes(after, "op")]
    values = with_outputs(after, found, feeds(proto))
    return [values[name] for name in found]
