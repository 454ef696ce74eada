"""Quantization of an activation at run time, once per tensor and type, shared by all readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto

from onnxq.kernels_ref import qrange
from onnxq.kernels_ref.activation_series import TINY_RANGE, first_step, residual_step
from onnxq.passes.edit import Builder
from onnxq.passes.forms import IntType
from onnxq.passes.nonnegative import is_nonnegative

# Metadata of the node that finds what the terms before leave of a tensor: the tensor's name. What
# it reads must be the float tensor.
REST = "onnxq.rest"


class Quantized(NamedTuple):
    """An 8-bit tensor with its scalar float32 scale and zero point of the tensor's type."""

    q: Any
    scale: Any
    zero_point: Any


@dataclass(eq=False)
class ActivationQuantizer:
    """Makes and remembers the terms of the activations of one graph, and their outlier columns.

    The arithmetic is that of `kernels_ref.activation_series`, bit for bit. The first term is
    affine, with the range max(x, 0) … min(x, 0) of the tensor at hand; a term after it is
    symmetric, with a scale that follows from the one before: no second pass looks for its range.
    """

    done: dict[tuple[int, str, int, int], Quantized] = field(default_factory=dict)
    proofs: dict[int, bool] = field(default_factory=dict)
    splits: dict[tuple[int, tuple[int, ...]], Any] = field(default_factory=dict)

    def term(
        self, builder: Builder, tensor: Any, kind: IntType, bits: int = 8, index: int = 0
    ) -> Quantized:
        """Term `index`, from 0, of a float32 tensor in integers of `bits` bits, stored as `kind`.

        The terms before it are made too, where they are not there yet.
        """
        key = (id(tensor), kind, bits, index)
        if key not in self.done:
            base = _base(tensor, kind, bits)
            if index:
                self.done[key] = self._residual_term(builder, tensor, kind, bits, index)
            elif (kind, bits) == ("uint8", 8):
                self.done[key] = _dynamic_quantize_linear(builder, tensor, base)
            elif is_nonnegative(tensor, self.proofs):
                self.done[key] = _nonnegative(builder, tensor, kind, bits, base)
            else:
                self.done[key] = _affine(builder, tensor, kind, bits, base)
        return self.done[key]

    def _residual_term(
        self, builder: Builder, tensor: Any, kind: IntType, bits: int, index: int
    ) -> Quantized:
        """What term `index - 1` leaves of what it was made from, in integers around 0.

        DequantizeLinear, Sub, QuantizeLinear: three passes over the tensor. Splitting one 16-bit
        quantization into bytes is no faster, as onnxruntime has no fast operators for the bytes.
        """
        before = self.term(builder, tensor, kind, bits, index - 1)
        source = tensor if index == 1 else before.q.inputs[0].inputs[0]
        base = f"{_base(tensor, kind, bits)}/term{index}"
        known = builder.add("DequantizeLinear", f"{base}/known", list(before))
        own = {REST: tensor.name}
        rest = builder.add("Sub", f"{base}/rest", [source, known], metadata=own)
        scale = self._residual_scale(builder, before.scale, bits, f"{base}/scale")
        zero_point = builder.scalar(_of(kind, 0 if kind == "int8" else 1 << (bits - 1)))
        q = builder.add("QuantizeLinear", f"{base}/q", [rest, scale, zero_point])
        return Quantized(q, scale, zero_point)

    def _residual_scale(self, builder: Builder, before: Any, bits: int, name: str) -> Any:
        """The scale of a term, from that of the term before it."""
        return builder.add("Mul", name, [before, builder.scalar(residual_step(bits))])


def _base(tensor: Any, kind: IntType, bits: int) -> str:
    return f"{tensor.name}/{kind}" + ("" if bits == 8 else f"/{bits}bits")


def _of(kind: IntType, value: int) -> np.int8 | np.uint8:
    made: np.int8 | np.uint8 = np.int8(value) if kind == "int8" else np.uint8(value)
    return made


def _dynamic_quantize_linear(builder: Builder, tensor: Any, base: str) -> Quantized:
    """The operator itself, which onnxruntime fuses with the product after it."""
    outputs = (f"{base}/q", f"{base}/scale", f"{base}/zero_point")
    return Quantized(*builder.add("DynamicQuantizeLinear", base, [tensor], outputs=outputs))


def _nonnegative(builder: Builder, tensor: Any, kind: IntType, bits: int, base: str) -> Quantized:
    """All levels above 0: the zero point is the lowest, a constant."""
    rmax = _reduce(builder, "ReduceMax", tensor, f"{base}/rmax")
    rmax = builder.add("Max", f"{base}/rmax_positive", [rmax, builder.scalar(TINY_RANGE)])
    scale = builder.add("Mul", f"{base}/scale", [rmax, builder.scalar(first_step(bits))])
    lowest, _ = qrange(bits, signed=kind == "int8")
    zero_point = builder.scalar(_of(kind, lowest))
    q = builder.add("QuantizeLinear", f"{base}/q", [tensor, scale, zero_point])
    return Quantized(q, scale, zero_point)


def _affine(builder: Builder, tensor: Any, kind: IntType, bits: int, base: str) -> Quantized:
    rmax = _reduce(builder, "ReduceMax", tensor, f"{base}/rmax")
    rmin = _reduce(builder, "ReduceMin", tensor, f"{base}/rmin")
    rmax = builder.add("Max", f"{base}/rmax_positive", [rmax, builder.scalar(TINY_RANGE)])
    zero = builder.scalar(np.float32(0))
    rmin = builder.add("Min", f"{base}/rmin_negative", [rmin, zero])
    width = builder.add("Sub", f"{base}/range", [rmax, rmin])
    scale = builder.add("Mul", f"{base}/scale", [width, builder.scalar(first_step(bits))])
    steps = builder.add("Div", f"{base}/rmin_steps", [rmin, scale])
    # Rounded before it is subtracted: rmin then meets the lowest level exactly.
    steps = builder.add("Round", f"{base}/rmin_levels", [steps])
    lowest, _ = qrange(bits, signed=kind == "int8")
    level = builder.add("Sub", f"{base}/zero_level", [builder.scalar(np.float32(lowest)), steps])
    to = TensorProto.INT8 if kind == "int8" else TensorProto.UINT8
    zero_point = builder.add("Cast", f"{base}/zero_point", [level], attrs={"to": to})
    q = builder.add("QuantizeLinear", f"{base}/q", [tensor, scale, zero_point])
    return Quantized(q, scale, zero_point)


def _reduce(builder: Builder, op_type: str, tensor: Any, name: str) -> Any:
    return builder.add(op_type, name, [tensor], attrs={"keepdims": 0})
