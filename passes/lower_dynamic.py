"""Dynamic integer compute: activations quantized at run time, products in int32.

Which pair of 8-bit types is used (measured on onnxruntime; exact on every CPU):

| operator      | weight bits | activation · weight | why                                         |
|---------------|-------------|---------------------|---------------------------------------------|
| ConvInteger   | <= 7        | int8 · uint8        | the fastest pair; |w| <= 127 cannot saturate |
| ConvInteger   | 8           | uint8 · uint8       | int8·uint8 saturates on AVX2 without VNNI   |
| MatMulInteger | <= 7        | uint8 · int8        | the fastest pair; |w| <= 64 cannot saturate  |
| MatMulInteger | 8           | uint8 · uint8       | uint8·int8 saturates on AVX2 without VNNI   |

(x86 CPUs without VNNI add two 8-bit products in 16 bits: onnxruntime issue 6004.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxq.model import is_constant, values
from onnxq.passes.edit import Builder, remove_node
from onnxq.passes.lower_float import add_terms, basis_metadata
from onnxq.passes.quantize_activations import ActivationQuantizer, Quantized
from onnxq.passes.stored_terms import StoredTerms
from onnxq.plan import NodePlan

SAFE_BITS = 7


def lower_dynamic(
    graph: gs.Graph,
    node: gs.Node,
    stored: StoredTerms,
    plan: NodePlan,
    builder: Builder,
    quantizer: ActivationQuantizer,
) -> None:
    """Replace a node by integer basis nodes.

    Given:   conv1(x, W, b)
    Result:  x -> quantize; conv1/term0 = ConvInteger(xq, q0) -> conv1/term0/rescaled; …;
             Adds up to conv1/sum; conv1/bias
    """
    count = len(stored.series.terms)
    merged = plan.layout == "merged"
    groups = [tuple(range(count))] if merged else [(i,) for i in range(count)]
    wide = plan.bits * count if merged else plan.bits
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    lower = _conv_term if node.op == "Conv" else _matmul_term
    x = _left_operand(node, builder)
    outputs = [lower(node, x, stored, group, wide, plan, builder, quantizer) for group in groups]
    final = node.outputs[0]
    rank = len(stored.weight.shape)
    op_type, attrs = node.op, dict(node.attrs)
    remove_node(graph, node)
    if bias is None:
        add_terms(builder, plan, outputs, final) if len(outputs) > 1 else _rename(outputs[0], final)
        return
    total = outputs[0]
    if len(outputs) > 1:
        total = builder.variable(f"{plan.name}/sum")
        add_terms(builder, plan, outputs, total)
    addend = _bias(builder, plan, op_type, attrs, bias, rank)
    builder.add(
        "Add",
        f"{plan.name}/bias",
        [total, addend],
        output=final,
        metadata={"onnxq.node": plan.name},
    )


def _left_operand(node: gs.Node, builder: Builder) -> Any:
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return builder.add(
            "Transpose", f"{node.name}/transposed", [node.inputs[0]], attrs={"perm": [1, 0]}
        )
    return node.inputs[0]


def _conv_term(
    node: gs.Node,
    x: Any,
    stored: StoredTerms,
    group: tuple[int, ...],
    bits: int,
    plan: NodePlan,
    builder: Builder,
    quantizer: ActivationQuantizer,
) -> Any:
    xq = quantizer.int8(builder, x) if bits <= SAFE_BITS else quantizer.uint8(builder, x)
    zero_point = 2 ** (bits - 1)
    weight = stored.integer_weight(builder, group, signed=False, zero_point=zero_point)
    name = _term_name(plan, group)
    zero = builder.constant(f"{name}/weight_zero_point", np.array(zero_point, np.uint8))
    product = builder.add(
        "ConvInteger",
        name,
        [xq.q, weight, xq.zero_point, zero],
        attrs=node.attrs,
        metadata=basis_metadata(plan, "+".join(map(str, group))),
    )
    scale = stored.channel_scale(builder, group[-1], 1.0, (stored.weight.out,))
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    # DequantizeLinear takes int32: one pass over the output instead of Cast and Mul.
    return builder.add("DequantizeLinear", f"{name}/rescaled", [product, both], attrs={"axis": 1})


def _matmul_term(
    node: gs.Node,
    x: Any,
    stored: StoredTerms,
    group: tuple[int, ...],
    bits: int,
    plan: NodePlan,
    builder: Builder,
    quantizer: ActivationQuantizer,
) -> Any:
    xq: Quantized = quantizer.uint8(builder, x)
    signed = bits <= SAFE_BITS
    zero_point = 0 if signed else 2 ** (bits - 1)
    weight = stored.integer_weight(builder, group, signed=signed, zero_point=zero_point)
    name = _term_name(plan, group)
    if not stored.weight.out_last:  # Gemm(transB=1); folded at load
        weight = builder.add("Transpose", f"{name}/weight", [weight], attrs={"perm": [1, 0]})
    inputs = [xq.q, weight, xq.zero_point]
    if zero_point:
        inputs.append(
            builder.constant(f"{name}/weight_zero_point", np.array(zero_point, np.uint8))
        )
    product = builder.add(
        "MatMulInteger",
        name,
        inputs,
        metadata=basis_metadata(plan, "+".join(map(str, group))),
    )
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    shape = (
        (stored.weight.out,) if len(stored.weight.shape) == 2 else stored.weight.channel_shape()
    )
    scale = stored.channel_scale(builder, group[-1], alpha, shape)
    # Cast, Mul, Mul in this order are what onnxruntime fuses to DynamicQuantizeMatMul.
    as_float = builder.add("Cast", f"{name}/float", [product], attrs={"to": TensorProto.FLOAT})
    both = builder.add("Mul", f"{name}/scale", [xq.scale, scale])
    return builder.add("Mul", f"{name}/rescaled", [as_float, both])


def _term_name(plan: NodePlan, group: tuple[int, ...]) -> str:
    return plan.name if len(group) > 1 else f"{plan.name}/term{group[0]}"


def _bias(
    builder: Builder,
    plan: NodePlan,
    op_type: str,
    attrs: dict[str, Any],
    bias: Any,
    rank: int,
) -> Any:
    """What is added after the sum: [out, 1, …] for Conv, beta·C for Gemm."""
    if op_type == "Conv":
        shape = (-1, *(1 for _ in range(rank - 2)))
        if is_constant(bias):
            return builder.constant(f"{plan.name}/bias", values(bias).reshape(shape))
        target = builder.constant(f"{plan.name}/bias/shape", np.array(shape, np.int64))
        return builder.add("Reshape", f"{plan.name}/bias/reshaped", [bias, target])
    beta = float(attrs.get("beta", 1.0))
    if beta == 1.0:
        return bias
    if is_constant(bias):
        return builder.constant(f"{plan.name}/bias", values(bias) * np.float32(beta))
    factor = builder.constant(f"{plan.name}/beta", np.array(beta, np.float32))
    return builder.add("Mul", f"{plan.name}/bias/scaled", [bias, factor])


def _rename(tensor: Any, final: Any) -> None:
    """Let the producer of `tensor` write `final` instead."""
    producer = tensor.inputs[0]
    slot = next(i for i, out in enumerate(producer.outputs) if out is tensor)
    producer.outputs[slot] = final
