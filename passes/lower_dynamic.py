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
from onnxq.passes.outlier_columns import Rows, column_product, split_input
from onnxq.passes.partial_products import (
    centre_attrs,
    few_columns,
    has_few_columns,
    matmul_offset,
    spread_columns,
)
from onnxq.passes.quantize_activations import ActivationQuantizer, Quantized
from onnxq.passes.site import Site
from onnxq.passes.stacked_terms import Stack
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
             terms of some channels: further outputs of conv1/term0; see stacked_terms.py
             outliers: fc1/outliers, a float MatMul of a few columns; see outlier_columns.py
    """
    node, builder = site.node, site.builder
    outputs: list[Any] = []
    products = _products(site)
    split = split_input(site, quantizer) if site.plan.outliers else None
    x = node.inputs[0] if split is None else split.others
    for product in products:
        if _is_stacked(site, product, products):
            continue
        kind = product.pair.activation
        bits = site.plan.activation_bits
        xq = quantizer.term(builder, x, kind, bits, product.activation)
        if node.op == "Conv":
            outputs += _conv_products(site, product, products, xq)
            continue
        outputs.append(_matmul_product(site, product, xq))
        if site.plan.offset and product.weight[0] == 0:
            outputs.append(matmul_offset(site, f"{product.name}/offset", xq, _type(product)))
    if split is not None:
        rows = [_rows(site, product) for product in products if product.activation == 0]
        outputs.append(column_product(site, split, rows))
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
        rows = site.stored.series.terms[i].rows
        if not merged and rows is not None and not len(rows):
            continue
        name = f"{site.name}/merged" if len(groups[i]) > 1 else f"{site.name}/term{i}"
        name = f"{name}x{j}" if plan.activation_terms > 1 else name
        made.append(_Product(groups[i], j, name, bits, pair))
    return made


def _metadata(site: Site, product: _Product) -> dict[str, str]:
    found = site.basis_metadata(product.weight)
    if site.plan.activation_terms > 1:
        found["onnxq.activation_term"] = str(product.activation)
    return found


def _weight(site: Site, product: _Product, *, part: bool = False) -> tuple[Any, Any]:
    """The integer weight and its zero point, None if it is 0.

    part: only what its term covers, as columns of a MatMul or as a kernel of one tap.
    """
    kind: IntType = product.pair.weight
    zero_point = weight_zero_point(kind, product.bits)
    if not part:
        weight = site.stored.integer_weight(
            site.builder, product.weight, signed=kind == "int8", zero_point=zero_point
        )
    elif site.node.op == "Conv":
        weight = site.stored.integer_rows(
            site.builder, product.weight[0], _type(product), zero_point
        )
    else:
        weight = few_columns(site, product.weight[0], _type(product), zero_point)
    return weight, site.builder.scalar(np.uint8(zero_point)) if zero_point else None


def _type(product: _Product) -> int:
    return int(TensorProto.INT8 if product.pair.weight == "int8" else TensorProto.UINT8)


def _stack(site: Site, product: _Product, products: list[_Product]) -> Stack | None:
    """What a Conv with this product's weight computes too, None if that is nothing.

    The first term carries those terms of some channels that go with the same activation term.
    """
    series = site.stored.series
    if site.node.op != "Conv" or product.weight[0] != 0 or series.terms[0].columns is not None:
        return None
    terms = tuple(
        other.weight[0]
        for other in products
        if other.activation == product.activation
        and len(other.weight) == 1
        and series.terms[other.weight[0]].rows is not None
    )
    wanted = Stack(site, terms, site.plan.offset)
    if not wanted.pays:
        wanted = Stack(site, (), site.plan.offset)
    return wanted if wanted.terms or wanted.offset else None


def _is_stacked(site: Site, product: _Product, products: list[_Product]) -> bool:
    """Whether the node of another product computes this one."""
    carrier = next((p for p in products if p.activation == product.activation), product)
    if carrier is product or len(product.weight) != 1:
        return False
    stack = _stack(site, carrier, products)
    return stack is not None and product.weight[0] in stack.terms


def _conv_products(
    site: Site, product: _Product, products: list[_Product], xq: Quantized
) -> list[Any]:
    """The product's output, and those of what its node computes too."""
    stack = _stack(site, product, products)
    if stack is None:
        return [_conv_product(site, product, xq)]
    builder, name = site.builder, product.name
    carrier, zero = _weight(site, product)
    zero_point = weight_zero_point(product.pair.weight, product.bits)
    weight = stack.weight(carrier, _type(product), zero_point)
    scales = builder.constant(f"{name}/scales", stack.scales(product.weight[-1]))
    terms = (*product.weight, *stack.terms)
    integers = builder.add(
        "ConvInteger",
        name,
        [xq.q, weight, xq.zero_point, *([] if zero is None else [zero])],
        attrs=site.node.attrs,
        metadata={**_metadata(site, product), **site.basis_metadata(terms)},
    )
    return stack.unstack(_rescaled(site, integers, xq, scales, name))


def _conv_product(site: Site, product: _Product, xq: Quantized) -> Any:
    builder, name = site.builder, product.name
    attrs = site.node.attrs
    centre = None
    if site.stored.series.terms[product.weight[0]].columns is not None:
        centre = centre_attrs(site.node, site.stored.weight.shape[2:])
    weight, zero = _weight(site, product, part=centre is not None)
    integers = builder.add(
        "ConvInteger",
        name,
        [xq.q, weight, xq.zero_point, *([] if zero is None else [zero])],
        attrs=attrs if centre is None else centre,
        metadata=_metadata(site, product),
    )
    scale = site.stored.channel_scale(builder, product.weight[-1], (site.stored.weight.out,))
    return _rescaled(site, integers, xq, scale, name)


def _rescaled(site: Site, integers: Any, xq: Quantized, scale: Any, name: str) -> Any:
    both = site.builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    # DequantizeLinear takes int32: one pass over the output instead of Cast and Mul.
    return site.builder.add(
        "DequantizeLinear", f"{name}/rescaled", [integers, both], attrs={"axis": 1}
    )


def _matmul_product(site: Site, product: _Product, xq: Quantized) -> Any:
    builder, name, stored = site.builder, product.name, site.stored
    few = len(product.weight) == 1 and has_few_columns(site, product.weight[0])
    weight, zero = _weight(site, product, part=few)
    integers = builder.add(
        "MatMulInteger",
        name,
        [xq.q, weight, xq.zero_point, *([] if zero is None else [zero])],
        metadata=_metadata(site, product),
    )
    flat = len(stored.weight.shape) == 2
    shape = (stored.weight.out,) if flat else stored.weight.channel_shape()
    scale = stored.channel_scale(builder, product.weight[-1], (-1,) if few else shape, part=few)
    # Cast, Mul, Mul in this order are what onnxruntime fuses: with DynamicQuantizeLinear and one
    # reader to DynamicQuantizeMatMul, else to MatMulIntegerToFloat.
    as_float = builder.add("Cast", f"{name}/float", [integers], attrs={"to": TensorProto.FLOAT})
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    made = builder.add("Mul", f"{name}/rescaled", [as_float, both])
    return spread_columns(site, product.weight[0], made, name) if few else made


def _rows(site: Site, product: _Product) -> Rows:
    weight, _ = _weight(site, product)
    scale = site.stored.channel_scale(site.builder, product.weight[-1], (site.stored.weight.out,))
    return Rows(weight, weight_zero_point(product.pair.weight, product.bits), scale)


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
