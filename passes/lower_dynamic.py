"""Dynamic integer compute: activations quantized at run time, products in int32.

A node becomes a sum of basis nodes Q_i·A_j, weight term by activation term. Which 8-bit types a
product is computed in is said in forms.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxq.kernels_ref.products import kept_products
from onnxq.model import is_constant, values
from onnxq.passes.forms import SAFE_BITS, IntType, TypePair, type_pair, weight_zero_point
from onnxq.passes.quantize_activations import ActivationQuantizer, Quantized
from onnxq.passes.site import Site
from onnxq.plan import NodePlan


@dataclass(frozen=True)
class _Product:
    """A basis node: the terms of the weight in it (several when merged), the activation's term."""

    weight: tuple[int, ...]
    activation: int
    name: str
    bits: int  # of the integer weight
    pair: TypePair


def lower_dynamic(site: Site, quantizer: ActivationQuantizer) -> None:
    """Replace a node by integer basis nodes.

    Given:   conv1(x, W, b)
    Result:  x -> quantize; conv1/term0 = ConvInteger(xq, q0) -> conv1/term0/rescaled; …;
             Adds up to conv1/sum; conv1/bias; merged: one conv1/merged instead of the terms;
             several activation terms: conv1/term0x0, conv1/term0x1, …, or conv1/mergedx0, …
    """
    node, builder = site.node, site.builder
    lower = _conv_product if node.op == "Conv" else _matmul_product
    outputs = []
    for product in _products(site):
        kind = product.pair.activation
        bits = site.plan.activation_bits
        xq = quantizer.term(builder, node.inputs[0], kind, bits, product.activation)
        outputs.append(lower(site, product, xq))
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


def dynamic_pair(plan: NodePlan) -> TypePair:
    """The types of the products of a node; its weight is stored for them.

    On x86 without VNNI two products must fit in 16 bits. A weight of 7 bits makes them fit, and so
    do activations of 7 bits with a weight of 8: 127·128·2 (MatMul), 64·255·2 (Conv) < 2**15.
    """
    bits = _weight_bits(plan)
    fits = plan.activation_bits <= SAFE_BITS
    return type_pair(
        "Conv" if plan.op_type == "Conv" else "MatMul",
        "dynamic",
        min(bits, SAFE_BITS) if fits else bits,
        plan.target,
        convolves_int8=plan.conv_activations == "int8",
    )


def _weight_bits(plan: NodePlan) -> int:
    return plan.bits * plan.terms if plan.layout == "merged" else plan.bits


def _products(site: Site) -> list[_Product]:
    plan, count = site.plan, len(site.stored.series)
    merged = plan.layout == "merged"
    groups = [tuple(range(count))] if merged else [(i,) for i in range(count)]
    bits = _weight_bits(plan)
    kept = kept_products(
        len(groups),
        plan.activation_terms,
        plan.products,
        weight_bits=bits,
        activation_bits=plan.activation_bits,
    )
    pair = dynamic_pair(plan)
    made = []
    for i, j in kept:
        name = f"{site.name}/merged" if len(groups[i]) > 1 else f"{site.name}/term{i}"
        name = f"{name}x{j}" if plan.activation_terms > 1 else name
        made.append(_Product(groups[i], j, name, bits, pair))
    return made


def _metadata(site: Site, product: _Product) -> dict[str, str]:
    found = site.basis_metadata(product.weight)
    if site.plan.activation_terms > 1:
        found["onnxq.activation_term"] = str(product.activation)
    return found


def _weight(site: Site, product: _Product) -> tuple[Any, Any]:
    """The integer weight and its zero point, None if it is 0."""
    kind: IntType = product.pair.weight
    zero_point = weight_zero_point(kind, product.bits)
    weight = site.stored.integer_weight(
        site.builder, product.weight, signed=kind == "int8", zero_point=zero_point
    )
    return weight, site.builder.scalar(np.uint8(zero_point)) if zero_point else None


def _conv_product(site: Site, product: _Product, xq: Quantized) -> Any:
    builder, name = site.builder, product.name
    weight, zero = _weight(site, product)
    integers = builder.add(
        "ConvInteger",
        name,
        [xq.q, weight, xq.zero_point, *([] if zero is None else [zero])],
        attrs=site.node.attrs,
        metadata=_metadata(site, product),
    )
    scale = site.stored.channel_scale(builder, product.weight[-1], (site.stored.weight.out,))
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    # DequantizeLinear takes int32: one pass over the output instead of Cast and Mul.
    return builder.add("DequantizeLinear", f"{name}/rescaled", [integers, both], attrs={"axis": 1})


def _matmul_product(site: Site, product: _Product, xq: Quantized) -> Any:
    builder, name, stored = site.builder, product.name, site.stored
    weight, zero = _weight(site, product)
    integers = builder.add(
        "MatMulInteger",
        name,
        [xq.q, weight, xq.zero_point, *([] if zero is None else [zero])],
        metadata=_metadata(site, product),
    )
    flat = len(stored.weight.shape) == 2
    shape = (stored.weight.out,) if flat else stored.weight.channel_shape()
    scale = stored.channel_scale(builder, product.weight[-1], shape)
    # Cast, Mul, Mul in this order are what onnxruntime fuses: with DynamicQuantizeLinear and one
    # reader to DynamicQuantizeMatMul, else to MatMulIntegerToFloat.
    as_float = builder.add("Cast", f"{name}/float", [integers], attrs={"to": TensorProto.FLOAT})
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    return builder.add("Mul", f"{name}/rescaled", [as_float, both])


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
