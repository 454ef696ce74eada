"""Planning, first step: which nodes are quantized, how, and why the others are left alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import ConfigError, ModelError
from onnxq.kernels_ref import SeriesKind
from onnxq.model import Model, get_metadata, graphs, values
from onnxq.passes.weights import CANDIDATES, KIN, Weight, find_weight
from onnxq.plan import Activations, Layout, NodePlan, Plan


@dataclass(frozen=True)
class SelectNodes:
    """Make the plan of a model: an entry per node that has, or could have, a weight.

    Given:   Conv, MatMul, Gemm with a constant float32 weight
    Result:  a NodePlan with bits, terms, series, granularity, activations and layout, or a reason
    """

    bits: int = 4
    terms: int = 2
    series: SeriesKind | Literal["auto"] = "auto"
    block_size: int | None = None
    activations: Activations = "dynamic"
    layout: Layout = "parallel"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __call__(self, model: Model) -> Plan:
        """The plan; `model` is only read.

        Raises:
            ConfigError: a glob of include or exclude matches no node.
            ModelError: a weight has NaN or infinite values.
        """
        nodes = list(weighted_nodes(model))
        self._check_globs([node.name for node in nodes])
        return Plan(nodes=[self._plan_node(model, node) for node in nodes])

    def _check_globs(self, names: list[str]) -> None:
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    close = difflib.get_close_matches(glob, names, n=3, cutoff=0.4)
                    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
                    hint = hint or "see `onnxq inspect` for the names"
                    raise ConfigError(f"{option} {glob!r} matches no quantizable node; {hint}")

    def _plan_node(self, model: Model, node: gs.Node) -> NodePlan:
        found = find_weight(model, node) if node.op in CANDIDATES else _kin_reason(node)
        if isinstance(found, str):
            return NodePlan(name=node.name, op_type=node.op, reason=_already(node) or found)
        reason = self._unwanted(node.name)
        if not reason:
            check_finite(node, found)
        activations, note = self._activations(node, found)
        return NodePlan(
            name=node.name,
            op_type=node.op,
            weight=found.tensor.name,
            shape=found.shape,
            crc32=found.crc32(),
            reason=reason,
            note=note,
            bits=self.bits,
            terms=self.terms,
            series=self._series(activations),
            granularity="per_block" if self.block_size else "per_channel",
            block_size=self.block_size,
            activations=activations,
            layout=self.layout,
        )

    def _unwanted(self, name: str) -> str | None:
        for glob in self.exclude:
            if fnmatchcase(name, glob):
                return f"excluded by --exclude {glob}"
        if self.include and not any(fnmatchcase(name, glob) for glob in self.include):
            return "not matched by --include"
        return None

    def _activations(self, node: gs.Node, weight: Weight) -> tuple[Activations, str | None]:
        if self.activations == "none":
            return "none", None
        if node.op == "Conv" and node.attrs.get("group", 1) > 1 and weight.shape[1] == 1:
            return "none", "depthwise: float compute, since ConvInteger is slower than float here"
        if node.op == "Conv" and len(weight.shape) > 4:
            return "none", "3-D: float compute, since onnxruntime has no fast 3-D ConvInteger"
        if node.op == "MatMul" and len(weight.shape) > 2 and _is_vector(node.inputs[0]):
            return "none", "vector times batched weight: float compute, as scales do not broadcast"
        return self.activations, None

    def _series(self, activations: Activations) -> SeriesKind:
        if self.series != "auto":
            return self.series
        if self.layout == "merged" and activations == "dynamic" and self.terms > 1:
            return "digit"  # the only one whose terms can be summed as integers
        return default_series(self.terms)


def default_series(terms: int) -> SeriesKind:
    """The series used where the user does not choose; the measurements are in docs/numerics.md."""
    return "fixed_ratio" if terms == 1 else "digit"


def weighted_nodes(model: Model) -> Iterator[gs.Node]:
    """The nodes that have, or could have, weights, of all graphs, in graph order."""
    for _, graph in graphs(model):
        for node in graph.nodes:
            if node.op in CANDIDATES or node.op in KIN:
                yield node


def check_finite(node: gs.Node, weight: Weight) -> None:
    """Refuse a weight with NaN or Inf.

    Raises:
        ModelError: names node and tensor.
    """
    array = values(weight.tensor)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ModelError(
            f"weight {weight.tensor.name!r} of {node.op} {node.name!r} has {bad} NaN or infinite "
            f"values: repair the model, or leave the node alone with --exclude {node.name!r}"
        )


def _is_vector(tensor: Any) -> bool:
    return tensor.shape is not None and len(tensor.shape) == 1


def _kin_reason(node: gs.Node) -> str:
    return f"{node.op} is not quantized"


def _already(node: gs.Node) -> str | None:
    if "onnxq.term" in get_metadata(node):
        return "already quantized by onnxq"
    return None
