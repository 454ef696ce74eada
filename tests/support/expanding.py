"""Run a small model through plan and expand, and look inside the result."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from small import run

from onnxq.kernels_ref import Series, realize
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import Expand, GemmToMatMul, SearchScales, SelectNodes, required_opset
from onnxq.pipeline import Rewritten, apply
from onnxq.plan import NodePlan, Plan

# Unit roundoff of float32: one operation changes its result by at most this fraction.
U32 = 2.0**-24


def expand(
    proto: onnx.ModelProto, plan: Plan | None = None, **options: Any
) -> tuple[onnx.ModelProto, Plan]:
    """The model with basis nodes, checked by onnx, and the plan that made it."""
    done = rewritten(proto, plan, **options)
    after = to_proto(done.model)
    onnx.checker.check_model(after, full_check=True)
    return after, done.plan


def rewritten(proto: onnx.ModelProto, plan: Plan | None = None, **options: Any) -> Rewritten:
    """What planning and expanding alone make of a model; the result is verified.

    Not the whole pipeline, whose folds would turn the operators under test into others; but Gemm
    is only known as MatMul + Add.
    """
    source = load(proto)
    apply(GemmToMatMul(), source)
    chosen = SelectNodes(**options)(source) if plan is None else plan
    chosen = SearchScales()(source, chosen)
    raised = raise_opset(source, required_opset(chosen))
    return Rewritten(raised, chosen, {"Expand": apply(Expand(chosen), raised)})


def gamma(count: int) -> float:
    """Relative error of `count` float32 roundings in a row (Higham's gamma)."""
    return count * U32 / (1 - count * U32)


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the bodies inside it."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found += nodes(body)
    return found


def names(proto: onnx.ModelProto) -> list[str]:
    """Node names, bodies included."""
    return [node.name for node in nodes(proto.graph)]


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node of that name."""
    return next(node for node in nodes(proto.graph) if node.name == name)


def metadata(found: onnx.NodeProto) -> dict[str, str]:
    """A node's metadata_props."""
    return {entry.key: entry.value for entry in found.metadata_props}


def basis_nodes(proto: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """The basis nodes of the original node `name`."""
    return [
        found
        for found in nodes(proto.graph)
        if metadata(found).get("onnxq.node") == name and "onnxq.term" in metadata(found)
    ]


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers of all graphs, by name."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for inner in nodes(proto.graph):
        for attribute in inner.attribute:
            for tensor in attribute.g.initializer:
                assert tensor.name not in found, f"{tensor.name} is stored twice"
                found[tensor.name] = tensor
    return found


def of_type(proto: onnx.ModelProto, *types: int) -> list[str]:
    """Names of the initializers of these element types."""
    return [name for name, t in initializers(proto).items() if t.data_type in types]


def with_outputs(
    proto: onnx.ModelProto, wanted: list[str], feed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Values of inner tensors; a constant's value if the name is one."""
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    given = [value.name for value in proto.graph.output]
    inner = [n for n in dict.fromkeys(wanted) if n not in constants and n not in (*given, *feed)]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    # unoptimised, since an exposed tensor would stop the fusions anyway
    found = dict(zip([*given, *inner], run(exposed, feed, optimize=False), strict=True))
    return {name: {**feed, **constants, **found}[name] for name in wanted}


def optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxruntime's default session runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def as_rows(weight: np.ndarray, *, out_last: bool) -> np.ndarray:
    """A weight as [output channels, inputs]: MatMul's [..., in, out], or Conv's [out, in, ...]."""
    if out_last:
        weight = np.swapaxes(weight, -1, -2)
        return np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]))
    return weight.reshape(weight.shape[0], -1)


def from_rows(rows: np.ndarray, shape: tuple[int, ...], *, out_last: bool) -> np.ndarray:
    """The inverse of `as_rows`."""
    if out_last:
        return np.swapaxes(rows.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)
    return rows.reshape(shape)


def series_of(entry: NodePlan, plan: Plan, weight: np.ndarray, *, out_last: bool) -> Series:
    """The series that kernels_ref makes of a weight with the plan's scales, as rows."""
    return realize(
        entry.series,
        as_rows(weight, out_last=out_last),
        plan.scales[entry.name],
        bits=entry.bits,
        granularity=entry.matrix_granularity(),
    )
