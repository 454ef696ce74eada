"""Planning, first step: which nodes are quantized, how, and why the others are left alone."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import onnx_graphsurgeon as gs

from onnxq.errors import ConfigError
from onnxq.kernels_ref import SeriesKind
from onnxq.model import Model, get_metadata
from onnxq.passes.gains import Gains
from onnxq.passes.lower_nbits import reason_against_nbits
from onnxq.passes.weights import LINEAR, Candidate, Weight, candidates, check_finite
from onnxq.plan import (
    Activations,
    ActivationType,
    Layout,
    NodePlan,
    Packing,
    Plan,
    Target,
    WeightForm,
)


@dataclass(frozen=True)
class SelectNodes:
    """Make the plan of a model: an entry per node that has, or could have, a weight.

    Activations "auto" are dynamic where the target gains by it (passes/gains.py), else none; layout
    "auto" is parallel for dynamic activations, else merged.

    Given:   Conv, ConvTranspose, MatMul, LSTM, GRU, RNN, and with `embeddings` Gather, whose
             weights are constant and float32
    Result:  a NodePlan with bits, terms, series, granularity, activations and layout, or a reason
    """

    bits: int = 4
    terms: int = 2
    series: SeriesKind | Literal["auto"] = "auto"
    block_size: int | None = None
    activations: Activations | Literal["auto"] = "dynamic"
    layout: Layout | Literal["auto"] = "parallel"
    packing: Packing = "int4"
    conv_activations: ActivationType = "int8"
    target: Target = "cpu-avx2"
    activation_bits: int = 8
    activation_terms: int = 1
    products: Literal["all", "triangular"] | int = "triangular"
    matmul: Literal["auto", "folded", "nbits"] = "auto"
    fuses_nbits: bool = True
    offset: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False

    def __call__(self, model: Model) -> Plan:
        """The plan; `model` is only read.

        Raises:
            ConfigError: a glob of include or exclude matches no node.
            ModelError: a weight has NaN or infinite values.
        """
        found = list(candidates(model, embeddings=self.embeddings))
        self._check_globs([candidate.name for candidate in found])
        gains = Gains.of(found, self.target)
        return Plan(nodes=[self._plan_node(candidate, gains) for candidate in found])

    def _check_globs(self, names: list[str]) -> None:
        for option, globs in (("--include", self.include), ("--exclude", self.exclude)):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    close = difflib.get_close_matches(glob, names, n=3, cutoff=0.4)
                    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
                    hint = hint or "see `onnxq inspect` for the names"
                    raise ConfigError(f"{option} {glob!r} matches no quantizable node; {hint}")

    def _plan_node(self, candidate: Candidate, gains: Gains) -> NodePlan:
        name, node, found = candidate.name, candidate.node, candidate.found
        if isinstance(found, str):
            return NodePlan(name=name, op_type=node.op, reason=_already(node) or found)
        reason = self._unwanted(name)
        if not reason:
            check_finite(name, node, found)
        activations, note = self._activations(candidate, found, gains)
        layout = self._layout(node, activations)
        form, refused = self._form(node, found, activations, layout)
        return NodePlan(
            name=name,
            op_type=node.op,
            weight=found.tensor.name,
            shape=found.shape,
            crc32=found.crc32(),
            reason=reason,
            note=note or refused,
            bits=self.bits,
            terms=self.terms,
            series=self._series(activations, layout),
            granularity="per_block" if self.block_size else "per_channel",
            block_size=self.block_size,
            activations=activations,
            packing=self.packing,
            conv_activations=self.conv_activations,
            target=self.target,
            form=form,
            offset=self._offset(node, activations) and form == "folded",
            **self._activation_terms(activations),
            layout=layout,
        )

    def _unwanted(self, name: str) -> str | None:
        for glob in self.exclude:
            if fnmatchcase(name, glob):
                return f"excluded by --exclude {glob}"
        if self.include and not any(fnmatchcase(name, glob) for glob in self.include):
            return "not matched by --include"
        return None

    def _activations(
        self, candidate: Candidate, weight: Weight, gains: Gains
    ) -> tuple[Activations, str | None]:
        node = candidate.node
        if self.activations == "none":
            return "none", None
        if node.op not in ("Conv", "MatMul"):
            return "none", f"{node.op}: float compute"
        if weight.slot == 0:
            return "none", "constant left operand: float compute"
        if self.activations == "auto" and (reason := gains.why_float(node.op, weight)):
            return "none", reason
        if self.activations == "static" and candidate.inner:
            return "none", "inside a body: float compute, since its tensors are not calibrated"
        if self._has_products and _is_depthwise(node, weight):
            return "none", "depthwise: float compute, since ConvInteger is slower than float here"
        if self._has_products and node.op == "Conv" and len(weight.shape) > 4:
            return "none", "3-D: float compute, since onnxruntime has no fast 3-D ConvInteger"
        if node.op == "MatMul" and len(weight.shape) > 2 and _is_vector(node.inputs[0]):
            return "none", "vector times batched weight: float compute, as scales do not broadcast"
        return "dynamic" if self.activations == "auto" else self.activations, None

    @property
    def _has_products(self) -> bool:
        """Whether integer nodes are ConvInteger and MatMulInteger."""
        return self.activations in ("auto", "dynamic") or self.activation_terms > 1

    def _layout(self, node: gs.Node, activations: Activations) -> Layout:
        if node.op not in LINEAR:
            return "merged"
        if self.layout != "auto":
            return self.layout
        return "parallel" if activations == "dynamic" else "merged"

    def _offset(self, node: gs.Node, activations: Activations) -> bool:
        """Whether there is an offset: in float compute only, where that is chosen per node."""
        wanted = self.offset and node.op != "Gather"
        return wanted and (self.activations != "auto" or activations == "none")

    def _form(
        self, node: gs.Node, weight: Weight, activations: Activations, layout: Layout
    ) -> tuple[WeightForm, str | None]:
        """How a weight computed in float reaches its kernel; why not as nbits, if asked for."""
        if node.op != "MatMul" or activations != "none" or self.matmul == "folded":
            return "folded", None
        reason = reason_against_nbits(
            node,
            weight,
            terms=self.terms,
            block_size=self.block_size,
            merged=layout == "merged",
        )
        if reason is None and not self.fuses_nbits:
            reason = "onnxruntime before 1.25 may dequantize it at every run"
        if self.matmul == "nbits":
            return ("folded", f"folded to float: {reason}") if reason else ("nbits", None)
        return ("nbits" if reason is None and self._nbits_is_fast() else "folded"), None

    def _nbits_is_fast(self) -> bool:
        """Whether nbits costs next to no time (measured: benchmarks/matmul_forms.py)."""
        shortest = 128 if self.target == "cpu-avx2" else 32
        return (
            self.bits <= 4
            and self.terms == 1
            and self.block_size is not None
            and self.block_size % 32 == 0
            and self.block_size >= shortest
        )

    def _activation_terms(self, activations: Activations) -> dict[str, Any]:
        if activations == "none":
            return {}
        return {
            "activation_bits": self.activation_bits,
            "activation_terms": self.activation_terms,
            "products": self.products,
        }

    def _series(self, activations: Activations, layout: Layout) -> SeriesKind:
        if self.series != "auto":
            return self.series
        if layout == "merged" and activations != "none" and self.terms > 1:
            return "digit"  # the only one whose terms can be summed as integers
        return default_series(self.terms)


def default_series(terms: int) -> SeriesKind:
    """The series used where the user does not choose; the measurements are in docs/numerics.md."""
    return "fixed_ratio" if terms == 1 else "digit"


def _already(node: gs.Node) -> str | None:
    metadata = get_metadata(node)
    if "onnxq.term" in metadata or metadata.get("onnxq.pass") == "expand":
        return "already quantized by onnxq"
    return None


def _is_depthwise(node: gs.Node, weight: Weight) -> bool:
    return bool(node.op == "Conv" and node.attrs.get("group", 1) > 1 and weight.shape[1] == 1)


def _is_vector(tensor: Any) -> bool:
    return tensor.shape is not None and len(tensor.shape) == 1
