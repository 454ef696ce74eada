"""The weights of a node, each seen as a matrix [output channels, inputs per output channel]."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.errors import ModelError
from onnxq.model import Model, graphs, is_constant, values

Array = npt.NDArray[Any]

# Linear in the weight: terms can stand as parallel nodes whose outputs are added.
LINEAR = ("Conv", "ConvTranspose", "MatMul")
# Not linear in the weight: its terms are summed before the node reads it.
RECURRENT = ("LSTM", "GRU", "RNN")
# Operators that hold weights too but are not quantized; reported, so that nothing is skipped in
# silence.
_OTHERS = (
    "Gemm",
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
    """One constant weight of a node.

    Attributes:
        tensor: the constant, float32.
        slot: the input of the node that reads it.
        split: the stored shape, reshaped so that output channels are whole axes.
        out_axes: those axes.
    """

    tensor: Any
    slot: int
    split: tuple[int, ...]
    out_axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(int(d) for d in self.tensor.shape)

    @property
    def in_axes(self) -> tuple[int, ...]:
        """The axes of `split` that are summed over."""
        return tuple(axis for axis in range(len(self.split)) if axis not in self.out_axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation of `split` that brings the output channels to the front."""
        return (*self.out_axes, *self.in_axes)

    @property
    def out(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.split[axis] for axis in self.out_axes)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    def matrix(self) -> Array:
        """The values as a contiguous matrix [out, in]."""
        turned = values(self.tensor).reshape(self.split).transpose(self.order)
        return np.ascontiguousarray(turned.reshape(self.out, -1))

    def from_matrix(self, matrix: Array) -> Array:
        """A matrix [out, in] in the shape of `split`."""
        turned = matrix.reshape([self.split[axis] for axis in self.order])
        return np.ascontiguousarray(turned.transpose(np.argsort(self.order)))

    def channel_shape(self) -> tuple[int, ...]:
        """The shape in which one value per output channel broadcasts against `split`."""
        return tuple(d if axis in self.out_axes else 1 for axis, d in enumerate(self.split))

    def crc32(self) -> str:
        """Checksum of the stored values, as eight hexadecimal digits."""
        return f"{zlib.crc32(np.ascontiguousarray(values(self.tensor)).data):08x}"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A place where a weight is, or could be, and the weight or the reason why there is none.

    The name, by which plans know it, is the node's; for recurrent nodes /W or /R follows. `inner`
    ones are in a body of If / Loop / Scan.
    """

    name: str
    graph: gs.Graph
    node: gs.Node
    found: Weight | str
    inner: bool = False


def candidates(model: Model, *, embeddings: bool = False) -> Iterator[Candidate]:
    """The candidates of all graphs of a model, in graph order."""
    for _, graph in graphs(model):
        inner = graph is not model.graph
        for node in graph.nodes:
            if node.op in RECURRENT:
                for slot, what in ((1, "W"), (2, "R")):
                    found = _recurrent(model, node, slot)
                    yield Candidate(f"{node.name}/{what}", graph, node, found, inner)
            elif node.op in LINEAR or node.op in _OTHERS:
                yield Candidate(node.name, graph, node, find_weight(model, node), inner)
            elif node.op == "Gather" and _is_table(node.inputs[0]):
                found = _embedding(model, node, wanted=embeddings)
                yield Candidate(node.name, graph, node, found, inner)


def find_weight(model: Model, node: gs.Node) -> Weight | str:
    """The weight of a node of LINEAR, or the reason why it cannot be quantized."""
    if node.op == "MatMul":
        return _matmul(model, node)
    if node.op in ("Conv", "ConvTranspose"):
        reason = _why_not(model, node, 1, 3)
        if reason:
            return reason
        shape = tuple(int(d) for d in node.inputs[1].shape)
        if node.op == "Conv":
            return Weight(node.inputs[1], 1, shape, (0,))
        groups = int(node.attrs.get("group", 1))
        split = (groups, shape[0] // groups, *shape[1:])
        return Weight(node.inputs[1], 1, split, (0, 2))
    if node.op == "Gemm":
        return _why_not(model, node, 1, 2) or "Gemm is quantized as MatMul + Add (GemmToMatMul)"
    return f"{node.op} is not quantized"


def check_finite(name: str, node: gs.Node, weight: Weight) -> None:
    """Refuse a weight with NaN or Inf.

    Raises:
        ModelError: names node and tensor.
    """
    array = values(weight.tensor)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ModelError(
            f"weight {weight.tensor.name!r} of {node.op} {name!r} has {bad} NaN or infinite "
            f"values: repair the model, or leave the node alone with --exclude {name!r}"
        )


def _is_vector(tensor: Any) -> bool:
    return tensor.shape is not None and len(tensor.shape) == 1


def _matmul(model: Model, node: gs.Node) -> Weight | str:
    constant = [is_constant(t) for t in node.inputs[:2]]
    listed = [t.name for t in node.inputs[:2] if t.name in model.overridable]
    if all(constant):
        return "both operands are constant"
    if not any(constant):
        return _overridable(listed[0]) if listed else "no constant operand"
    slot = constant.index(True)
    reason = _why_not(model, node, slot, 2)
    if reason:
        return reason
    shape = tuple(int(d) for d in node.inputs[slot].shape)
    inner = len(shape) - (2 if slot == 1 else 1)  # the axis that is summed over
    return Weight(node.inputs[slot], slot, shape, tuple(a for a in range(len(shape)) if a != inner))


def _recurrent(model: Model, node: gs.Node, slot: int) -> Weight | str:
    reason = _why_not(model, node, slot, 3)
    if reason:
        return reason
    # [directions, gates x hidden, input or hidden]
    shape = tuple(int(d) for d in node.inputs[slot].shape)
    return Weight(node.inputs[slot], slot, shape, (0, 1))


def _embedding(model: Model, node: gs.Node, *, wanted: bool) -> Weight | str:
    if not wanted:
        return "an embedding table; quantized with --embeddings"
    if node.attrs.get("axis", 0) != 0:
        return f"gathers along axis {node.attrs['axis']}"
    reason = _why_not(model, node, 0, 2)
    if reason:
        return reason
    return Weight(node.inputs[0], 0, tuple(int(d) for d in node.inputs[0].shape), (0,))


def _why_not(model: Model, node: gs.Node, slot: int, rank: int) -> str | None:
    """The reason why the input at `slot` is no weight that can be quantized, or None."""
    if node.domain not in (None, "", "ai.onnx"):
        return f"is an operator of domain {node.domain!r}, whose meaning is not known"
    tensor = node.inputs[slot] if len(node.inputs) > slot else None
    if tensor is None or not tensor.name:
        return "has no weight input"
    if tensor.name in model.overridable:
        return _overridable(tensor.name)
    if not is_constant(tensor):
        if not tensor.inputs:
            return f"weight {tensor.name!r} is an input of the graph"
        producer = tensor.inputs[0]
        return f"weight {tensor.name!r} is computed by {producer.op} {producer.name!r}"
    array = values(tensor)
    if array.dtype != np.float32:
        return f"weight {tensor.name!r} is {array.dtype.name}; only float32 is quantized"
    if array.ndim < rank:
        return f"weight {tensor.name!r} has rank {array.ndim}"
    if array.size == 0:
        return f"weight {tensor.name!r} is empty"
    return None


def _overridable(name: str) -> str:
    return f"weight {name!r} is a graph input that can be overridden at run time"


def _is_table(tensor: Any) -> bool:
    """Whether a Gather reads rows of a constant float matrix: an embedding."""
    return is_constant(tensor) and len(tensor.shape) == 2 and values(tensor).dtype.kind == "f"
