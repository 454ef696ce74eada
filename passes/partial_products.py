"""Integer products of terms that cover a part of a weight, where no other node computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from onnxq.passes.quantize_activations import Quantized
from onnxq.passes.site import Site

# Measured (benchmarks/point_forms.py): up to this share of the columns a small MatMulInteger, whose
# output a float MatMul with a 0/1 matrix brings to its places, is faster than one of all columns.
# Gather and ScatterND along the last axis are slower than either.
LARGEST_SHARE = 0.25


def centre_attrs(node: Any, kernel: tuple[int, ...]) -> dict[str, Any] | None:
    """Attributes of the 1×1 Conv that computes the centre taps of a Conv, None if there is none."""
    attrs = dict(node.attrs)
    ones = [1] * len(kernel)
    dilations = attrs.get("dilations") or ones
    auto = attrs.get("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        if any(stride != 1 for stride in attrs.get("strides") or ones):
            return None
        pads = [0] * (2 * len(kernel))
    elif auto == "VALID":
        return None
    else:
        given = attrs.get("pads") or [0] * (2 * len(kernel))
        reach = [d * (k // 2) for d, k in zip(dilations, kernel, strict=True)]
        pads = [int(p) - r for p, r in zip(given, reach * 2, strict=True)]
        if min(pads) < 0:
            return None
    attrs.pop("auto_pad", None)
    return {**attrs, "kernel_shape": ones, "dilations": ones, "pads": pads}


def has_few_columns(site: Site, i: int) -> bool:
    """Whether a term of a MatMul covers so few output channels that a small product is faster."""
    rows, weight = site.stored.series.terms[i].rows, site.stored.weight
    if rows is None or len(weight.shape) != 2:
        return False
    return len(rows) <= LARGEST_SHARE * weight.out


def few_columns(site: Site, i: int, to: int, zero_point: int) -> Any:
    """The integer weight [in, columns] of a term of some output channels."""
    builder, base = site.builder, f"{site.name}/term{i}"
    part = site.stored.integer_rows(builder, i, to, zero_point)
    return builder.add("Transpose", f"{base}/columns", [part], attrs={"perm": [1, 0]})


def spread_columns(site: Site, i: int, product: Any, name: str) -> Any:
    """[…, columns] as […, out], zeros for the channels that the term does not cover."""
    builder, rows = site.builder, np.asarray(site.stored.series.terms[i].rows)
    places = builder.constant(f"{name}/places", rows.astype(np.int64))
    inputs = [
        places,
        builder.scalar(np.int64(site.stored.weight.out)),
        builder.constant(f"{name}/values", np.array([0, 1], np.float32)),
    ]
    matrix = builder.add("OneHot", f"{name}/spread", inputs, attrs={"axis": -1})
    return builder.add("MatMul", f"{name}/channels", [product, matrix])


def matmul_offset(site: Site, name: str, xq: Quantized, to: int) -> Any:
    """β times the sum of each row of the activation, from integers; [rows, out]."""
    builder, stored = site.builder, site.stored
    inputs = stored.weight.shape[-2]
    kind = np.int8 if to == TensorProto.INT8 else np.uint8
    ones = builder.constant(f"{name}/ones", np.ones((inputs, 1), kind))
    sums = builder.add("MatMulInteger", f"{name}/sums", [xq.q, ones, xq.zero_point])
    as_float = builder.add("Cast", f"{name}/float", [sums], attrs={"to": TensorProto.FLOAT})
    scaled = builder.add("Mul", f"{name}/rescaled", [as_float, xq.scale])
    flat = len(stored.weight.shape) == 2
    shape = (stored.weight.out,) if flat else stored.weight.channel_shape()
    offset = stored.channel_offset(builder, shape)
    return builder.add("Mul", name, [scaled, offset])
