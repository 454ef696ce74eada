"""Columns of a MatMul's input that reach further than the others, multiplied in float.

The columns S of a plan are zeroed in what is quantized, whose range is found at run time as ever,
and meet the same rows of the weight in a small float product. That is right for every input and
every S; see `kernels_ref.outliers`, which also chooses S. Static columns rather than such as each
run looks for: the rows of the weight are then constants, and the range of every column, which
onnxruntime finds slowly, is not needed (measured on MiniLM: 0.81 of float latency, not 0.90).

Source: the mixed-precision decomposition of arXiv 2208.07339 (LLM.int8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto

from onnxq.passes.quantize_activations import ActivationQuantizer
from onnxq.passes.site import Site
from onnxq.passes.stored_terms import ADDED_TERM


class SplitInput(NamedTuple):
    """float32 tensors: the input [..., in] with zeros in the columns, and the columns alone."""

    others: Any
    few: Any
    indices: Any


class Rows(NamedTuple):
    """An integer weight [in, out], its zero point, and its scales [out]."""

    weight: Any
    zero_point: int
    scale: Any


def split_input(site: Site, quantizer: ActivationQuantizer) -> SplitInput:
    """Take the columns `plan.outliers` out of a node's input; once for all readers of both."""
    tensor, columns = site.node.inputs[0], site.plan.outliers
    key = (id(tensor), columns)
    if key not in quantizer.splits:
        builder, base = site.builder, f"{tensor.name}/outliers"
        kept = np.ones(site.stored.weight.shape[0], np.float32)
        kept[list(columns)] = 0
        mask = builder.constant(f"{base}/mask", kept)
        indices = builder.constant(f"{base}/indices", np.array(columns, np.int64))
        others = builder.add("Mul", f"{base}/others", [tensor, mask])
        few = builder.add("Gather", f"{base}/few", [tensor, indices], attrs={"axis": -1})
        quantizer.splits[key] = SplitInput(others, few, indices)
    found: SplitInput = quantizer.splits[key]
    return found


def column_product(site: Site, split: SplitInput, terms: Sequence[Rows]) -> Any:
    """The float product of the columns with their rows of the weight, all terms of it together.

    The rows are taken from the integer weights, so the file holds nothing twice; onnxruntime
    computes them when it loads the model.
    """
    builder, name = site.builder, f"{site.name}/outliers"
    total = None
    for i, term in enumerate(terms):
        base = f"{name}/term{i}"
        rows = builder.add("Gather", f"{base}/rows", [term.weight, split.indices])
        rows = builder.add("Cast", f"{base}/float", [rows], attrs={"to": TensorProto.FLOAT})
        if term.zero_point:
            zero = builder.scalar(np.float32(term.zero_point))
            rows = builder.add("Sub", f"{base}/centred", [rows, zero])
        rows = builder.add("Mul", f"{base}/rescaled", [rows, term.scale])
        if total is None:
            total = rows
            continue
        mark = {ADDED_TERM: str(i)}  # what `truncate` takes out
        total = builder.add("Add", f"{base}/sum", [total, rows], metadata=mark)
    return builder.add("MatMul", name, [split.few, total], metadata={"onnxq.node": site.name})
