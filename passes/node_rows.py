"""The inputs of a node, as the rows that its weight matrix is multiplied with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref import conv_patches
from onnxq.passes.weights import Weight

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class NodeRows:
    """How the input of one Conv or MatMul is seen as rows [groups, positions, inputs].

    The rows of `weight.matrix()` lie group after group: output channel o of group g is
    `rows[g] @ matrix[g * out / groups + o]`. A group is that of a Conv, or one matrix of a batched
    MatMul.

    Attributes:
        slot: the input of the node that is not the weight.
        groups, inputs: of the rows.
    """

    node: gs.Node
    weight: Weight
    slot: int
    groups: int
    inputs: int

    @classmethod
    def of(cls, node: gs.Node, weight: Weight) -> NodeRows | str:
        """The rows of a node, or the reason why they are not known."""
        inputs = weight.size // weight.out
        if node.op == "Conv":
            groups = int(node.attrs.get("group", 1))
            return cls(node, weight, 0, groups, inputs)
        if node.op != "MatMul":
            return f"{node.op} is not calibrated"
        batch = weight.shape[:-2]
        if weight.slot == 0 and batch:
            return "a batched left operand is not calibrated"
        return cls(node, weight, 1 - weight.slot, math.prod(batch), inputs)

    def read(self, x: Array, limit: int, rng: np.random.Generator) -> Array:
        """At most `limit` rows per group of one input; float32 [groups, positions, inputs].

        Generators in the same state draw the same positions from inputs of the same shape.
        Raises ValueError for an input whose shape does not fit the weight.
        """
        if self.node.op == "Conv":
            return self._patches(x, limit, rng)
        if x.ndim == 1 and (self.weight.slot == 0 or len(self.weight.shape) > 2):
            raise ValueError("the input is a vector")
        if self.weight.slot == 0:  # W x: the columns of x
            x = np.moveaxis(x, -2, -1)
        rows = self._by_matrix(x) if self.weight.shape[:-2] else x.reshape(1, -1, self.inputs)
        if limit >= rows.shape[1]:
            return np.ascontiguousarray(rows)
        return rows[:, np.sort(rng.choice(rows.shape[1], size=limit, replace=False))]

    def _by_matrix(self, x: Array) -> Array:
        """[..., *batch, rows, inputs] -> [groups, positions, inputs]."""
        batch = self.weight.shape[:-2]
        lead = np.broadcast_shapes(x.shape[:-2], batch)
        split = len(lead) - len(batch)
        if lead[split:] != batch:
            raise ValueError(f"weights {list(batch)} are repeated for an input {list(x.shape)}")
        full = np.broadcast_to(x, (*lead, *x.shape[-2:]))
        order = (*range(split, len(lead)), *range(split), len(lead), len(lead) + 1)
        return np.asarray(full.transpose(order).reshape(self.groups, -1, self.inputs))

    def read_output(
        self, y: Array, x_shape: tuple[int, ...], limit: int, rng: np.random.Generator
    ) -> Array:
        """The rows [positions, out] of a tensor like the output, where `read` reads x.

        Raises ValueError where the tensor is not of the shape of the output for an x of this shape,
        or the outputs are not rows.
        """
        if y.shape != self.output_shape(x_shape):
            raise ValueError("a tensor of another shape is added")
        rows = np.moveaxis(y, 1, -1) if self.node.op == "Conv" else y
        total = y.size // self.weight.out
        rows = rows.reshape(total, self.weight.out)
        if limit >= total:
            return np.ascontiguousarray(rows)
        return rows[np.sort(rng.choice(total, size=limit, replace=False))]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of this shape; ValueError if it is not rows."""
        if self.node.op != "Conv":
            if self.weight.slot == 0 or len(self.weight.shape) > 2:
                raise ValueError("its outputs are not rows")
            return (*shape[:-1], self.weight.out)
        strides, pads, dilations = self._geometry(shape[2:])
        kernel = self.weight.shape[2:]
        full = pads or [0] * (2 * len(kernel))
        both = zip(full[: len(kernel)], full[len(kernel) :], strict=True)
        axes = zip(shape[2:], both, kernel, strides, dilations, strict=True)
        space = ((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in axes)
        return (shape[0], self.weight.out, *space)

    def _geometry(
        self, space: tuple[int, ...]
    ) -> tuple[tuple[int, ...], list[int] | None, tuple[int, ...]]:
        """(strides, pads, dilations) of a Conv whose input has these sizes."""
        attrs, kernel = self.node.attrs, self.weight.shape[2:]
        strides = tuple(attrs.get("strides") or [1] * len(kernel))
        dilations = tuple(attrs.get("dilations") or [1] * len(kernel))
        auto = attrs.get("auto_pad", "NOTSET")
        pads = None if auto == "VALID" else attrs.get("pads")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            pads = _same_pads(auto, space, kernel, strides, dilations)
        return strides, pads, dilations

    def _patches(self, x: Array, limit: int, rng: np.random.Generator) -> Array:
        strides, pads, dilations = self._geometry(x.shape[2:])
        return conv_patches(
            x,
            self.weight.shape[2:],
            strides=strides,
            pads=pads,
            dilations=dilations,
            groups=self.groups,
            limit=limit,
            rng=rng,
        )

    def spread(self, values: Array) -> Array:
        """One value per output channel, [out], in a shape that broadcasts against the output."""
        if self.node.op == "Conv":
            return values.reshape(-1, *(1 for _ in self.weight.shape[2:]))
        if self.weight.slot == 1 and len(self.weight.shape) == 2:
            return values
        return values.reshape(self.weight.channel_shape())


def _same_pads(
    auto: str,
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> list[int]:
    """The pads of auto_pad SAME: the output has ceil(size / stride) elements."""
    less, more = [], []
    for size, taps, stride, dilation in zip(space, kernel, strides, dilations, strict=True):
        covered = (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1
        total = max(covered - size, 0)
        less.append(total // 2)
        more.append(total - total // 2)
    return less + more if auto == "SAME_UPPER" else more + less
