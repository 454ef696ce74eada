"""What a model holds: candidate nodes and what would be done, or the terms that are there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict

from onnxq.model import Model, get_metadata, graphs, is_constant, load
from onnxq.options import Options
from onnxq.passes import SelectNodes
from onnxq.pipeline import canonicalize
from onnxq.plan import NodePlan
from onnxq.report import describe

_MARKS = {"onnxq.term", "onnxq.node", "onnxq.bits"}


class Candidate(BaseModel):
    """A node with a weight: what would be done to it, or why it would be left alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    op_type: str
    shape: tuple[int, ...]
    action: str
    reason: str | None


class QuantizedNode(BaseModel):
    """A node that onnxq has rewritten."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    op_type: str
    terms: int
    bits: int
    layout: str
    activations: str
    activation_terms: int


class Inspection(BaseModel):
    """Everything `onnxq inspect` shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opset: int
    nodes: int
    quantized: tuple[QuantizedNode, ...]
    candidates: tuple[Candidate, ...]


def inspect(
    model: str | os.PathLike[str] | onnx.ModelProto, select: SelectNodes | None = None
) -> Inspection:
    """Look at a model without changing it.

    Args:
        model: path or model in memory.
        select: the planning options to show; the defaults of `quantize` if not given.

    Raises:
        ModelError: the model cannot be read.
    """
    loaded = load(model if isinstance(model, onnx.ModelProto) else Path(model))
    opset, nodes = loaded.opset, sum(len(graph.nodes) for _, graph in graphs(loaded))
    quantized = tuple(_quantized(loaded))
    canonicalize(loaded)
    plan = (select or Options().select())(loaded)
    return Inspection(
        opset=opset,
        nodes=nodes,
        quantized=quantized,
        candidates=tuple(
            _candidate(node) for node in plan.nodes if node.reason != "already quantized by onnxq"
        ),
    )


def _candidate(node: NodePlan) -> Candidate:
    return Candidate(
        name=node.name,
        op_type=node.op_type,
        shape=node.shape,
        action="left in float" if node.reason else describe(node).partition(": ")[2],
        reason=node.reason or node.note,
    )


def _quantized(model: Model) -> Iterable[QuantizedNode]:
    basis: dict[str, list[gs.Node]] = {}
    for _, graph in graphs(model):
        for node in graph.nodes:
            metadata = get_metadata(node)
            if metadata.keys() >= _MARKS and metadata["onnxq.bits"].isdecimal():
                basis.setdefault(metadata["onnxq.node"], []).append(node)
    for name, nodes in basis.items():
        metadata = get_metadata(nodes[0])
        labels = {get_metadata(node)["onnxq.term"] for node in nodes}
        merged = metadata["onnxq.term"].split("+")
        factors = {get_metadata(node).get("onnxq.activation_term", "0") for node in nodes}
        yield QuantizedNode(
            name=name,
            op_type=nodes[0].op.removesuffix("Integer"),
            terms=max(len(labels), len(merged)),
            bits=int(metadata["onnxq.bits"]),
            layout="merged" if len(merged) > 1 else "parallel",
            activations=_activations(nodes[0]),
            activation_terms=len(factors),
        )


def _activations(basis: gs.Node) -> str:
    read = basis.inputs[0].inputs
    if basis.op.endswith("Integer"):
        known = bool(read) and read[0].op == "QuantizeLinear" and is_constant(read[0].inputs[1])
        return "static" if known else "dynamic"
    return "static" if read and read[0].op == "DequantizeLinear" else "none"
