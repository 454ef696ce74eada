"""Integer compute of terms that cover a part of a weight: as if the rest of them were zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from expanding import expand, initializers, optimized
from partial_plans import OUT, SOME, oracle, planned
from small import feeds, model, ops, run, weights

from onnxq.plan import Plan


def conv(group: int = 1, attrs: str = "pads = [1,1,1,1]", out: int = OUT) -> onnx.ModelProto:
    return model(
        f"""g (float[1,4,9,9] x) => (float[1,{out},h,v] y) {{
            [op] y = Conv <{attrs}, group = {group}> (x, w, b)
        }}""",
        {"w": weights(out, 4 // group, 3, 3), "b": weights(out, seed=1)},
    )


def matmul(out: int = OUT) -> onnx.ModelProto:
    return model(
        f"g (float[3,20] x) => (float[3,{out}] y) {{ [op] y = MatMul (x, w) }}",
        {"w": weights(20, out)},
    )


def batched() -> onnx.ModelProto:
    return model(
        "g (float[2,3,20] x) => (float[2,3,5] y) { [op] y = MatMul (x, w) }",
        {"w": weights(2, 20, 5)},
    )


def integer(proto: onnx.ModelProto, points: np.ndarray | None = None, **fields: Any) -> Plan:
    return planned(
        proto, points, **{"activations": "dynamic", "layout": "parallel", "terms": 3, **fields}
    )


def whole(proto: onnx.ModelProto, plan: Plan) -> Plan:
    """The same integers and scales, with terms that cover the whole weight."""
    series = oracle(proto, plan)
    entry = plan["op"].model_copy(update={"centre": False, "offset": False})
    made = Plan(nodes=[entry])
    made.scales["op"] = plan.scales["op"]
    made.integers["op"] = tuple(term.q for term in series.terms)
    return made


FEW = np.ones(40, np.int8)
FEW[[3, 17, 18]] = 2, 3, 2
TYPES = [
    {},
    {"target": "cpu-vnni"},
    {"target": "cpu-arm"},
    {"bits": 7},
    {"packing": "uint8"},
    {"series": "joint"},
    {"conv_activations": "uint8"},
]


@pytest.mark.parametrize("fields", TYPES, ids=str)
@pytest.mark.parametrize(
    ("proto", "points"),
    [
        (conv(), SOME),
        (conv(2), SOME),
        (conv(4), SOME),
        (conv(attrs="pads = [2,0,1,1], strides = [2,2], dilations = [1,2]"), SOME),
        (conv(out=40), FEW),
        (conv(2, out=40), FEW),
        (conv(out=40), np.minimum(FEW, 2)),
        (conv(), np.ones(OUT, np.int8)),
        (conv(), np.full(OUT, 3, np.int8)),
        (matmul(), SOME),
        (matmul(40), FEW),
        (batched(), np.array([1, 2, 3, 1, 1, 1, 2, 1, 1, 1], np.int8)),
    ],
)
def test_points(proto, points, fields):
    after, plan = expand(proto, integer(proto, points, **fields))
    same, _ = expand(proto, whole(proto, plan))
    for optimize in (True, False):
        (got,) = run(after, feeds(proto), optimize=optimize)
        (want,) = run(same, feeds(proto), optimize=optimize)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("proto", [conv(out=40), matmul(40)], ids=["conv", "matmul"])
def test_points_and_activation_terms(proto):
    after, plan = expand(proto, integer(proto, FEW, activation_terms=2, products="all"))
    same, _ = expand(proto, whole(proto, plan))
    (got,), (want,) = run(after, feeds(proto)), run(same, feeds(proto))
    # the same products, added up in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_points_merged():
    proto = conv()
    fields = {"layout": "merged", "terms": 2, "target": "cpu-vnni"}
    after, plan = expand(proto, integer(proto, np.minimum(SOME, 2), **fields))
    same, _ = expand(proto, whole(proto, plan))
    np.testing.assert_array_equal(run(after, feeds(proto))[0], run(same, feeds(proto))[0])


def test_a_few_channels_are_outputs_of_the_same_node():
    after, _ = expand(conv(out=40), integer(conv(out=40), FEW))
    assert ops(after).count("ConvInteger") == 1
    (product,) = [n for n in optimized(after).graph.node if n.op_type == "ConvInteger"]
    stored = {t.name: t for t in optimized(after).graph.initializer}
    # 40 channels, three with a second term, one with a third, and zeros
    assert list(stored[product.input[1]].dims) == [45, 4, 3, 3]
    assert list(initializers(after)["w/term2/q"].dims) == [1, 4, 3, 3]


def test_many_channels_have_a_node_of_their_own():
    after, _ = expand(conv(), integer(conv(), np.full(OUT, 2, np.int8), terms=2))
    assert ops(after).count("ConvInteger") == 2


@pytest.mark.parametrize(
    "attrs",
    [
        "pads = [1,1,1,1]",
        "pads = [1,2,3,1]",
        "pads = [2,2,2,2], dilations = [2,2]",
        "pads = [1,1,1,1], strides = [2,1]",
        'auto_pad = "SAME_UPPER"',
        'auto_pad = "SAME_LOWER", strides = [2,2]',
        "pads = [0,0,0,0]",
        'auto_pad = "VALID"',
    ],
)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("fields", [{}, {"bits": 7}, {"packing": "uint8"}])
def test_centre(attrs, group, fields):
    proto = conv(group, attrs)
    after, plan = expand(proto, integer(proto, centre=True, **fields))
    same, _ = expand(proto, whole(proto, plan))
    for optimize in (True, False):
        np.testing.assert_array_equal(
            run(after, feeds(proto), optimize=optimize)[0],
            run(same, feeds(proto), optimize=optimize)[0],
        )


def test_the_centre_is_a_convolution_of_one_tap():
    after, _ = expand(conv(), integer(conv(), centre=True))
    first = next(n for n in after.graph.node if n.name == "op/term0")
    assert first.op_type == "ConvInteger"
    kernel = next(a for a in first.attribute if a.name == "kernel_shape")
    assert list(kernel.ints) == [1, 1]


@pytest.mark.parametrize("fields", TYPES, ids=str)
@pytest.mark.parametrize("layout", ["parallel", "merged"])
@pytest.mark.parametrize(
    ("proto", "points"),
    [
        (conv(), None),
        (conv(2), None),
        (conv(2, out=40), FEW),
        (conv(attrs="pads = [2,0,1,1], strides = [2,2]"), SOME),
        (matmul(), None),
        (matmul(40), FEW),
        (batched(), None),
    ],
)
def test_offset(proto, points, layout, fields):
    """The difference that the offset makes is the node with a weight that is β throughout."""
    terms = 2 if layout == "parallel" else max(8 // fields.get("bits", 4), 1)
    fields = {"terms": terms, "layout": layout, **fields}
    fields = {**fields, "terms": min(fields["terms"], terms), "series": "digit"}
    plan = integer(proto, None if points is None else np.minimum(points, terms), **fields)
    plan.nodes[0] = plan.nodes[0].model_copy(update={"offset": True})
    after, plan = expand(proto, plan)
    without, _ = expand(proto, whole(proto, plan))
    # activations of 8 bits hold these inputs exactly
    x = np.random.default_rng(0).integers(-100, 100, feeds(proto)["x"].shape).astype(np.float32)
    x.reshape(-1)[:2] = -128, 127
    beta = np.broadcast_to(
        oracle(proto, plan).offset[:, None], oracle(proto, plan).terms[0].q.shape
    )
    constant = onnx.ModelProto()
    constant.CopyFrom(proto)
    for tensor in constant.graph.initializer:
        shape = tuple(tensor.dims)
        if tensor.name == "w":
            value = beta.reshape(shape) if proto.graph.node[0].op_type == "Conv" else (
                np.swapaxes(beta.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2)
            )  # fmt: skip
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), "w"))
        else:
            zeros = np.zeros(shape, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
    want = run(without, {"x": x})[0] + run(constant, {"x": x})[0]
    for optimize in (True, False):
        (got,) = run(after, {"x": x}, optimize=optimize)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max() + 1e-3)


@pytest.mark.parametrize("layout", ["parallel", "merged"])
@pytest.mark.parametrize("proto", [conv(), matmul()], ids=["conv", "matmul"])
def test_static(proto, layout):
    plan = integer(proto, np.minimum(SOME, 2), activations="static", layout=layout, terms=2)
    plan.ranges["x"] = (-4.0, 4.0)
    after, plan = expand(proto, plan)
    same = whole(proto, plan)
    same.ranges["x"] = (-4.0, 4.0)
    same, _ = expand(proto, same)
    np.testing.assert_array_equal(run(after, feeds(proto))[0], run(same, feeds(proto))[0])
