"""Everything a lowering needs to know about the node it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from onnxq.passes.edit import Builder, remove_node
from onnxq.passes.stored_terms import StoredTerms
from onnxq.plan import NodePlan


@dataclass(frozen=True, eq=False)
class Site:
    """A node to be replaced, the terms of its weight, and its plan."""

    graph: gs.Graph
    node: gs.Node
    stored: StoredTerms
    plan: NodePlan
    builder: Builder

    @property
    def name(self) -> str:
        """The original node's name, which the new nodes' names extend."""
        return self.plan.name

    def remove(self) -> Any:
        """Take the node out and return its output tensor, for a new node to write."""
        output = self.node.outputs[0]
        remove_node(self.graph, self.node)
        return output

    def sum(self, outputs: list[Any], final: Any) -> None:
        """Add up the basis nodes' outputs; the last Add, `<node>/sum`, writes `final`."""
        total = outputs[0]
        for i, output in enumerate(outputs[1:], start=1):
            last = i == len(outputs) - 1
            total = self.builder.add(
                "Add",
                f"{self.name}/sum" if last else f"{self.name}/sum{i}",
                [total, output],
                output=final if last else None,
                metadata={"onnxq.node": self.name},
            )

    def basis_metadata(self, indices: tuple[int, ...]) -> dict[str, str]:
        """What a basis node says of itself, for Netron and `onnxq inspect`."""
        return {
            "onnxq.node": self.name,
            "onnxq.term": "+".join(map(str, indices)),
            "onnxq.bits": str(self.plan.bits),
        }
