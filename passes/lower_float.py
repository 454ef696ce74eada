"""Float compute: the stored integers become float weights when onnxruntime loads the model."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from onnxq.model import set_metadata
from onnxq.passes.edit import Builder, remove_node
from onnxq.passes.stored_terms import StoredTerms
from onnxq.plan import NodePlan


def lower_float(
    graph: gs.Graph, node: gs.Node, stored: StoredTerms, plan: NodePlan, builder: Builder
) -> None:
    """Replace a node's weight by its series.

    Given:   conv1(x, W, b)
    Result:  parallel: conv1/term0(x, W0, b), conv1/term1(x, W1), …, Adds up to conv1/sum
             merged (or one term): conv1(x, W0 + W1 + …, b)
    """
    count = len(stored.series.terms)
    if plan.layout == "merged" or count == 1:
        node.inputs[1] = stored.float_weight(builder, tuple(range(count)))
        terms = "+".join(str(i) for i in range(count))
        set_metadata(node, {"onnxq.pass": "expand", **basis_metadata(plan, terms)})
        return
    bias = list(node.inputs[2:])
    outputs = []
    for i in range(count):
        weight = stored.float_weight(builder, (i,))
        # The bias is added once, where it costs nothing: by the first basis node.
        inputs = [node.inputs[0], weight, *(bias if i == 0 else [])]
        outputs.append(
            builder.add(
                node.op,
                f"{node.name}/term{i}",
                inputs,
                attrs=node.attrs,
                metadata=basis_metadata(plan, str(i)),
            )
        )
    final = node.outputs[0]
    remove_node(graph, node)
    add_terms(builder, plan, outputs, final)


def add_terms(builder: Builder, plan: NodePlan, outputs: list[Any], final: Any) -> None:
    """Sum the basis nodes' outputs with Add nodes; the last one writes `final`."""
    total = outputs[0]
    for i, output in enumerate(outputs[1:], start=1):
        last = i == len(outputs) - 1
        total = builder.add(
            "Add",
            f"{plan.name}/sum" if last else f"{plan.name}/sum{i}",
            [total, output],
            output=final if last else None,
            metadata={"onnxq.node": plan.name},
        )


def basis_metadata(plan: NodePlan, term: str) -> dict[str, str]:
    """What a basis node says of itself, for Netron and `onnxq inspect`."""
    return {"onnxq.node": plan.name, "onnxq.term": term, "onnxq.bits": str(plan.bits)}
