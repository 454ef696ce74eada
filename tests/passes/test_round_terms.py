"""Digits of channels with different numbers of terms, rounded when terms are dropped."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from expanding import expand
from partial_plans import OUT, SOME, as_weight, oracle, planned, used_weights
from small import feeds, model, run, weights

from onnxq.errors import ModelError
from onnxq.kernels_ref.round_digits import round_digits
from onnxq.model import load, to_proto
from onnxq.passes.truncate_terms import TruncateTerms
from onnxq.pipeline import apply
from onnxq.plan import Plan

MODELS = {
    "conv": model(
        f"""g (float[1,4,9,9] x) => (float[1,{OUT},h,v] y) {{
            [op] y = Conv <pads = [1,1,1,1], group = 2> (x, w, b)
        }}""",
        {"w": weights(OUT, 2, 3, 3), "b": weights(OUT, seed=1)},
    ),
    "matmul": model(
        f"g (float[3,20] x) => (float[3,{OUT}] y) {{ [op] y = MatMul (x, w) }}",
        {"w": weights(20, OUT)},
    ),
    "transposed": model(
        f"""g (float[1,4,5,5] x) => (float[1,{OUT},h,v] y) {{
            [op] y = ConvTranspose <group = 2> (x, w)
        }}""",
        {"w": weights(4, OUT // 2, 3, 3)},
    ),
}
FORMS = {
    "merged": {},
    "parallel": {"layout": "parallel"},
    "packed": {"packing": "uint8"},
    "3 bits": {"bits": 3},
    "blocks": {"granularity": "per_block", "block_size": 8},
    "offset": {"offset": True},
}
POINTS = {
    "one": np.array([1, 1, 1, 3, 1, 1, 1, 1], np.int8),
    "some": SOME,
    "most two, few three": np.array([2, 2, 2, 3, 2, 2, 2, 2], np.int8),
    "without the middle": np.where(SOME > 1, 3, 1).astype(np.int8),
}


def truncated(proto: onnx.ModelProto, terms: int, plan: Plan | None) -> onnx.ModelProto:
    loaded = load(proto)
    apply(TruncateTerms(terms, plan), loaded)
    after = to_proto(loaded)
    onnx.checker.check_model(after, full_check=True)
    return after


def weight_of(proto: onnx.ModelProto, after: onnx.ModelProto) -> np.ndarray:
    """What all basis nodes of float compute multiply by, in the weight's own shape."""
    return sum(weight.astype(np.float64) for weight in used_weights(proto, after))


def rounded_rows(proto: onnx.ModelProto, plan: Plan, keep: int) -> np.ndarray:
    """Each row of the whole series rounded on its own, from the digits that it has."""
    entry, series = plan["op"], oracle(proto, plan)
    rows = np.zeros(series.terms[0].q.shape)
    for row, points in enumerate(plan.points["op"]):
        digits = [term.q[row] for term in series.terms[:points]]
        if points > keep:
            digits = list(round_digits(digits, entry.bits, keep))
        for q, scale in zip(digits, plan.scales["op"], strict=False):
            own = np.repeat(scale[row], entry.block_size or 1)[: q.size]
            rows[row] += q * (own.astype(np.float64) if entry.block_size else float(scale[row]))
        rows[row] += plan.offsets["op"][row] if entry.offset else 0
    return rows


@pytest.mark.parametrize("points", list(POINTS))
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("keep", [1, 2])
def test_each_row_is_rounded_from_what_it_has(name, form, points, keep):
    proto = MODELS[name]
    whole, plan = expand(proto, planned(proto, POINTS[points], **FORMS[form]))
    found = weight_of(proto, truncated(whole, keep, plan))
    want = as_weight(proto, rounded_rows(proto, plan, keep))
    # three numbers of at most this size, added in float32
    np.testing.assert_allclose(found, want, rtol=0, atol=2**-22 * np.abs(want).max())


@pytest.mark.parametrize("points", list(POINTS))
@pytest.mark.parametrize("layout", ["merged", "parallel"])
@pytest.mark.parametrize("name", ["conv", "matmul"])
def test_integer_compute(name, layout, points):
    """Of 2 bits and three terms: the same rounded weight as float compute has."""
    proto, feed = MODELS[name], feeds(MODELS[name])
    fields = {"bits": 2, "activations": "dynamic", "layout": layout}
    whole, plan = expand(proto, planned(proto, POINTS[points], **fields))
    outputs = [run(truncated(whole, 1, given), feed)[0] for given in (plan, None)]
    exact = {"activations": "none"}
    floats = plan.model_copy(
        update={"nodes": [node.model_copy(update=exact) for node in plan.nodes]}
    )
    same, _ = expand(proto, floats)
    want = run(truncated(same, 1, floats), feed)[0]
    # activations in 8 bits: half a step of at most range / 255, for each input of a row
    reach = np.abs(rounded_rows(proto, plan, 1)).sum(axis=1).max()
    x = feed["x"]
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    assert np.abs(outputs[0] - want).max() <= reach * step * 0.51
    assert np.abs(outputs[1] - want).max() > reach * step * 0.51  # digits cut off


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_rounding_does_not_lean(activations):
    """As of whole terms: the mean of cut digits is 1/32 step per weight, of rounded ones 0."""
    inputs = 4096
    proto = model(
        f"g (float[1,{inputs}] x) => (float[1,{OUT}] y) {{ [op] y = MatMul (x, w) }}",
        {"w": weights(inputs, OUT)},
    )
    fields = {"activations": activations, "layout": "parallel"}
    whole, plan = expand(proto, planned(proto, POINTS["most two, few three"], **fields))
    ones = {"x": np.ones((1, inputs), np.float32)}  # which dynamic activations hold exactly
    want, rounded, cut = (
        run(each, ones)[0][0]
        for each in (whole, truncated(whole, 1, plan), truncated(whole, 1, None))
    )
    per_step = plan.scales["op"][0] * inputs
    assert abs(((cut - want) / per_step).mean()) > 0.8 / 32
    # errors of at most half a step each: 5 standard deviations
    assert abs(((rounded - want) / per_step).mean()) < 5 * 0.5 / np.sqrt(inputs * OUT)


def test_a_centre_keeps_a_term_of_the_whole_kernel():
    proto = model(
        f"""g (float[1,4,9,9] x) => (float[1,{OUT},9,9] y) {{
            [op] y = Conv <pads = [1,1,1,1]> (x, w, b)
        }}""",
        {"w": weights(OUT, 4, 3, 3), "b": weights(OUT, seed=1)},
    )
    for layout in ("merged", "parallel"):
        whole, plan = expand(proto, planned(proto, centre=True, layout=layout))
        after = truncated(whole, 1, plan)
        series, scales = oracle(proto, plan), plan.scales["op"]
        (one,) = round_digits([term.q for term in series.terms[1:]], plan["op"].bits, 1)
        rows = series.terms[0].q * scales[0][:, None].astype(np.float64)
        want = as_weight(proto, rows + one * scales[1][:, None].astype(np.float64))
        np.testing.assert_allclose(
            weight_of(proto, after), want, rtol=0, atol=2**-22 * np.abs(want).max()
        )
        assert truncated(after, 1, plan_of(plan, terms=2)) == after


def plan_of(plan: Plan, **fields: object) -> Plan:
    nodes = [node.model_copy(update=fields) for node in plan.nodes]
    return plan.model_copy(update={"nodes": nodes})


def test_rows_of_another_node_are_refused():
    proto = MODELS["conv"]
    whole, plan = expand(proto, planned(proto, SOME))
    for tensor in whole.graph.initializer:
        if tensor.name == "w/term1/rows":
            rows = onnx.numpy_helper.to_array(tensor).copy()
            rows[-1] = OUT
            tensor.CopyFrom(onnx.numpy_helper.from_array(rows, tensor.name))
    with pytest.raises(ModelError, match="'w/term1/q' is of other rows"):
        TruncateTerms(1, plan)(load(whole))
