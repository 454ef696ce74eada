"""Constant nodes become initializers, so that later passes see one kind of constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, constant, graphs, renamed
from onnxq.passes.base import PassResult
from onnxq.passes.edit import consumers, is_graph_output, remove_node, replace_input

_SCALAR_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


@dataclass(frozen=True)
class ConstantsToInitializers:
    """Turn Constant nodes into initializers of the same name.

    Given:   Constant(value=T) -> t
    Result:  initializer t
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op == "Constant"]:
                reason = self._reason(model, node)
                if reason:
                    skipped[node.name] = reason
                    continue
                self._rewrite(graph, node)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)

    def _reason(self, model: Model, node: gs.Node) -> str | None:
        if is_graph_output(model, node.outputs[0]):
            return "its output is an output of the graph"
        if "value" not in node.attrs and not set(node.attrs) & set(_SCALAR_DTYPES):
            return f"holds {', '.join(node.attrs) or 'nothing'}, not a dense numeric tensor"
        return None

    def _rewrite(self, graph: gs.Graph, node: gs.Node) -> None:
        old = node.outputs[0]
        new = _as_constant(node, old.name)
        for consumer in consumers(old):
            replace_input(consumer, old, new)
        remove_node(graph, node)


def _as_constant(node: gs.Node, name: str) -> Any:
    if "value" in node.attrs:
        return renamed(node.attrs["value"], name)
    key = next(key for key in _SCALAR_DTYPES if key in node.attrs)
    return constant(name, np.asarray(node.attrs[key], dtype=_SCALAR_DTYPES[key]))
