"""Nodes of the graph read as linear maps (kernels_ref.linear_map)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.linear_map import (
    LinearMap,
    Unfoldable,
    affine,
    average_pool,
    convolution,
    padding,
)
from onnxq.model import is_constant, values
from onnxq.passes.batch_norm import affine_of, in_training_mode

Array = npt.NDArray[Any]


def node_map(node: gs.Node, rank: int | None, channels: int | None) -> LinearMap:
    """What a node with one variable input computes.

    Args:
        node: a node of LINEAR.
        rank: rank of its input tensor, where known; constants of Mul and Add need it.
        channels: channels of its input, where known; AveragePool needs them.

    Raises:
        Unfoldable: the node is not a linear map with constant parameters; says why.
    """
    reader = LINEAR.get(node.op)
    if reader is None or not is_onnx(node):
        raise Unfoldable(f"{node.op} {node.name!r} is not known to be linear")
    return reader(node, rank, channels)


def is_onnx(node: gs.Node) -> bool:
    """Whether the operator is one of the ONNX standard."""
    return node.domain in (None, "", "ai.onnx")


def _conv(node: gs.Node, _rank: int | None, _channels: int | None) -> LinearMap:
    if not all(is_constant(t) for t in node.inputs[1:] if t.name):
        raise Unfoldable(f"weight or bias of Conv {node.name!r} is not constant")
    kernel = _floats(node.inputs[1])
    bias = _floats(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    spatial = kernel.shape[2:]
    strides = tuple(node.attrs.get("strides", [1] * len(spatial)))
    dilations = tuple(node.attrs.get("dilations", [1] * len(spatial)))
    begin, end = explicit_pads(node, spatial, strides, dilations)
    return convolution(
        kernel,
        bias,
        groups=int(node.attrs.get("group", 1)),
        strides=strides,
        dilations=dilations,
        begin=begin,
        end=end,
    )


def explicit_pads(
    node: gs.Node,
    spatial: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding at the begin and the end of each axis.

    Raises:
        Unfoldable: auto_pad SAME with a stride, whose padding depends on the input size.
    """
    auto = node.attrs.get("auto_pad", "NOTSET")
    rank = len(spatial)
    if auto == "VALID":
        return (0,) * rank, (0,) * rank
    if auto == "NOTSET":
        pads = tuple(node.attrs.get("pads", [0] * (2 * rank)))
        if min(pads) < 0:
            raise Unfoldable(f"{node.op} {node.name!r} has negative padding")
        return pads[:rank], pads[rank:]
    if any(s > 1 and k > 1 for s, k in zip(strides, spatial, strict=True)):
        raise Unfoldable(f"{node.op} {node.name!r} has auto_pad {auto} with a stride")
    total = [d * (k - 1) for d, k in zip(dilations, spatial, strict=True)]
    small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _batch_norm(node: gs.Node, _rank: int | None, _channels: int | None) -> LinearMap:
    if in_training_mode(node):
        raise Unfoldable(f"BatchNormalization {node.name!r} is in training mode")
    if not all(is_constant(t) for t in node.inputs[1:]):
        raise Unfoldable(f"parameters of BatchNormalization {node.name!r} are not constant")
    if not node.attrs.get("spatial", 1):  # before opset 9
        raise Unfoldable(f"BatchNormalization {node.name!r} has statistics per position")
    try:
        return affine(*affine_of(node))
    except ValueError as error:
        raise Unfoldable(f"BatchNormalization {node.name!r}: {error}") from None


def _identity(_node: gs.Node, _rank: int | None, _channels: int | None) -> LinearMap:
    return affine(1.0, 0.0)


def _neg(_node: gs.Node, _rank: int | None, _channels: int | None) -> LinearMap:
    return affine(-1.0, 0.0)


def _mul(node: gs.Node, rank: int | None, _channels: int | None) -> LinearMap:
    constant, _ = _operand(node)
    return affine(per_channel(node, constant, rank), 0.0)


def _div(node: gs.Node, rank: int | None, _channels: int | None) -> LinearMap:
    constant, side = _operand(node)
    if side == 0:
        raise Unfoldable(f"Div {node.name!r} divides by a tensor")
    divisor = per_channel(node, constant, rank)
    if not np.all(divisor):
        raise Unfoldable(f"Div {node.name!r} divides by zero")
    return affine(1.0 / divisor, 0.0)


def _add(node: gs.Node, rank: int | None, _channels: int | None) -> LinearMap:
    constant, _ = _operand(node)
    return affine(1.0, per_channel(node, constant, rank))


def _sub(node: gs.Node, rank: int | None, _channels: int | None) -> LinearMap:
    constant, side = _operand(node)
    offset = per_channel(node, constant, rank)
    return affine(1.0, -offset) if side == 1 else affine(-1.0, offset)


def _average_pool(node: gs.Node, _rank: int | None, channels: int | None) -> LinearMap:
    shape = tuple(node.attrs["kernel_shape"])
    strides = tuple(node.attrs.get("strides", [1] * len(shape)))
    dilations = tuple(node.attrs.get("dilations", [1] * len(shape)))
    begin, end = explicit_pads(node, shape, strides, dilations)
    if (any(begin) or any(end)) and not node.attrs.get("count_include_pad", 0):
        raise Unfoldable(f"AveragePool {node.name!r} does not count its padding")
    if node.attrs.get("ceil_mode", 0):
        raise Unfoldable(f"AveragePool {node.name!r} has ceil_mode")
    if channels is None:
        raise Unfoldable(f"the channels of AveragePool {node.name!r} are not known")
    return average_pool(channels, shape, strides=strides, dilations=dilations, begin=begin, end=end)


def _pad(node: gs.Node, rank: int | None, _channels: int | None) -> LinearMap:
    if node.attrs.get("mode", "constant") != "constant":
        raise Unfoldable(f"Pad {node.name!r} has mode {node.attrs['mode']}")
    if "pads" in node.attrs:  # before opset 11
        pads, value = list(node.attrs["pads"]), float(node.attrs.get("value", 0.0))
    else:
        amounts, filling, axes = (_optional(node, slot) for slot in (1, 2, 3))
        if amounts is None or not all(is_constant(t) for t in node.inputs[1:] if t.name):
            raise Unfoldable(f"the amounts of Pad {node.name!r} are not constant")
        pads = [int(p) for p in values(amounts).reshape(-1)]
        value = 0.0 if filling is None else float(values(filling).reshape(-1)[0])
        if axes is not None:
            pads = _on_all_axes(node, pads, [int(a) for a in values(axes)], rank)
    if value != 0.0:
        raise Unfoldable(f"Pad {node.name!r} pads with {value}")
    count = len(pads) // 2
    begin, end = tuple(pads[:count]), tuple(pads[count:])
    if count < 3 or any(begin[:2]) or any(end[:2]):
        raise Unfoldable(f"Pad {node.name!r} pads the batch or the channels")
    if min(pads) < 0:
        raise Unfoldable(f"Pad {node.name!r} crops")
    return padding(begin[2:], end[2:])


def _on_all_axes(node: gs.Node, pads: list[int], axes: list[int], rank: int | None) -> list[int]:
    """The amounts of a Pad that names its axes (opset 18) for every axis."""
    if rank is None:
        raise Unfoldable(f"the rank of the input of Pad {node.name!r} is not known")
    every = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        every[axis % rank] = pads[i]
        every[axis % rank + rank] = pads[i + len(axes)]
    return every


def _optional(node: gs.Node, slot: int) -> Any:
    """An input that may be left out, or None."""
    return node.inputs[slot] if len(node.inputs) > slot and node.inputs[slot].name else None


LINEAR: dict[str, Callable[[gs.Node, int | None, int | None], LinearMap]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Identity": _identity,
    "Neg": _neg,
    "Mul": _mul,
    "Div": _div,
    "Add": _add,
    "Sub": _sub,
    "AveragePool": _average_pool,
    "Pad": _pad,
}


def variable_input(node: gs.Node) -> Any:
    """The one input that is not constant, or None if there are more or none."""
    variable = [t for t in node.inputs if t.name and not is_constant(t)]
    return variable[0] if len(variable) == 1 else None


def per_channel(node: gs.Node, constant: Any, rank: int | None) -> Array:
    """A constant operand as float64 () or [channels].

    Raises:
        Unfoldable: it varies along another axis than the channels (axis 1), or the rank of the
            tensor that it meets is not known.
    """
    array = _floats(constant)
    if array.size == 1 and array.ndim <= (rank if rank is not None else 1):
        return array.reshape(())  # no Conv reads a tensor of rank 0, so [1] adds no axis
    if rank is None:
        raise Unfoldable(f"the rank of the input of {node.op} {node.name!r} is not known")
    shape = (1,) * (rank - array.ndim) + array.shape
    if array.ndim > rank or any(d != 1 for axis, d in enumerate(shape) if axis != 1):
        raise Unfoldable(
            f"the constant of {node.op} {node.name!r}, {list(array.shape)}, is not per channel"
        )
    return array.reshape(-1)


def _operand(node: gs.Node) -> tuple[Any, int]:
    """The constant operand of a binary node, and its side (0 left, 1 right)."""
    sides = [i for i, t in enumerate(node.inputs) if is_constant(t)]
    # attributes: the broadcast rules before opset 7
    if len(sides) != 1 or len(node.inputs) != 2 or node.attrs:
        raise Unfoldable(f"{node.op} {node.name!r} has no constant operand")
    return node.inputs[sides[0]], sides[0]


def _floats(tensor: Any) -> Array:
    array = values(tensor)
    if array.dtype != np.float32:
        raise Unfoldable(f"{tensor.name!r} is {array.dtype.name}, not float32")
    if not np.isfinite(array).all():
        raise Unfoldable(f"{tensor.name!r} has NaN or Inf")
    return array.astype(np.float64)
