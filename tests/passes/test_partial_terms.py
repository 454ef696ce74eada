"""Terms that cover only a part of a weight: fewer rows, the centre tap, a constant per row."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from expanding import basis_nodes, expand, initializers, optimized, with_outputs
from onnx import TensorProto, numpy_helper
from partial_plans import OUT, SOME, as_weight, oracle, planned, rows_of, used_weights
from small import feeds, model, ops, run, weights

from onnxq.errors import ConfigError
from onnxq.kernels_ref import PerAxis
from onnxq.kernels_ref.partial import Coverage, realize_partial
from onnxq.plan import NodePlan, Plan


def conv(group: int = 1, kernel: int = 3, opset: int = 17) -> onnx.ModelProto:
    return model(
        f"""g (float[1,4,9,9] x) => (float[1,{OUT},h,v] y) {{
            [op] y = Conv <pads = [1,1,1,1], group = {group}> (x, w, b)
        }}""",
        {"w": weights(OUT, 4 // group, kernel, kernel), "b": weights(OUT, seed=1)},
        opset=opset,
    )


def matmul() -> onnx.ModelProto:
    return model(
        f"g (float[3,20] x) => (float[3,{OUT}] y) {{ [op] y = MatMul (x, w) }}",
        {"w": weights(20, OUT)},
    )


def transposed() -> onnx.ModelProto:
    """Output channels are two axes of the weight."""
    return model(
        f"""g (float[1,4,5,5] x) => (float[1,{OUT},h,v] y) {{
            [op] y = ConvTranspose <group = 2> (x, w)
        }}""",
        {"w": weights(4, OUT // 2, 3, 3)},
    )


MODELS = {
    "conv": conv(),
    "grouped": conv(2),
    "depthwise": conv(4),
    "matmul": matmul(),
    "transposed": transposed(),
}
POINTS = {
    "some": SOME,
    "none": np.ones(OUT, np.int8),
    "all": np.full(OUT, 3, np.int8),
    "without the middle": np.where(SOME > 1, 3, 1).astype(np.int8),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("points", list(POINTS))
@pytest.mark.parametrize("fields", [{}, {"packing": "uint8"}, {"bits": 6}, {"series": "joint"}])
class TestPoints:
    def test_the_weight_is_that_of_the_oracle(self, name, points, fields):
        proto = MODELS[name]
        after, plan = expand(proto, planned(proto, POINTS[points], **fields))
        (weight,) = used_weights(proto, after)
        np.testing.assert_array_equal(weight, as_weight(proto, oracle(proto, plan).dequantize()))

    def test_only_their_rows_are_stored(self, name, points, fields):
        proto = MODELS[name]
        after, _ = expand(proto, planned(proto, POINTS[points], **fields))
        inputs = rows_of(proto).shape[1]
        stored = initializers(after)
        packed = fields.get("packing") == "uint8"
        for i in range(3):
            rows = int((POINTS[points] > i).sum())
            values = int(np.prod(stored[f"w/term{i}/q"].dims)) if f"w/term{i}/q" in stored else 0
            assert values == (-(-rows * inputs // 2) if packed else rows * inputs)
            if rows:
                assert int(np.prod(stored[f"w/term{i}/scale"].dims)) == rows


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("packing", ["int4", "uint8"])
@pytest.mark.parametrize("points", ["some", "none"])
def test_nothing_is_left_at_run_time(name, packing, points):
    proto = MODELS[name]
    after, _ = expand(proto, planned(proto, POINTS[points], packing=packing))
    (product,) = [n for n in optimized(after).graph.node if n.op_type != "ReorderOutput"]
    assert product.op_type in ("Conv", "MatMul", "Gemm", "ConvTranspose", "FusedMatMul")
    assert ops(optimized(after)) == ops(optimized(proto))


def test_parallel_terms_of_some_rows():
    proto = conv()
    after, plan = expand(proto, planned(proto, SOME, layout="parallel"))
    series = oracle(proto, plan)
    found = used_weights(proto, after)
    for weight, term in zip(found, series.terms, strict=True):
        np.testing.assert_array_equal(weight, as_weight(proto, term.dequantize()))


def test_blocks():
    proto = matmul()
    fields = {"granularity": "per_block", "block_size": 8, "series": "fixed_ratio"}
    after, plan = expand(proto, planned(proto, SOME, **fields))
    (weight,) = used_weights(proto, after)
    np.testing.assert_array_equal(weight, oracle(proto, plan).dequantize().T)
    assert list(initializers(after)["w/term2/q"].dims) == [1, 3, 8]


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise"])
@pytest.mark.parametrize("packing", ["int4", "uint8"])
@pytest.mark.parametrize("layout", ["merged", "parallel"])
@pytest.mark.parametrize("points", [None, SOME], ids=["all rows", "some rows"])
def test_centre(name, packing, layout, points):
    proto = MODELS[name]
    plan = planned(proto, points, centre=True, packing=packing, layout=layout)
    after, plan = expand(proto, plan)
    series = oracle(proto, plan)
    wanted = (
        [t.dequantize() for t in series.terms] if layout == "parallel" else [series.dequantize()]
    )
    for weight, rows in zip(used_weights(proto, after), wanted, strict=True):
        np.testing.assert_array_equal(weight, as_weight(proto, rows))
    inputs = 4 // {"conv": 1, "grouped": 2, "depthwise": 4}[name]
    packed = packing == "uint8"
    count = int(np.prod(initializers(after)["w/term0/q"].dims))
    assert count == (OUT * inputs // 2 if packed else OUT * inputs)
    outside = np.ones((3, 3), bool)
    outside[1, 1] = False
    first = series.terms[0].q.reshape(OUT, inputs, 3, 3)
    assert first[:, :, 1, 1].any()
    assert not first[:, :, outside].any()
    assert {n.op_type for n in optimized(after).graph.node} <= {
        "Conv", "FusedConv", "Add", "ReorderInput", "ReorderOutput",
    }  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("layout", ["merged", "parallel"])
@pytest.mark.parametrize(("bits", "terms"), [(2, 1), (2, 3), (4, 1), (4, 2)])
@pytest.mark.parametrize("points", [False, True], ids=["all rows", "some rows"])
def test_offset(name, layout, bits, terms, points):
    proto = MODELS[name]
    fields = {"offset": True, "bits": bits, "terms": terms, "layout": layout}
    after, plan = expand(
        proto, planned(proto, np.minimum(SOME, terms) if points else None, **fields)
    )
    series = oracle(proto, plan)
    assert series.offset is not None and series.offset.any()
    found = used_weights(proto, after)
    if layout == "merged" or terms == 1:
        np.testing.assert_array_equal(found[0], as_weight(proto, series.dequantize()))
    else:
        rows = [term.dequantize() for term in series.terms]
        rows[0] += series.offset[:, None]
        for weight, want in zip(found, rows, strict=True):
            np.testing.assert_array_equal(weight, as_weight(proto, want))
    assert set(ops(optimized(after))) <= {
        *ops(optimized(proto)), "Add", "FusedConv", "Gemm", "ReorderInput", "FusedMatMul",
    }  # fmt: skip


def test_nodes_that_share_a_weight_but_not_their_points():
    proto = model(
        f"""g (float[1,20] x) => (float[1,{OUT}] y, float[1,{OUT}] z) {{
            [op] y = MatMul (x, w)
            [other] z = MatMul (x, w)
        }}""",
        {"w": weights(20, OUT)},
    )
    entry = planned(matmul()).nodes[0]
    plan = Plan(nodes=[entry, entry.model_copy(update={"name": "other"})])
    plan.points = {"op": SOME, "other": POINTS["all"]}
    after, plan = expand(proto, plan)
    values = with_outputs(after, [basis_nodes(after, n)[0].input[1] for n in ("op", "other")],
                          feeds(proto))  # fmt: skip
    first, second = values.values()
    same = (first == second).all(axis=0)
    np.testing.assert_array_equal(same, SOME == 3)


def test_nodes_that_share_weight_and_points_share_the_terms():
    proto = model(
        f"""g (float[1,20] x) => (float[1,{OUT}] y, float[1,{OUT}] z) {{
            [op] y = MatMul (x, w)
            [other] z = MatMul (x, w)
        }}""",
        {"w": weights(20, OUT)},
    )
    entry = planned(matmul()).nodes[0]
    plan = Plan(nodes=[entry, entry.model_copy(update={"name": "other"})])
    plan.points = {"op": SOME, "other": SOME.copy()}
    after, plan = expand(proto, plan)
    assert plan.scales["op"] is plan.scales["other"]
    packed = [n for n, t in initializers(after).items() if t.data_type == TensorProto.INT4]
    assert packed == ["w/term0/q", "w/term1/q", "w/term2/q"]


@pytest.mark.parametrize("fields", [{"bits": 8, "terms": 2}, {"packing": "uint8"}])
def test_opset(fields):
    proto = conv(opset=9)
    after, _ = expand(proto, planned(proto, np.minimum(SOME, 2), **fields))
    assert after.opset_import[0].version == 11


def test_the_same_result_twice():
    proto = conv()
    first, plan = expand(proto, planned(proto, SOME))
    second, _ = expand(proto, plan)
    assert first.SerializeToString() == second.SerializeToString()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.ones(3, np.int8), "give integers"),
        (np.full(OUT, 4, np.int8), "1 to 3 terms"),
        (np.zeros(OUT, np.int8), "1 to 3 terms"),
    ],
)
def test_points_that_do_not_fit(points, message):
    with pytest.raises(ConfigError, match=message):
        expand(conv(), planned(conv(), points))


def test_integers_outside_of_their_part():
    proto = conv()
    _, plan = expand(proto, planned(proto, SOME))
    plan.integers["op"] = tuple(np.ones((OUT, 36), np.int8) for _ in range(3))
    with pytest.raises(ConfigError, match="outside of the part"):
        expand(proto, plan)


def test_given_integers_are_used():
    proto = conv()
    _, plan = expand(proto, planned(proto, SOME))
    integers = [term.q.copy() for term in oracle(proto, plan).terms]
    integers[0][0, 0] = 1 if integers[0][0, 0] != 1 else 2
    plan.integers["op"] = tuple(integers)
    after, _ = expand(proto, plan)
    (weight,) = used_weights(proto, after)
    changed = weight.reshape(OUT, -1) != oracle(proto, plan).dequantize()
    assert np.flatnonzero(changed).tolist() == [0]


def test_outputs():
    proto = conv()
    after, plan = expand(proto, planned(proto, SOME))
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    for tensor in single.graph.initializer:
        if tensor.name == "w":
            rows = oracle(proto, plan).dequantize()
            tensor.CopyFrom(numpy_helper.from_array(as_weight(proto, rows), "w"))
    np.testing.assert_array_equal(run(after, feeds(proto))[0], run(single, feeds(proto))[0])
    assert PerAxis(0) == plan["op"].matrix_granularity()


def test_nbits():
    """That form stores whole terms; the rows that are not covered are zeros."""
    proto = matmul()
    fields = {"form": "nbits", "layout": "parallel", "terms": 2}
    after, plan = expand(proto, planned(proto, np.minimum(SOME, 2), **fields))
    for weight, term in zip(used_weights(proto, after), oracle(proto, plan).terms, strict=True):
        np.testing.assert_array_equal(weight, term.dequantize().T)


def test_recurrent():
    proto = model(
        """g (float[3,1,5] x) => (float[3,1,1,2] y) {
            [op] y, h, c = LSTM <hidden_size = 2> (x, w, r)
        }""",
        {"w": weights(1, 8, 5), "r": weights(1, 8, 2, seed=1)},
    )
    entry = NodePlan(
        name="op/W",
        op_type="LSTM",
        weight="w",
        shape=(1, 8, 5),
        terms=3,
        series="digit",
        layout="merged",
    )
    plan = Plan(nodes=[entry])
    plan.points["op/W"] = SOME
    after, plan = expand(proto, plan)
    series = realize_partial(
        "digit",
        weights(1, 8, 5)[0],
        plan.scales["op/W"],
        Coverage(SOME),
        bits=4,
        granularity=PerAxis(0),
    )
    name = after.graph.node[-1].input[1]
    value = with_outputs(after, [name], feeds(proto))[name]
    np.testing.assert_array_equal(value[0], series.dequantize())
    assert list(initializers(after)["w/term1/q"].dims) == [3, 5]
