"""Float compute of MatMul with weights that stay integers in memory: MatMulNBits.

onnxruntime makes one MatMulNBits of DequantizeLinear → MatMul when it loads the model. By default
that also quantizes the activations, to int8 with one scale per row and block; the session option
`session.qdq_matmulnbits_accuracy_level` = "0" computes in float32 instead. What is not fused is
dequantized again at every run, so that a form that onnxruntime would leave as it is is no gain.
What it fuses was found by loading models in 1.18 to 1.20, 1.23 to 1.27, 1.29 and 1.31:

| what                                         | fused                                        |
|----------------------------------------------|----------------------------------------------|
| 4 bits, blocks of 16 to 256 along axis 0     | from 1.19 on, with a shorter last block too  |
| blocks of other sizes                        | no                                           |
| blocks of more than 256                      | to wrong numbers, or not loaded, before 1.31 |
| one scale per channel; 8-bit integers        | from 1.25 on                                 |
| MatMul + Add of a vector, fused to Gemm      | from 1.25 on                                 |
| MatMul + Add of a matrix, fused to Gemm      | no                                           |
| constants that two DequantizeLinear read     | not from 1.27 on: each needs its own         |
| constants of the graph around a body         | no: the session fails, or the process dies   |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxq.errors import ConfigError
from onnxq.kernels_ref import Term
from onnxq.model import set_metadata
from onnxq.passes.edit import consumers
from onnxq.passes.site import Site
from onnxq.passes.stored_terms import PACKED_BITS
from onnxq.passes.weights import Weight

Array = npt.NDArray[Any]

# The blocks that MatMulNBits knows are the powers of two between these.
_MIN_BLOCK, _MAX_BLOCK = 16, 256
# Block where a channel has one scale: the fastest over all shapes of benchmarks/matmul_forms.py;
# 256 pads rows such as 384, and smaller ones repeat the scale more often.
_ONE_SCALE_BLOCK = 128


def reason_against_nbits(
    node: gs.Node, weight: Weight, *, terms: int, block_size: int | None, merged: bool
) -> str | None:
    """Why onnxruntime would not make MatMulNBits of a node in this form, or None if it would.

    Args:
        node: as it stands in the graph that will be expanded.
        weight: its weight.
        terms, block_size: as planned; None is one scale per channel.
        merged: whether several terms are to be summed before the product.
    """
    misfit = _misfit(node.op, weight, terms=terms, block_size=block_size, merged=merged)
    if misfit:
        return misfit
    if sum(reader.op == "MatMul" for reader in consumers(weight.tensor)) > 1:
        return "several nodes read its weight: each would need a copy of its own"
    if terms == 1 and _becomes_gemm(node):
        return "a matrix is added to its product: onnxruntime would make a float Gemm of both"
    return None


def lower_nbits(site: Site) -> None:
    """Replace the weight of a MatMul by integers that are dequantized where they are read.

    Given:   matmul1(x, W)
    Result:  one term: DequantizeLinear(q, scale) -> matmul1(x, ·)
             several: such a matmul1/term0, matmul1/term1, …, whose outputs matmul1/sum adds up

    The integers are stored in the shape of W, the scales as [blocks, out].

    Raises:
        ConfigError: the plan asks for it where it would be another computation.
    """
    node, plan = site.node, site.plan
    misfit = _misfit(
        node.op,
        site.stored.weight,
        terms=plan.terms,
        block_size=plan.block_size,
        merged=plan.layout == "merged",
    )
    if misfit:
        raise ConfigError(f"plan: node {site.name!r} cannot have form nbits: {misfit}")
    if plan.terms == 1:
        node.inputs[1] = _dequantized(site, 0)
        set_metadata(node, {"onnxq.pass": "expand", **site.basis_metadata((0,))})
        return
    outputs = [
        site.builder.add(
            "MatMul",
            f"{site.name}/term{i}",
            [node.inputs[0], _dequantized(site, i)],
            metadata=site.basis_metadata((i,)),
        )
        for i in range(plan.terms)
    ]
    # Not Add, which onnxruntime fuses with the MatMul to a Gemm of a float weight.
    site.builder.add(
        "Sum",
        f"{site.name}/sum",
        outputs,
        output=site.remove(),
        metadata={"onnxq.node": site.name},
    )


def _misfit(
    op: str, weight: Weight, *, terms: int, block_size: int | None, merged: bool
) -> str | None:
    """Why the form does not exist for such a node."""
    if op != "MatMul":
        return f"{op} has no such form"
    if weight.slot != 1:
        return "its constant is the left operand"
    if len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} dimensions, not 2"
    if terms > 1 and merged:
        return "merged terms are summed before the product: use layout parallel"
    if block_size is not None and _kernel_block(block_size, weight.shape[0]) < _MIN_BLOCK:
        return f"block_size {block_size} is not a multiple of {_MIN_BLOCK}"
    return None


def _kernel_block(block_size: int | None, inputs: int) -> int:
    """The largest block of MatMulNBits of which the blocks of a row of `inputs` are made up.

    Less than `_MIN_BLOCK` where there is none.
    """
    if block_size is None or block_size >= inputs:  # one scale for the whole row
        needed = 1 << (inputs - 1).bit_length()
        return min(max(needed, _MIN_BLOCK), _ONE_SCALE_BLOCK)
    return min(block_size & -block_size, _MAX_BLOCK)


def _becomes_gemm(node: gs.Node) -> bool:
    """Whether onnxruntime may fuse the Add of a matrix that follows: only rank 2 is fused."""
    readers = consumers(node.outputs[0])
    if len(readers) != 1 or readers[0].op != "Add" or _rank(node.inputs[0]) not in (2, None):
        return False
    others = [tensor for tensor in readers[0].inputs if tensor is not node.outputs[0]]
    return any(_rank(tensor) in (2, None) for tensor in others)


def _rank(tensor: Any) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _dequantized(site: Site, i: int) -> Any:
    """A term as a float matrix [in, out], its constants read by this node alone."""
    builder, weight, term = site.builder, site.stored.weight, site.stored.series.terms[i]
    base = f"{weight.tensor.name}/term{i}"
    packed = term.bits <= PACKED_BITS
    q = builder.constant(
        f"{base}/q",
        weight.from_matrix(term.q),
        TensorProto.INT4 if packed else TensorProto.INT8,
    )
    block = _kernel_block(site.plan.block_size, weight.shape[0])
    scale = builder.constant(f"{base}/scale", _block_scales(term, site.plan.block_size, block))
    return builder.add(
        "DequantizeLinear",
        f"{base}/dequantized",
        [q, scale],
        attrs={"axis": 0, "block_size": block},
    )


def _block_scales(term: Term, block_size: int | None, block: int) -> Array:
    """The scales of a term, [out, …] or one, as [blocks, out] for this block."""
    out, inputs = term.q.shape
    blocks = -(-inputs // block)
    scale = np.asarray(term.scale, np.float32)
    if scale.ndim < 2:
        scale = np.broadcast_to(scale, (out,))[:, None]
    repeats = blocks if scale.shape[1] == 1 else (block_size or inputs) // block
    return np.ascontiguousarray(np.repeat(scale, repeats, axis=1)[:, :blocks].T)
