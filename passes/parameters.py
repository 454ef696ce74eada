"""Which inputs of an operator hold trained parameters."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

# Operator -> input positions.
_PARAMETERS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2, 3, 4),
    "PRelu": (1,),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "Gather": (0,),
    "Add": (0, 1),
    "Mul": (0, 1),
}


def parameter_slots(node: gs.Node) -> tuple[int, ...]:
    """The input positions of a node that may hold a trained parameter."""
    return _PARAMETERS.get(node.op, ())


def is_parameter(node: gs.Node, tensor: Any) -> bool:
    """Whether a node reads a tensor where parameters are read."""
    slots = parameter_slots(node)
    return any(i in slots for i, t in enumerate(node.inputs) if t is tensor)
