"""The weight of a Conv / MatMul / Gemm seen as a matrix [output channels, inputs per channel]."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.model import Model, is_constant, values

Array = npt.NDArray[Any]

CANDIDATES = ("Conv", "MatMul", "Gemm")
# Operators that hold weights as well; they are reported, so that nothing is skipped in silence.
KIN = (
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
    "Attention",
    "DeformConv",
    "Einsum",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulNBits",
)


@dataclass(frozen=True, eq=False)
class Weight:
    """One node's constant weight.

    Attributes:
        tensor: the constant, float32.
        out_last: whether output channels are the last axis ([..., in, out], MatMul's order) rather
            than the first ([out, in, ...], Conv's order).
    """

    tensor: Any
    out_last: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(int(d) for d in self.tensor.shape)

    @property
    def out(self) -> int:
        """Rows of the matrix: output channels (times leading axes of a batched MatMul)."""
        if self.out_last:
            return math.prod(self.shape) // self.shape[-2]
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    def matrix(self) -> Array:
        """The values as a contiguous matrix [out, in]."""
        return self.to_matrix(values(self.tensor))

    def to_matrix(self, array: Array) -> Array:
        """An array in the stored shape, as a contiguous matrix [out, in]."""
        if self.out_last:
            array = np.swapaxes(array, -1, -2)
            return np.ascontiguousarray(array.reshape(-1, array.shape[-1]))
        return np.ascontiguousarray(array.reshape(array.shape[0], -1))

    def from_matrix(self, matrix: Array) -> Array:
        """A matrix [out, in] in the stored shape."""
        if self.out_last:
            turned = (*self.shape[:-2], self.shape[-1], self.shape[-2])
            return np.ascontiguousarray(np.swapaxes(matrix.reshape(turned), -1, -2))
        return matrix.reshape(self.shape)

    def channel_shape(self) -> tuple[int, ...]:
        """The shape in which one value per output channel broadcasts against the weight."""
        if self.out_last:
            return (*self.shape[:-2], 1, self.shape[-1])
        return (self.shape[0], *(1 for _ in self.shape[1:]))

    def crc32(self) -> str:
        """Checksum of the stored values, as eight hexadecimal digits."""
        return f"{zlib.crc32(np.ascontiguousarray(values(self.tensor)).data):08x}"


def find_weight(model: Model, node: gs.Node) -> Weight | str:
    """The weight of a candidate node, or the reason why it cannot be quantized."""
    if node.domain not in (None, "", "ai.onnx"):
        return f"is an operator of domain {node.domain!r}, whose meaning is not known"
    from_left = node.op == "MatMul" and is_constant(node.inputs[0])
    tensor = node.inputs[1] if len(node.inputs) > 1 else None
    if tensor is None or not tensor.name:
        return "has no weight input"
    if tensor.name in model.overridable:
        return f"weight {tensor.name!r} is a graph input that can be overridden at run time"
    if not is_constant(tensor):
        return _why_not_constant(node, from_left=from_left)
    if from_left:
        return "both operands are constant"
    weight = Weight(tensor, out_last=_out_last(node))
    dtype = np.dtype(values(tensor).dtype)
    if dtype != np.float32:
        return f"weight {tensor.name!r} is {dtype.name}; only float32 is quantized"
    rank = len(weight.shape)
    if rank < 2 or (node.op == "Conv" and rank < 3):
        return f"weight {tensor.name!r} has rank {rank}"
    if weight.size == 0:
        return f"weight {tensor.name!r} is empty"
    return weight


def _out_last(node: gs.Node) -> bool:
    return node.op == "MatMul" or (node.op == "Gemm" and not node.attrs.get("transB", 0))


def _why_not_constant(node: gs.Node, *, from_left: bool) -> str:
    if from_left:
        return f"its constant {node.inputs[0].name!r} is the left operand"
    tensor = node.inputs[1]
    if not tensor.inputs:
        return f"weight {tensor.name!r} is an input of the graph"
    if node.op == "MatMul":
        return "no constant operand"
    producer = tensor.inputs[0]
    return f"weight {tensor.name!r} is computed by {producer.op} {producer.name!r}"
