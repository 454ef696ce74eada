"""What planning adds to a node's output joins its bias, so that it costs nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.model import Model, is_constant, values
from onnxq.passes.edit import Builder, consumers, is_graph_output

Array = npt.NDArray[Any]


def add_bias(
    model: Model, node: gs.Node, builder: Builder, delta: Array, shape: tuple[int, ...]
) -> None:
    """Add `delta` to the output of a node.

    Given:   conv1(x, W, b), or matmul1(x, W) with or without an Add of a constant behind it
    Result:  conv1(x, W, b + delta), or the Add with b + delta, or a new Add `<node>/correction`

    Args:
        model: names what leaves the graph.
        node: Conv, ConvTranspose or MatMul.
        builder: stands before `node`.
        delta: float32 [out].
        shape: in which delta broadcasts against the output.
    """
    if node.op != "MatMul":
        own = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if own is None:
            node.inputs = [*node.inputs[:2], builder.constant(f"{node.name}/bias", delta)]
            return
        if is_constant(own):
            total = (values(own) + delta).astype(np.float32)
            node.inputs[2] = builder.constant(f"{own.name}/corrected", total)
            return
    added = delta.reshape(shape)
    output = node.outputs[0]
    readers = consumers(output)
    if len(readers) == 1 and readers[0].op == "Add" and not is_graph_output(model, output):
        add = readers[0]
        slot = next((i for i, t in enumerate(add.inputs) if is_constant(t)), None)
        if slot is not None and _fits(values(add.inputs[slot]), added):
            total = (values(add.inputs[slot]) + added).astype(np.float32)
            add.inputs[slot] = builder.constant(f"{add.inputs[slot].name}/corrected", total)
            return
    product = builder.variable(f"{node.name}/uncorrected")
    node.outputs[0] = product
    builder.skip()
    correction = builder.constant(f"{node.name}/correction", added)
    builder.add("Add", f"{node.name}/correction", [product, correction], output=output)
    builder.back(2)


def _fits(bias: Array, delta: Array) -> bool:
    """Whether the sum has the bias's own shape: no rank or size of the output changes."""
    return bool(np.broadcast_shapes(bias.shape, delta.shape) == bias.shape)
