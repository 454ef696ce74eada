"""Quantization of an activation at run time, once per tensor and type, shared by all readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto

from onnxq.passes.edit import Builder
from onnxq.passes.nonnegative import is_nonnegative

# Keeps the scale of an all-zero tensor above zero, far above the denormals.
_TINY = np.float32(1e-20)


class Quantized(NamedTuple):
    """An 8-bit tensor with its scalar float32 scale and zero point of the tensor's type."""

    q: Any
    scale: Any
    zero_point: Any


@dataclass(eq=False)
class ActivationQuantizer:
    """Makes and remembers the quantized forms of the tensors of one graph.

    Per tensor, affine, range max(x, 0) … min(x, 0), as ONNX's DynamicQuantizeLinear states it.
    """

    done: dict[tuple[int, str], Quantized] = field(default_factory=dict)
    proofs: dict[int, bool] = field(default_factory=dict)

    def uint8(self, builder: Builder, tensor: Any) -> Quantized:
        """DynamicQuantizeLinear, the operator itself."""
        key = (id(tensor), "uint8")
        if key not in self.done:
            base = f"{tensor.name}/uint8"
            self.done[key] = Quantized(
                *builder.add(
                    "DynamicQuantizeLinear",
                    base,
                    [tensor],
                    outputs=(f"{base}/q", f"{base}/scale", f"{base}/zero_point"),
                )
            )
        return self.done[key]

    def int8(self, builder: Builder, tensor: Any) -> Quantized:
        """The same shifted by 128, which ConvInteger runs faster; built from plain operators."""
        key = (id(tensor), "int8")
        if key not in self.done:
            if is_nonnegative(tensor, self.proofs):
                self.done[key] = self._int8_nonnegative(builder, tensor)
            else:
                self.done[key] = self._int8_signed(builder, tensor)
        return self.done[key]

    def _int8_nonnegative(self, builder: Builder, tensor: Any) -> Quantized:
        base = f"{tensor.name}/int8"
        rmax = self._reduce(builder, "ReduceMax", tensor, f"{base}/rmax")
        rmax = builder.add("Max", f"{base}/rmax_positive", [rmax, builder.scalar(_TINY)])
        scale = builder.add("Mul", f"{base}/scale", [rmax, self._step(builder)])
        zero_point = builder.scalar(np.int8(-128))
        q = builder.add("QuantizeLinear", f"{base}/q", [tensor, scale, zero_point])
        return Quantized(q, scale, zero_point)

    def _int8_signed(self, builder: Builder, tensor: Any) -> Quantized:
        base = f"{tensor.name}/int8"
        rmax = self._reduce(builder, "ReduceMax", tensor, f"{base}/rmax")
        rmin = self._reduce(builder, "ReduceMin", tensor, f"{base}/rmin")
        rmax = builder.add("Max", f"{base}/rmax_positive", [rmax, builder.scalar(_TINY)])
        zero = builder.scalar(np.float32(0))
        rmin = builder.add("Min", f"{base}/rmin_negative", [rmin, zero])
        width = builder.add("Sub", f"{base}/range", [rmax, rmin])
        scale = builder.add("Mul", f"{base}/scale", [width, self._step(builder)])
        steps = builder.add("Div", f"{base}/rmin_steps", [rmin, scale])
        lowest = builder.scalar(np.float32(-128))
        exact = builder.add("Sub", f"{base}/zero_exact", [lowest, steps])
        rounded = builder.add("Round", f"{base}/zero_rounded", [exact])
        zero_point = builder.add(
            "Cast", f"{base}/zero_point", [rounded], attrs={"to": TensorProto.INT8}
        )
        q = builder.add("QuantizeLinear", f"{base}/q", [tensor, scale, zero_point])
        return Quantized(q, scale, zero_point)

    def _reduce(self, builder: Builder, op_type: str, tensor: Any, name: str) -> Any:
        return builder.add(op_type, name, [tensor], attrs={"keepdims": 0})

    def _step(self, builder: Builder) -> Any:
        return builder.scalar(np.float32(1.0) / np.float32(255.0))
