"""Operators that onnxruntime runs on 8-bit tensors when Q/DQ pairs stand around them.

Measured with onnxruntime 1.31 (tests/passes/test_insert_qdq.py looks at the optimized graph). Not
in the table, because they stay float between DequantizeLinear and QuantizeLinear there: Sub, Div,
Max, Sum, HardSwish, Tanh, Gelu, PRelu, GlobalMaxPool, ReduceMean, SpaceToDepth,
Resize other than nearest, and every elementwise operator with a float constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, is_constant, values
from onnxq.passes.edit import consumers, is_graph_output


@dataclass(frozen=True)
class IntegerOp:
    """How an operator computes on 8-bit tensors.

    Attributes:
        kernel: what stands in onnxruntime's optimized graph.
        keeps: the output holds only values of its input, so that both have one scale and zero
            point; onnxruntime then drops the pairs around the operator.
        every: all inputs are 8-bit tensors, not the first alone.
        plain: onnxruntime keeps it in float between pairs, but has a kernel for 8-bit tensors, so
            that the operator itself stands between QuantizeLinear and DequantizeLinear.
        fits: whether the kernel takes this node.
    """

    kernel: str
    keeps: bool = False
    every: bool = False
    plain: bool = False
    fits: Callable[[gs.Node], bool] = lambda _node: True


def _one_output(node: gs.Node) -> bool:
    return len([t for t in node.outputs if t.name]) == 1


def _nearest(node: gs.Node) -> bool:
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return False  # it adds a value of its own
    return str(node.attrs.get("mode", "nearest")) == "nearest"


def _two(node: gs.Node) -> bool:
    return len(node.inputs) == 2 and node.inputs[0] is not node.inputs[1]


def _pads_zero(node: gs.Node) -> bool:
    """Whether what a Pad adds is known to be 0, which is the zero point; or is not constant."""
    if node.attrs.get("mode", "constant") != "constant":
        return True
    if len(node.inputs) > 2 and node.inputs[2].name:
        return is_constant(node.inputs[2]) and not values(node.inputs[2]).any()
    return not node.attrs.get("value", 0)


def _rises(node: gs.Node) -> bool:
    alpha, beta = hard_sigmoid(node)
    return alpha > 0 and beta >= 0


def hard_sigmoid(node: gs.Node) -> tuple[float, float]:
    """(alpha, beta) of max(0, min(1, alpha·x + beta))."""
    return float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))


def _plain_average(node: gs.Node) -> bool:
    """QLinearAveragePool knows neither dilations nor more than two dimensions of space."""
    return len(node.attrs.get("kernel_shape", ())) <= 2 and "dilations" not in node.attrs


INTEGER_OPS: Mapping[str, IntegerOp] = {
    "MaxPool": IntegerOp("MaxPool", keeps=True, fits=_one_output),
    "Reshape": IntegerOp("Reshape", keeps=True),
    "Flatten": IntegerOp("Flatten", keeps=True),
    "Squeeze": IntegerOp("Squeeze", keeps=True),
    "Unsqueeze": IntegerOp("Unsqueeze", keeps=True),
    "Transpose": IntegerOp("Transpose", keeps=True),
    "DepthToSpace": IntegerOp("DepthToSpace", keeps=True),
    "Slice": IntegerOp("Slice", keeps=True),
    "Split": IntegerOp("Split", keeps=True),
    "Gather": IntegerOp("Gather", keeps=True),
    "Resize": IntegerOp("Resize", keeps=True, fits=_nearest),
    "Pad": IntegerOp("Pad", keeps=True, plain=True, fits=_pads_zero),
    "Add": IntegerOp("QLinearAdd", every=True, fits=_two),
    "Mul": IntegerOp("QLinearMul", every=True, fits=_two),
    "Concat": IntegerOp("QLinearConcat", every=True),
    "AveragePool": IntegerOp("QLinearAveragePool", fits=_plain_average),
    "GlobalAveragePool": IntegerOp("QLinearGlobalAveragePool"),
    "LeakyRelu": IntegerOp("QLinearLeakyRelu"),
    # Both are written as LeakyRelu, which is a table of 256 entries there; see InsertQDQ.
    "Relu": IntegerOp("QLinearLeakyRelu"),
    "HardSigmoid": IntegerOp("QLinearLeakyRelu", fits=_rises),
    "Sigmoid": IntegerOp("QLinearSigmoid"),
    "Softmax": IntegerOp("QLinearSoftmax"),
}


def integer_op(node: gs.Node) -> IntegerOp | None:
    """The entry for a node, or None where it computes in float."""
    found = INTEGER_OPS.get(node.op)
    if found is None or node.domain not in (None, "", "ai.onnx") or not found.fits(node):
        return None
    if any(is_constant(t) for t in data_inputs(node, found)):
        return None
    return found


def data_inputs(node: gs.Node, op: IntegerOp) -> list[Any]:
    """The inputs that hold 8-bit values; the others are shapes, axes and indices."""
    return list(node.inputs) if op.every else [node.inputs[0]]


def activation_after(model: Model, tensor: Any) -> gs.Node | None:
    """The Relu or Clip that alone reads a tensor and keeps zero: saturation can stand in for it."""
    readers = consumers(tensor)
    if len(readers) != 1 or is_graph_output(model, tensor):
        return None
    bounds = activation_bounds(readers[0])
    return readers[0] if bounds is not None and bounds[0] <= 0 <= bounds[1] else None


def activation_bounds(node: gs.Node) -> tuple[float, float] | None:
    """(lowest, highest) output of a Relu or a Clip with constant bounds, else None."""
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op == "Relu":
        return 0.0, np.inf
    if node.op != "Clip":
        return None
    low = _bound(node, 1, "min", -np.inf)
    high = _bound(node, 2, "max", np.inf)
    return None if low is None or high is None else (low, high)


def _bound(node: gs.Node, slot: int, attribute: str, default: float) -> float | None:
    if attribute in node.attrs:  # before opset 11
        return float(node.attrs[attribute])
    if len(node.inputs) <= slot or not node.inputs[slot].name:
        return default
    tensor = node.inputs[slot]
    if tensor.inputs and tensor.inputs[0].op == "Constant":  # raising the opset makes some
        tensor = tensor.inputs[0].attrs.get("value", tensor)
    return float(values(tensor).item()) if is_constant(tensor) else None


def after_activation(model: Model, tensor: Any) -> Any:
    """The tensor that is quantized for what writes `tensor`: behind the Relu or Clip after it."""
    found = activation_after(model, tensor)
    return tensor if found is None else found.outputs[0]
