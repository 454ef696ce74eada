"""A float model whose nodes read a series of their activation instead of it, one unit at a time.

Which unit, and which series, is said by two inputs, so that all are run in one session. A node that
reads its activation as it is pays for a copy of it, no more: onnxruntime runs one branch of an If.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from onnx import ModelProto

from onnxq.kernels_ref.activation_series import first_step, residual_step
from onnxq.kernels_ref.products import kept_products
from onnxq.model import Model, graphs, load, raise_opset, to_proto
from onnxq.passes.edit import Builder, Names
from onnxq.passes.quantize_activations import ActivationQuantizer
from onnxq.plan import NodePlan

NO_UNIT = -1
_OPSET = 13  # DequantizeLinear, and what raises a model for dynamic compute


class ActivationMode(NamedTuple):
    """What a node reads instead of its activation: see `kernels_ref.activation_series`.

    Attributes:
        bits, terms: of the series.
        columns: of the last axis, which are not quantized.
    """

    bits: int
    terms: int
    columns: tuple[int, ...] = ()

    @property
    def step(self) -> float:
        """The last term's scale for a range of width 1: what is left is within half of it."""
        rest = float(residual_step(self.bits)) ** (self.terms - 1)
        return float(first_step(self.bits)) * rest


# Of each of some nodes; None for one that reads its activation as it is.
Modes = tuple[ActivationMode | None, ...]


class SwitchedUnit(NamedTuple):
    """Names of nodes of a float model that are switched together, and what they may read."""

    nodes: tuple[str, ...]
    modes: tuple[Modes, ...]


@dataclass(frozen=True, eq=False)
class SwitchedModel:
    """A model with two more inputs, int64 scalars.

    Attributes:
        proto: the model.
        unit: name of the input that says which unit is switched, from 0; NO_UNIT for none.
        mode: name of the input that says to which of its modes, from 0.
    """

    proto: ModelProto
    unit: str
    mode: str


def activation_mode(entry: NodePlan) -> ActivationMode | None:
    """What dynamic compute makes of the node's activation; None if it does not quantize it.

    Terms that meet no product with the weight's first term are not counted.
    """
    if not entry.quantized or entry.activations != "dynamic":
        return None
    terms = sum(weight == 0 for weight, _ in products_of(entry))
    return ActivationMode(entry.activation_bits, terms, entry.outliers)


def products_of(entry: NodePlan) -> tuple[tuple[int, int], ...]:
    """The pairs (weight term, activation term) that dynamic compute multiplies."""
    return kept_products(
        1 if entry.layout == "merged" else entry.terms,
        entry.activation_terms,
        entry.products,
        weight_bits=entry.bits,
        activation_bits=entry.activation_bits,
    )


def switch_activations(proto: ModelProto, units: Sequence[SwitchedUnit]) -> SwitchedModel:
    """Let the nodes of each unit read what the inputs `unit` and `mode` say.

    Given:   Conv(x, W)
    Result:  Conv(If(unit == u, Σ dequantized terms of x, x), W)

    The series is the one that dynamic compute makes, by the same nodes. It is uint8 for all, as
    int8 has the same levels.

    Args:
        proto: a float model, which may read its weights from inputs; it is used up.
        units: nodes with names of their own, Conv or MatMul, that read the activation first.

    Raises:
        ModelError: the opset cannot be raised.
    """
    model = raise_opset(load(proto), _OPSET)
    names = Names(model)
    unit, mode = (
        gs.Variable(names.tensor(f"onnxq/{what}"), dtype=np.int64, shape=[])
        for what in ("unit", "mode")
    )
    model.graph.inputs.extend([unit, mode])
    places = {node.name: (graph, node) for _, graph in graphs(model) for node in graph.nodes}
    switcher = _Switcher(model, names, unit, mode)
    for index, one in enumerate(units):
        for i, name in enumerate(one.nodes):
            modes = [mode[i] for mode in one.modes]
            if any(modes):
                switcher.switch(*places[name], index, modes)
    return SwitchedModel(to_proto(model), unit.name, mode.name)


@dataclass(frozen=True, eq=False)
class _Switcher:
    model: Model
    names: Names
    unit: gs.Variable
    mode: gs.Variable

    def switch(
        self, graph: gs.Graph, node: gs.Node, unit: int, modes: Sequence[ActivationMode | None]
    ) -> None:
        base = f"{node.name}/switch"
        builder = Builder(graph, node, self.names, "switch_activations")
        switched = builder.add("Equal", f"{base}/on", [self.unit, builder.scalar(np.int64(unit))])
        exact = self._series(node, f"{base}/exact", None)
        branches = {"then_branch": self._choice(node, base, 0, modes), "else_branch": exact}
        node.inputs[0] = builder.add("If", base, [switched], attrs=branches)

    def _choice(
        self, node: gs.Node, base: str, index: int, modes: Sequence[ActivationMode | None]
    ) -> gs.Graph:
        """The body that reads mode `index` if `mode` says so, else one of those after it."""
        series = self._series(node, f"{base}/mode{index}", modes[index])
        if index == len(modes) - 1:
            return series
        graph, end = self._body(f"{base}/from{index}")
        builder = Builder(graph, end, self.names, "switch_activations")
        name = f"{base}/is{index}"
        this = builder.add("Equal", name, [self.mode, builder.scalar(np.int64(index))])
        others = self._choice(node, base, index + 1, modes)
        branches = {"then_branch": series, "else_branch": others}
        end.inputs.append(builder.add("If", f"{base}/choice{index}", [this], attrs=branches))
        return graph

    def _series(self, node: gs.Node, name: str, mode: ActivationMode | None) -> gs.Graph:
        """The body that makes the series and sums it up; or hands on what is there."""
        graph, end = self._body(name)
        if mode is None:
            end.inputs.append(node.inputs[0])
            return graph
        builder = Builder(graph, end, self.names, "switch_activations")
        source, parts = node.inputs[0], []
        if mode.columns:
            taken = np.zeros(node.inputs[1].shape[0], np.float32)
            taken[list(mode.columns)] = 1
            few = builder.constant(f"{name}/columns", taken)
            parts.append(builder.add("Mul", f"{name}/few", [source, few]))
            others = builder.constant(f"{name}/mask", 1 - taken)
            source = builder.add("Mul", f"{name}/others", [source, others])
        quantizer = ActivationQuantizer()
        for term in range(mode.terms):
            made = quantizer.term(builder, source, "uint8", mode.bits, term)
            parts.append(builder.add("DequantizeLinear", f"{name}/term{term}", list(made)))
        end.inputs.append(builder.add("Sum", f"{name}/sum", parts))
        return graph

    def _body(self, name: str) -> tuple[gs.Graph, gs.Node]:
        """A graph with one output, and the node that writes it, whose input is still to come."""
        output = gs.Variable(self.names.tensor(f"{name}/output"), dtype=np.float32)
        end = gs.Node("Identity", self.names.node(f"{name}/output"), outputs=[output])
        graph = gs.Graph(nodes=[end], outputs=[output], name=name, opset=self.model.opset)
        return graph, end
