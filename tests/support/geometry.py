"""Hypothesis strategies for convolutions and matrix products, with what kernels_ref needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper


@dataclass
class Case:
    """A model with one node `op`, fed with `x`, and the numbers behind it.

    `operand` is what the node's products read: x itself, after Relu or transposed. `weight` is the
    constant as it is quantized; for Gemm, which becomes MatMul first, alpha·B or alpha·Bᵀ.
    """

    proto: onnx.ModelProto
    x: np.ndarray
    operand: np.ndarray
    weight: np.ndarray
    out_last: bool
    bias: np.ndarray | None = None  # as it is added: [M, 1, …] or beta·C
    attrs: dict[str, Any] = field(default_factory=dict)  # of kernels_ref's convolutions

    @property
    def products(self) -> int:
        """Products that are summed up for one output."""
        return self.weight.shape[-2] if self.out_last else int(np.prod(self.weight.shape[1:]))


def _floats(draw: st.DrawFn, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([1e-3, 1.0, 50.0]))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _input(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """x, and whether a Relu follows it."""
    kind = draw(st.sampled_from(["signed", "relu", "relu", "negative", "zero"]))
    x = _floats(draw, *shape)
    if kind == "negative":
        x = -np.abs(x)
    return (np.zeros_like(x) if kind == "zero" else x), kind == "relu"


def _weight(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    weight = _floats(draw, *shape)
    if draw(st.integers(0, 4)) == 0:
        weight[0] = 0  # a dead channel (or input)
    return weight


def _model(
    x: np.ndarray, relu: bool, node: onnx.NodeProto, constants: dict[str, np.ndarray], rank: int
) -> onnx.ModelProto:
    made = [helper.make_node("Relu", ["x"], ["r"], name="relu")] if relu else []
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*made, node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, x.shape)],
        [value("y", onnx.TensorProto.FLOAT, [f"d{i}" for i in range(rank)])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def same_pads(space: list[int], spans: list[int], strides: list[int], *, upper: bool) -> list[int]:
    """What auto_pad SAME_UPPER / SAME_LOWER means, as pads."""
    begins, ends = [], []
    for size, span, stride in zip(space, spans, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if upper else large)
        ends.append(large if upper else small)
    return [*begins, *ends]


@st.composite
def convs(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2), depthwise: bool = False) -> Case:
    """A Conv with any padding, stride, dilation and grouping."""
    rank = draw(st.sampled_from(ranks))
    each = st.lists(st.integers(1, 2), min_size=rank, max_size=rank)
    kernel = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    strides, dilations = draw(each), draw(each)
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto_pad.startswith("SAME"):
        dilations = [1] * rank  # onnxruntime refuses the two together, for the float Conv as well
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    space = [span + draw(st.integers(0, 4)) for span in spans]
    group = draw(st.integers(2, 3)) if depthwise else draw(st.integers(1, 3))
    per_group = 1 if depthwise else draw(st.integers(1 if group == 1 else 2, 3))
    out = group * draw(st.integers(1, 3))
    pads = [0] * (2 * rank)
    attrs: dict[str, Any] = {"auto_pad": auto_pad}
    if auto_pad == "NOTSET":
        pads = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
        attrs = {"pads": pads}
    elif auto_pad.startswith("SAME"):
        pads = same_pads(space, spans, strides, upper=auto_pad == "SAME_UPPER")
    shared = {"strides": strides, "dilations": dilations, "group": group}
    x, relu = _input(draw, (draw(st.integers(1, 2)), group * per_group, *space))
    weight = _weight(draw, (out, per_group, *kernel))
    bias = _floats(draw, out) if draw(st.booleans()) else None
    names = ["r" if relu else "x", "w", *(["b"] if bias is not None else [])]
    node = helper.make_node("Conv", names, ["y"], name="op", **attrs, **shared)
    constants = {"w": weight} if bias is None else {"w": weight, "b": bias}
    return Case(
        _model(x, relu, node, constants, rank + 2),
        x,
        np.maximum(x, 0) if relu else x,
        weight,
        out_last=False,
        bias=None if bias is None else bias.reshape(-1, *(1 for _ in kernel)),
        attrs={"pads": pads, **shared},
    )


@st.composite
def matmuls(draw: st.DrawFn) -> Case:
    """A MatMul of one to three dimensions by a constant of two or three."""
    k, n, batch = draw(st.integers(1, 20)), draw(st.integers(1, 9)), draw(st.integers(2, 3))
    weight_shape, x_shape = draw(
        st.sampled_from(
            [
                ((k, n), (4, k)),
                ((k, n), (2, 3, k)),
                ((k, n), (k,)),
                ((batch, k, n), (4, k)),
                ((batch, k, n), (batch, 3, k)),
                ((batch, k, n), (1, 3, k)),
            ]
        )
    )
    x, relu = _input(draw, x_shape)
    weight = _weight(draw, weight_shape)
    operand = np.maximum(x, 0) if relu else x
    node = helper.make_node("MatMul", ["r" if relu else "x", "w"], ["y"], name="op")
    rank = np.matmul(operand, weight).ndim
    return Case(_model(x, relu, node, {"w": weight}, rank), x, operand, weight, out_last=True)


@st.composite
def gemms(draw: st.DrawFn) -> Case:
    """A Gemm with every attribute and every shape of C."""
    m, k, n = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    trans_a, trans_b = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    alpha = np.float32(draw(st.sampled_from([1.0, 0.3, -2.0])))
    beta = np.float32(draw(st.sampled_from([1.0, 0.7])))
    x, relu = _input(draw, (k, m) if trans_a else (m, k))
    weight = _weight(draw, (n, k) if trans_b else (k, n))
    c_shape = draw(st.sampled_from([None, (), (1,), (n,), (1, n), (m, 1), (m, n)]))
    c = None if c_shape is None else np.asarray(_floats(draw, *c_shape))
    operand = np.maximum(x, 0) if relu else x
    names = ["r" if relu else "x", "w", *(["c"] if c is not None else [])]
    attrs = {"transA": trans_a, "transB": trans_b, "alpha": float(alpha), "beta": float(beta)}
    node = helper.make_node("Gemm", names, ["y"], name="op", **attrs)
    constants = {"w": weight} if c is None else {"w": weight, "c": c}
    return Case(
        _model(x, relu, node, constants, 2),
        x,
        operand.T if trans_a else operand,
        np.ascontiguousarray(alpha * (weight.T if trans_b else weight)),
        out_last=True,
        bias=None if c is None else beta * c,
    )


@st.composite
def integer_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of dynamic compute that may be combined."""
    if draw(st.integers(0, 3)) == 0:
        bits, terms = draw(
            st.sampled_from([(2, 2), (2, 3), (2, 4), (3, 2), (4, 2), (4, 1), (8, 1)])
        )
        return {"bits": bits, "terms": terms, "series": "digit", "layout": "merged"}
    return {
        "bits": draw(st.integers(2, 8)),
        "terms": draw(st.integers(1, 4)),
        "series": draw(st.sampled_from(["fixed_ratio", "digit", "joint"])),
        "layout": "parallel",
    }


@st.composite
def float_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of float compute that may be combined."""
    return {
        "bits": draw(st.integers(2, 8)),
        "terms": draw(st.integers(1, 4)),
        "series": draw(st.sampled_from(["fixed_ratio", "digit", "joint"])),
        "layout": draw(st.sampled_from(["parallel", "merged"])),
        "block_size": draw(st.sampled_from([None, 2, 3, 7, 64])),
    }
