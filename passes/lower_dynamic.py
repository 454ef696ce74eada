"""Dynamic integer compute: activations quantized at run time, products in int32.

Which pair of 8-bit types is used (measured on onnxruntime; exact on every CPU):

| operator      | weight bits | activation · weight | why                                         |
|---------------|-------------|---------------------|---------------------------------------------|
| ConvInteger   | <= 7        | int8 · uint8        | the fastest pair; |w| <= 127 cannot saturate |
| ConvInteger   | 8           | uint8 · uint8       | int8·uint8 saturates on AVX2 without VNNI   |
| MatMulInteger | <= 7        | uint8 · int8        | the fastest pair; |w| <= 64 cannot saturate  |
| MatMulInteger | 8           | uint8 · uint8       | uint8·int8 saturates on AVX2 without VNNI   |

int8 activations of ConvInteger need onnxruntime 1.24; for older ones the plan says uint8.

(x86 CPUs without VNNI add two 8-bit products in 16 bits: onnxruntime issue 6004.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from onnxq.model import is_constant, values
from onnxq.passes.quantize_activations import ActivationQuantizer
from onnxq.passes.site import Site

SAFE_BITS = 7


def lower_dynamic(site: Site, quantizer: ActivationQuantizer) -> None:
    """Replace a node by integer basis nodes.

    Given:   conv1(x, W, b)
    Result:  x -> quantize; conv1/term0 = ConvInteger(xq, q0) -> conv1/term0/rescaled; …;
             Adds up to conv1/sum; conv1/bias; merged: one conv1/merged instead of the terms
    """
    node, builder = site.node, site.builder
    count = len(site.stored.series)
    merged = site.plan.layout == "merged"
    groups = [tuple(range(count))] if merged else [(i,) for i in range(count)]
    lower = _conv_term if node.op == "Conv" else _matmul_term
    outputs = [lower(site, node.inputs[0], group, quantizer) for group in groups]
    bias = _bias(site)
    final = site.remove()
    if bias is None:
        if len(outputs) > 1:
            site.sum(outputs, final)
        else:
            _write(outputs[0], final)
        return
    total = outputs[0]
    if len(outputs) > 1:
        total = builder.variable(f"{site.name}/sum")
        site.sum(outputs, total)
    builder.add(
        "Add",
        f"{site.name}/bias",
        [total, bias],
        output=final,
        metadata={"onnxq.node": site.name},
    )


def _conv_term(site: Site, x: Any, group: tuple[int, ...], quantizer: ActivationQuantizer) -> Any:
    builder, name = site.builder, _term_name(site, group)
    bits = site.plan.bits * len(group)
    signed = bits <= SAFE_BITS and site.plan.conv_activations == "int8"
    xq = quantizer.int8(builder, x) if signed else quantizer.uint8(builder, x)
    zero_point = 2 ** (bits - 1)
    weight = site.stored.integer_weight(builder, group, signed=False, zero_point=zero_point)
    zero = builder.scalar(np.uint8(zero_point))
    product = builder.add(
        "ConvInteger",
        name,
        [xq.q, weight, xq.zero_point, zero],
        attrs=site.node.attrs,
        metadata=site.basis_metadata(group),
    )
    scale = site.stored.channel_scale(builder, group[-1], (site.stored.weight.out,))
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    # DequantizeLinear takes int32: one pass over the output instead of Cast and Mul.
    return builder.add("DequantizeLinear", f"{name}/rescaled", [product, both], attrs={"axis": 1})


def _matmul_term(site: Site, x: Any, group: tuple[int, ...], quantizer: ActivationQuantizer) -> Any:
    builder, name, stored = site.builder, _term_name(site, group), site.stored
    bits = site.plan.bits * len(group)
    xq = quantizer.uint8(builder, x)
    signed = bits <= SAFE_BITS
    zero_point = 0 if signed else 2 ** (bits - 1)
    weight = stored.integer_weight(builder, group, signed=signed, zero_point=zero_point)
    zero = [] if signed else [builder.scalar(np.uint8(zero_point))]
    product = builder.add(
        "MatMulInteger",
        name,
        [xq.q, weight, xq.zero_point, *zero],
        metadata=site.basis_metadata(group),
    )
    flat = len(stored.weight.shape) == 2
    shape = (stored.weight.out,) if flat else stored.weight.channel_shape()
    scale = stored.channel_scale(builder, group[-1], shape)
    # Cast, Mul, Mul in this order are what onnxruntime fuses to DynamicQuantizeMatMul.
    as_float = builder.add("Cast", f"{name}/float", [product], attrs={"to": TensorProto.FLOAT})
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    return builder.add("Mul", f"{name}/rescaled", [as_float, both])


def _term_name(site: Site, group: tuple[int, ...]) -> str:
    return f"{site.name}/merged" if len(group) > 1 else f"{site.name}/term{group[0]}"


def _bias(site: Site) -> Any:
    """What is added after the sum, as [out, 1, …], or None."""
    node, builder = site.node, site.builder
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    bias, name = node.inputs[2], f"{site.name}/bias"
    shape = (-1, *(1 for _ in site.stored.weight.shape[2:]))
    if is_constant(bias):
        return builder.constant(name, values(bias).reshape(shape))
    target = builder.constant(f"{name}/shape", np.array(shape, np.int64))
    return builder.add("Reshape", f"{name}/reshaped", [bias, target])


def _write(tensor: Any, final: Any) -> None:
    """Let the producer of `tensor` write `final` instead."""
    producer = tensor.inputs[0]
    slot = next(i for i, out in enumerate(producer.outputs) if out is tensor)
    producer.outputs[slot] = final
