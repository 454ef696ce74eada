"""Taking out a node whose output equals its first input."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.model import Model
from onnxq.passes.edit import consumers, is_graph_output, remove_node, replace_input


def why_not_bypassed(model: Model, graph: gs.Graph, node: gs.Node) -> str | None:
    """The reason why a node has to stay even though it does nothing, or None."""
    x, y = node.inputs[0], node.outputs[0]
    if not is_graph_output(model, y):
        return None
    if not x.inputs:
        return "connects an input or initializer directly to an output of the graph"
    if not any(x.inputs[0] is other for other in graph.nodes):
        return "its input comes from an outer graph"
    if is_graph_output(model, x):
        return "both its input and its output are outputs of the graph"
    return None


def bypass(model: Model, graph: gs.Graph, node: gs.Node) -> None:
    """Let the readers of the node's output read its input; an output of the graph keeps its name.

    Only for nodes for which `why_not_bypassed` is None.
    """
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
