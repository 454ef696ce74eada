"""What float compute must give: the float operator with the series' dequantized weights."""

from __future__ import annotations

import numpy as np
import onnx
from expanding import basis_nodes, from_rows, gamma, series_of, with_outputs
from geometry import Case
from small import run

from onnxq.kernels_ref import conv
from onnxq.plan import Plan


def check_float(case: Case, after: onnx.ModelProto, plan: Plan) -> None:
    """Weights bit for bit, outputs within the rounding of float32 sums."""
    entry = plan["op"]
    series = series_of(entry, plan, case.weight, out_last=case.out_last)
    terms = [
        from_rows(t.dequantize(), case.weight.shape, out_last=case.out_last) for t in series.terms
    ]
    whole = from_rows(series.dequantize(), case.weight.shape, out_last=case.out_last)
    merged = entry.layout == "merged" or entry.terms == 1
    found = basis_nodes(after, "op")
    used = with_outputs(after, [node.input[1] for node in found], {"x": case.x})
    for node, expected in zip(found, [whole] if merged else terms, strict=True):
        actual = used[node.input[1]]
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)
    exact = _product(case, case.operand, whole)
    magnitude = sum(_product(case, np.abs(case.operand), np.abs(term)) for term in terms)
    if case.bias is not None:
        exact, magnitude = exact + case.bias, magnitude + np.abs(case.bias)
    # Per term: `products` products and additions in any order; then the sums of the terms and
    # the bias; and as many roundings again in series.dequantize(), whose sum is the oracle.
    bound = gamma(case.products + 2 * entry.terms + 4) * magnitude
    for optimize in (True, False):
        (y,) = run(after, {"x": case.x}, optimize=optimize)
        assert y.shape == exact.shape
        assert (np.abs(y - exact) <= bound).all()


def _product(case: Case, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    if "group" in case.attrs:
        return conv(x, weight, dtype=np.float64, **case.attrs)
    return np.matmul(x.astype(np.float64), weight.astype(np.float64))
