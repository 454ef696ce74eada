"""Single integer kernels of onnxruntime: are they exact here, and how fast are they?

Everything is measured on models of one node with one thread. Whether a pair of types is exact is
found with the largest products there are; times never decide that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel, ConfigDict

from onnxq.comparison import Quartiles, paired_ratios, quartiles, time_in_turns
from onnxq.errors import ValidationError
from onnxq.passes.forms import IntType, TypePair
from onnxq.session import open_session, run

Array = npt.NDArray[Any]
IntegerOp = Literal["ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"]
Workload = Literal["Conv 3×3", "Conv 1×1", "depthwise Conv 3×3", "MatMul"]

_OPSET = 13
_IR = 7  # every onnxruntime that onnxq runs on reads it
_DTYPES: dict[IntType, type[np.generic]] = {"int8": np.int8, "uint8": np.uint8}
_CODES: dict[IntType, int] = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}
# What forms.py says is exact, at some width, on some CPU; first those that may saturate.
PROBED: tuple[tuple[IntegerOp, TypePair], ...] = (
    ("MatMulInteger", TypePair("uint8", "int8")),
    ("QLinearConv", TypePair("uint8", "int8")),
    ("ConvInteger", TypePair("int8", "uint8")),
    ("MatMulInteger", TypePair("uint8", "uint8")),
    ("QLinearConv", TypePair("uint8", "uint8")),
    ("ConvInteger", TypePair("uint8", "uint8")),
    ("ConvInteger", TypePair("int8", "int8")),
    ("QLinearConv", TypePair("int8", "int8")),
)
_PAIRS = tuple(TypePair(a, w) for a in _DTYPES for w in _DTYPES)
_INPUTS, _OUTPUTS = 64, 16  # of a probe: whole vectors of every kernel
_ROUNDS = 31
_SECONDS = 0.6  # per workload, so that a slow machine does not wait long


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Exactness(_Fact):
    """Whether an operator is exact with 8-bit weights; None: onnxruntime has no such kernel."""

    op: IntegerOp
    activation: IntType
    weight: IntType
    exact: bool | None


class KernelRatio(_Fact):
    """Time of an integer kernel over that of the float operator; None: there is no such kernel."""

    workload: Workload
    op: IntegerOp
    activation: IntType
    weight: IntType
    ratio: Quartiles | None


@dataclass(frozen=True, eq=False)
class _OneNode:
    """A model of one node that reads x, and constants."""

    op: str
    x: Array
    constants: dict[str, Array]
    attrs: dict[str, Any] = field(default_factory=dict)
    output: int = TensorProto.FLOAT

    def open(self) -> Any:
        """A session of one thread.

        Raises:
            ValidationError: onnxruntime has no such kernel.
        """
        rank = self.x.ndim
        kind = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        shape: list[None] = [None] * rank
        order = ["x", *self.constants]
        if self.op.startswith("QLinear"):
            order = ["x", "one", "x_zero", "w", "one", "w_zero", "y_scale", "y_zero"]
        graph = helper.make_graph(
            [helper.make_node(self.op, order, ["y"], **self.attrs)],
            "probe",
            [helper.make_tensor_value_info("x", kind, self.x.shape)],
            [helper.make_tensor_value_info("y", self.output, shape)],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opset = helper.make_opsetid("", _OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR)
        return open_session(model.SerializeToString(), threads=1)


def _integer_node(
    op: IntegerOp, x: Array, w: Array, attrs: dict[str, Any], y_scale: float
) -> _OneNode:
    """One product of x and w, whose zero points stand for 0 and make w symmetric."""
    kind: IntType = "int8" if x.dtype == np.int8 else "uint8"
    zeros = {
        "x_zero": np.array(-128 if kind == "int8" else 0, x.dtype),
        "w_zero": np.array(128 if w.dtype == np.uint8 else 0, w.dtype),
    }
    if op in ("ConvInteger", "MatMulInteger"):
        return _OneNode(op, x, {"w": w, **zeros}, attrs, TensorProto.INT32)
    middle = np.array(0 if kind == "int8" else 128, x.dtype)
    scales = {"one": np.array(1, np.float32), "y_scale": np.array(y_scale, np.float32)}
    return _OneNode(op, x, {"w": w, **zeros, **scales, "y_zero": middle}, attrs, _CODES[kind])


def _shifted(values: Array, offset: int, kind: IntType) -> Array:
    return np.asarray((values + offset).astype(_DTYPES[kind]))


def find_exactness() -> tuple[Exactness, ...]:
    """Try the largest 8-bit products, 255·127 and 255·−127, in every kernel that forms need.

    Takes some ten milliseconds.
    """
    return tuple(
        Exactness(op=op, activation=pair.activation, weight=pair.weight, exact=is_exact(op, pair))
        for op, pair in PROBED
    )


def is_exact(op: IntegerOp, pair: TypePair) -> bool | None:
    """Whether an operator gives 255·127 and 255·−127, summed over 64 inputs, without an error.

    None: onnxruntime has no such kernel.
    """
    signs = np.where(np.arange(_OUTPUTS) % 2, -1, 1)
    wanted = 255 * 127 * _INPUTS * signs
    x = _shifted(
        np.full((_OUTPUTS, _INPUTS), 255), -128 * (pair.activation == "int8"), pair.activation
    )
    w = _shifted(
        np.outer(np.full(_INPUTS, 127), signs), 128 * (pair.weight == "uint8"), pair.weight
    )
    if "Conv" in op:
        x = np.ascontiguousarray(x.T).reshape(1, _INPUTS, 4, 4)
        w = np.ascontiguousarray(w.T).reshape(_OUTPUTS, _INPUTS, 1, 1)
    y_scale = 255 * _INPUTS if op.startswith("QLinear") else 1
    node = _integer_node(op, x, w, {}, y_scale)
    try:
        (y,) = run(node.open(), {"x": x})
    except ValidationError:
        return None
    zero = node.constants["y_zero"].astype(np.int64) if "y_zero" in node.constants else 0
    per_output = np.moveaxis(y, 1, -1).reshape(-1, _OUTPUTS).astype(np.int64) - zero
    return bool((per_output == wanted // y_scale).all())


def timed() -> tuple[tuple[Workload, IntegerOp, TypePair], ...]:
    """What `measure_ratios` measures, in its order."""
    return tuple(
        (work.name, op, pair) for work in _workloads() for op in work.ops for pair in _PAIRS
    )


def measure_ratios(seconds: float = _SECONDS) -> tuple[KernelRatio, ...]:
    """Time every pair of types of every integer operator against float; at most 3 seconds.

    Args:
        seconds: no round of a workload begins later than this, but for the first three.
    """
    return tuple(ratio for work in _workloads() for ratio in _time(work, seconds))


@dataclass(frozen=True)
class _Work:
    name: Workload
    x: tuple[int, ...]
    w: tuple[int, ...]
    ops: tuple[IntegerOp, ...]
    attrs: dict[str, Any]


def _workloads() -> Iterator[_Work]:
    """Shapes small enough for a few seconds, and large enough that the product dominates."""
    conv: tuple[IntegerOp, ...] = ("ConvInteger", "QLinearConv")
    pads = {"pads": [1, 1, 1, 1]}
    yield _Work("Conv 3×3", (1, 64, 28, 28), (64, 64, 3, 3), conv, pads)
    yield _Work("Conv 1×1", (1, 256, 28, 28), (64, 256, 1, 1), conv, {})
    depthwise = {**pads, "group": 128}
    yield _Work("depthwise Conv 3×3", (1, 128, 28, 28), (128, 1, 3, 3), conv, depthwise)
    yield _Work("MatMul", (128, 256), (256, 256), ("MatMulInteger", "QLinearMatMul"), {})


def _time(work: _Work, seconds: float) -> Iterator[KernelRatio]:
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, work.x), rng.integers(-63, 64, work.w)
    op = "MatMul" if work.name == "MatMul" else "Conv"
    plain = _OneNode(op, x.astype(np.float32), {"w": w.astype(np.float32)}, work.attrs)
    calls = [partial(run, plain.open(), {"x": plain.x})]
    columns: dict[tuple[IntegerOp, TypePair], int] = {}
    for integer_op in work.ops:
        for pair in _PAIRS:
            node = _integer_node(
                integer_op,
                _shifted(x, -128 * (pair.activation == "int8"), pair.activation),
                _shifted(w, 128 * (pair.weight == "uint8"), pair.weight),
                work.attrs,
                y_scale=1e4,
            )
            try:
                call = partial(run, node.open(), {"x": node.x})
                call()
            except ValidationError:
                continue
            columns[integer_op, pair] = len(calls)
            calls.append(call)
    ratios = paired_ratios(time_in_turns(calls, warmup=2, rounds=_ROUNDS, seconds=seconds))
    for integer_op in work.ops:
        for pair in _PAIRS:
            at = columns.get((integer_op, pair))
            yield KernelRatio(
                workload=work.name,
                op=integer_op,
                activation=pair.activation,
                weight=pair.weight,
                ratio=None if at is None else quartiles(ratios[:, at]),
            )
