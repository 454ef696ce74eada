"""Which tensors cannot be negative, so that all 256 levels can go to the positive side."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.model import is_constant, values

_ALWAYS = {
    "Relu",
    "Sigmoid",
    "HardSigmoid",
    "Softmax",
    "Softplus",
    "Exp",
    "Abs",
    "Sqrt",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
}
# Operators whose output is not negative if their first input is not.
_FIRST = {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Gather",
    "Identity",
    "Dropout",
    "Expand",
    "Tile",
    "DepthToSpace",
    "SpaceToDepth",
    "ReduceMax",
    "ReduceMean",
    "ReduceSum",
}
_EVERY = {"Concat", "Add", "Mul", "Max", "Sum", "Mean", "Min"}


def is_nonnegative(tensor: Any, seen: dict[int, bool] | None = None) -> bool:
    """Whether every value of `tensor` is provably >= 0.

    MaxPool passes the property on, it does not make it: after a LeakyRelu it may be negative.
    """
    seen = {} if seen is None else seen
    if id(tensor) not in seen:
        seen[id(tensor)] = False  # a loop-carried tensor proves nothing about itself
        seen[id(tensor)] = _prove(tensor, seen)
    return seen[id(tensor)]


def _prove(tensor: Any, seen: dict[int, bool]) -> bool:
    array = _fixed(tensor)
    if array is not None:
        return array.dtype.kind in "fiu" and float(np.min(array, initial=0)) >= 0
    if not tensor.inputs:
        return False
    node = tensor.inputs[0]
    if node.domain not in (None, "", "ai.onnx"):
        return False
    if node.op in _ALWAYS:
        return True
    if node.op == "Clip":
        return _clip_minimum(node) >= 0
    if node.op == "Resize" and _only_interpolates(node):
        return is_nonnegative(node.inputs[0], seen)
    if node.op in _FIRST:
        return is_nonnegative(node.inputs[0], seen)
    if node.op in _EVERY:
        return all(is_nonnegative(t, seen) for t in node.inputs)
    return False


def _clip_minimum(node: Any) -> float:
    if "min" in node.attrs:  # opset 6
        return float(node.attrs["min"])
    bound = node.inputs[1] if len(node.inputs) > 1 else None
    array = None if bound is None or not bound.name else _fixed(bound)
    # some exporters write it as [1] instead of a scalar
    return -np.inf if array is None else float(np.min(array))


def _only_interpolates(node: Any) -> bool:
    outside = float(node.attrs.get("extrapolation_value", 0.0))
    return node.attrs.get("mode", "nearest") != "cubic" and outside >= 0


def _fixed(tensor: Any) -> Any:
    """The value of an initializer, or of a Constant node (raising the opset adds some), or None."""
    if is_constant(tensor):
        return values(tensor)
    if tensor.inputs and tensor.inputs[0].op == "Constant" and "value" in tensor.inputs[0].attrs:
        return values(tensor.inputs[0].attrs["value"])
    return None
