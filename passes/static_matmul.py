"""A static MatMul and the constant that is added to it.

onnxruntime fuses MatMul + Add to a float Gemm before it looks at Q/DQ pairs, whose weight is then
dequantized at every run. What it runs on integers:

| rank of x | written as                          | kernel                                  |
|-----------|-------------------------------------|-----------------------------------------|
| 2         | Gemm with an int32 bias             | QGemm, with or without a pair behind it |
| 3 or more | MatMul, Add with the bias as [1, N] | MatMulIntegerToFloat, Add               |

Whatever else is added to a product of rank 2 would be fused so as well: its output is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.model import Model, is_constant, values
from onnxq.passes.edit import consumers, is_graph_output
from onnxq.passes.ranks import Shape


def bias_add(model: Model, node: gs.Node) -> gs.Node | None:
    """The Add of one number, or of one per column, that alone reads a MatMul's output, or None."""
    add, output = sole_add(model, node), node.outputs[0]
    if add is None or len(add.inputs) != 2 or add.inputs[0] is add.inputs[1]:
        return None
    bias = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    if not is_constant(bias):
        return None
    array = values(bias)
    is_row = array.ndim > 0 and array.size == array.shape[-1] == _columns(node)
    return add if is_row or array.size == 1 else None


def sole_add(model: Model, node: gs.Node) -> gs.Node | None:
    """The Add that alone reads a MatMul's output, or None."""
    output = node.outputs[0]
    readers = consumers(output)
    if len(readers) != 1 or readers[0].op != "Add" or is_graph_output(model, output):
        return None
    return readers[0]


def _columns(node: gs.Node) -> int:
    weight = node.inputs[1]
    if not is_constant(weight):  # expanded: as many as there are scales
        weight = weight.inputs[0].inputs[1]
    return int(weight.shape[-1])


def is_gemm(model: Model, node: gs.Node, shapes: Mapping[str, Shape]) -> bool:
    """Whether a MatMul is written as Gemm: a matrix times a matrix plus a row."""
    add = bias_add(model, node)
    if add is None or len(shapes.get(node.inputs[0].name, ())) != 2:
        return False
    return bias_of(node, add).ndim <= 2


def bias_of(node: gs.Node, add: gs.Node) -> npt.NDArray[Any]:
    """The constant that `add` adds to the output of `node`."""
    return np.asarray(values(next(t for t in add.inputs if t is not node.outputs[0])))
