"""The tensor that is added to a node's output: what the node can make up for."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.model import Model, is_constant


def added_tensor(model: Model, node: gs.Node) -> str | None:
    """The activation that an Add behind a node of the main graph adds to its output, or None.

    Constants may be added before it. Nothing else may read what is between: then all that the node
    gets wrong is wrong in the sum alone, and the node does right to aim at the float model's sum.
    """
    ends = {id(tensor) for tensor in model.graph.outputs}
    here = node.outputs[0]
    while id(here) not in ends and len(here.outputs) == 1 and here.outputs[0].op == "Add":
        operands = [tensor for tensor in here.outputs[0].inputs if tensor is not here]
        if len(operands) != 1:  # x + x
            return None
        if not is_constant(operands[0]):
            return str(operands[0].name)
        here = here.outputs[0].outputs[0]
    return None
