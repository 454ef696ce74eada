"""Identity nodes go away; the names of the graph's own outputs stay."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxq.model import Model, graphs
from onnxq.passes.base import PassResult
from onnxq.passes.edit import consumers, is_graph_output, remove_node, replace_input


@dataclass(frozen=True)
class RemoveIdentity:
    """Let the readers of an Identity's output read its input.

    Given:   x -> Identity -> y
    Result:  x, or, where y is an output of the graph, x's producer writes y
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op == "Identity"]:
                reason = self._reason(model, graph, node)
                if reason:
                    skipped[node.name] = reason
                    continue
                self._rewrite(model, graph, node)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)

    def _reason(self, model: Model, graph: gs.Graph, node: gs.Node) -> str | None:
        x, y = node.inputs[0], node.outputs[0]
        if not is_graph_output(model, y):
            return None
        producers = x.inputs
        if not producers:
            return "connects an input or initializer directly to an output of the graph"
        if not any(producers[0] is other for other in graph.nodes):
            return "its input comes from an outer graph"
        if is_graph_output(model, x):
            return "both its input and its output are outputs of the graph"
        return None

    def _rewrite(self, model: Model, graph: gs.Graph, node: gs.Node) -> None:
        x, y = node.inputs[0], node.outputs[0]
        if not is_graph_output(model, y):
            for consumer in consumers(y):
                replace_input(consumer, y, x)
            remove_node(graph, node)
            return
        producer = x.inputs[0]
        slot = next(i for i, out in enumerate(producer.outputs) if out is x)
        remove_node(graph, node)
        for consumer in consumers(x):
            replace_input(consumer, x, y)
        producer.outputs[slot] = y
