"""Identity nodes go away; the names of the graph's own outputs stay."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.model import Model, graphs
from onnxq.passes.base import PassResult
from onnxq.passes.bypass import bypass, why_not_bypassed


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
                reason = why_not_bypassed(model, graph, node)
                if reason:
                    skipped[node.name] = reason
                    continue
                bypass(model, graph, node)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)
