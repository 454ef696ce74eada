"""Every node gets a unique name: plans, reports and Netron speak of nodes by name."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.model import Model, graphs
from onnxq.passes.base import PassResult


@dataclass(frozen=True)
class NameNodes:
    """Give unnamed nodes, and all but the first of several nodes of one name, a name.

    Given:   node without a name, or with another node's name
    Result:  the same node, named after its first output (an ONNX value name is unique)
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        seen: set[str] = set()
        taken = {node.name for _, graph in graphs(model) for node in graph.nodes}
        rewritten = []
        for _, graph in graphs(model):
            for node in graph.nodes:
                if not node.name or node.name in seen:
                    wanted = next((o.name for o in node.outputs if o.name), "") or node.op
                    name, count = wanted, 0
                    while name in taken:
                        count += 1
                        name = f"{wanted}_{count}"
                    taken.add(name)
                    node.name = name
                    rewritten.append(name)
                seen.add(node.name)
        return PassResult(tuple(rewritten))
