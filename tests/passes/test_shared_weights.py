"""A weight that several nodes read is quantized once and stored once."""

import numpy as np
import onnx
import pytest
from expanding import basis_nodes, expand, gamma, initializers, node
from onnx import numpy_helper
from small import feeds, model, run, weights

from onnxq.kernels_ref import PerAxis, realize
from onnxq.passes import SearchScales
from onnxq.passes import search_scales as module

MODES = [("dynamic", "parallel"), ("dynamic", "merged"), ("none", "parallel"), ("none", "merged")]
PACKED = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def stored(proto: onnx.ModelProto) -> list[str]:
    """Names of the stored terms, whatever they are called."""
    return [name for name, t in initializers(proto).items() if t.data_type in PACKED]


def alone(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with only one of its nodes, and that node's output."""
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    kept = node(proto, name)
    del single.graph.node[:], single.graph.output[:], single.graph.initializer[:]
    single.graph.node.append(kept)
    single.graph.output.extend(o for o in proto.graph.output if o.name in kept.output)
    single.graph.initializer.extend(t for t in proto.graph.initializer if t.name in kept.input)
    return single


def assert_as_alone(proto: onnx.ModelProto, **options) -> onnx.ModelProto:
    """Each node computes, bit for bit, what it does where nobody shares its weight."""
    after, _ = expand(proto, **options)
    feed = feeds(proto)
    got = dict(
        zip([o.name for o in proto.graph.output], run(after, feed, optimize=False), strict=True)
    )
    for original in proto.graph.node:
        single, _ = expand(alone(proto, original.name), **options)
        inputs = {i.name for i in single.graph.input}
        (want,) = run(single, {k: v for k, v in feed.items() if k in inputs}, optimize=False)
        np.testing.assert_array_equal(got[original.output[0]], want)
    return after


@pytest.mark.parametrize(("activations", "layout"), MODES)
def test_convs_with_different_biases(activations, layout):
    proto = model(
        """g (float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,8,8] z, float[1,4,6,6] v) {
            [a] y = Conv (x, w, b)
            [b] z = Conv <pads = [1,1,1,1]> (x, w, c)
            [c] v = Conv (x, w)
        }""",
        {"w": weights(4, 3, 3, 3), "b": weights(4, seed=1), "c": weights(4, seed=2)},
    )
    after = assert_as_alone(proto, bits=4, terms=2, activations=activations, layout=layout)
    assert stored(after) == ["w/term0/q", "w/term1/q"]
    scales = [name for name in initializers(after) if name.startswith("w/") and "scale" in name]
    merged_integers = (activations, layout) == ("dynamic", "merged")
    assert scales == ["w/term1/scale"] if merged_integers else ["w/term0/scale", "w/term1/scale"]


@pytest.mark.parametrize(("activations", "layout"), MODES)
@pytest.mark.parametrize(
    ("first", "second", "copies"),
    [
        ("alpha = 0.5", "alpha = 0.5, beta = 2.0", 1),
        ("beta = 0.5", "beta = 2.0", 1),
        # alpha becomes part of the weight when Gemm becomes MatMul: two weights
        ("alpha = 0.5", "alpha = -3.0", 2),
    ],
)
def test_gemms(activations, layout, first, second, copies):
    proto = model(
        f"""g (float[2,5] x) => (float[2,4] y, float[2,4] z) {{
            [a] y = Gemm <{first}> (x, w, b)
            [b] z = Gemm <{second}> (x, w, b)
        }}""",
        {"w": weights(5, 4), "b": weights(4, seed=1)},
    )
    after = assert_as_alone(proto, bits=4, terms=2, activations=activations, layout=layout)
    assert len(stored(after)) == 2 * copies


@pytest.mark.parametrize(("activations", "layout"), MODES)
def test_matmul_and_gemm_of_one_orientation(activations, layout):
    proto = model(
        """g (float[2,5] x) => (float[2,4] y, float[2,4] z) {
            [a] y = MatMul (x, w)
            [b] z = Gemm (x, w)
        }""",
        {"w": weights(5, 4)},
    )
    after = assert_as_alone(proto, bits=4, terms=2, activations=activations, layout=layout)
    assert stored(after) == ["w/term0/q", "w/term1/q"]


@pytest.mark.parametrize(("activations", "layout"), MODES)
@pytest.mark.parametrize("square", [True, False], ids=["square", "oblong"])
def test_tied_weights_of_both_orientations(activations, layout, square):
    """Read from both sides, output channels are rows here and columns there: two sets of terms."""
    n = 5 if square else 4
    proto = model(
        f"""g (float[2,5] x, float[2,{n}] t) => (float[2,{n}] y, float[2,5] z) {{
            [a] y = MatMul (x, w)
            [b] z = Gemm <transB = 1> (t, w)
        }}""",
        {"w": weights(5, n) * np.geomspace(1, 100, n, dtype=np.float32)},
    )
    after = assert_as_alone(proto, bits=4, terms=2, activations=activations, layout=layout)
    assert len(stored(after)) == 4


@pytest.mark.parametrize(("activations", "layout"), MODES)
@pytest.mark.parametrize("kind", ["square", "symmetric", "oblong"])
def test_one_weight_as_right_and_as_left_operand(activations, layout, kind):
    """Scales of columns for one, of rows for the other; even equal ones where it is symmetric."""
    n = 4 if kind == "oblong" else 5
    weight = weights(5, n) * np.geomspace(1, 100, n, dtype=np.float32)
    if kind == "symmetric":
        weight = weight + weight.T
    proto = model(
        f"""g (float[2,5] x, float[{n},2] t) => (float[2,{n}] y, float[5,2] z) {{
            [a] y = MatMul (x, w)
            [b] z = MatMul (w, t)
        }}""",
        {"w": weight},
    )
    after = assert_as_alone(proto, bits=4, terms=2, activations=activations, layout=layout)
    assert len(stored(after)) == 4


def test_different_plans_are_stored_apart():
    proto = model(
        """g (float[2,5] x) => (float[2,4] y, float[2,4] z) {
            [a] y = MatMul (x, w)
            [b] z = MatMul (x, w)
        }""",
        {"w": weights(5, 4)},
    )
    _, plan = expand(proto, bits=4, terms=1)
    plan.nodes[1] = plan.nodes[1].model_copy(update={"bits": 3})
    del plan.scales["b"]
    after, _ = expand(proto, plan)
    rows = np.ascontiguousarray(weights(5, 4).T)
    for name, bits in (("a", 4), ("b", 3)):
        (basis,) = basis_nodes(after, name)
        cast = next(n for n in after.graph.node if basis.input[1] in n.output)
        q = numpy_helper.to_array(initializers(after)[cast.input[0]]).astype(np.int8)
        want = realize("fixed_ratio", rows, plan.scales[name], bits=bits, granularity=PerAxis(0))
        np.testing.assert_array_equal(q, want.terms[0].q.T)


def test_edited_scales_of_one_node_do_not_reach_the_other():
    proto = model(
        """g (float[2,5] x) => (float[2,4] y, float[2,4] z) {
            [a] y = MatMul (x, w)
            [b] z = MatMul (x, w)
        }""",
        {"w": weights(5, 4)},
    )
    _, plan = expand(proto, bits=4, terms=1, activations="none")
    plan.scales["b"] = (plan.scales["b"][0] * np.float32(0.5),)
    after, _ = expand(proto, plan)
    feed = feeds(proto)
    rows = np.ascontiguousarray(weights(5, 4).T)
    for name, got in zip("ab", run(after, feed, optimize=False), strict=True):
        series = realize("fixed_ratio", rows, plan.scales[name], bits=4, granularity=PerAxis(0))
        dequantized = series.dequantize().T.astype(np.float64)
        x = feed["x"].astype(np.float64)
        # five products and their sum, in float32
        assert (np.abs(got - x @ dequantized) <= gamma(5) * (np.abs(x) @ np.abs(dequantized))).all()


def test_scales_are_searched_once(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0])
        return original(*args, **kwargs)

    original = module.partial_scales
    monkeypatch.setattr(module, "partial_scales", counted)
    proto = model(
        """g (float[2,5] x) => (float[2,5] y) {
            [a] h = MatMul (x, w)
            [b] y = MatMul (h, w)
        }""",
        {"w": weights(5, 5)},
    )
    _, plan = expand(proto)
    assert len(calls) == 1
    assert plan.scales["a"] is plan.scales["b"]
    assert SearchScales().progress is not None


class TestGroupedAndPlain:
    def test_one_weight_depthwise_and_plain(self):
        """[4, 1, 3, 3] is depthwise for four channels, and an ordinary weight for one."""
        proto = model(
            """g (float[1,4,8,8] x, float[1,1,8,8] t) => (float[1,4,6,6] y, float[1,4,6,6] z) {
                [deep] y = Conv <group = 4> (x, w)
                [plain] z = Conv (t, w)
            }""",
            {"w": weights(4, 1, 3, 3)},
        )
        after = assert_as_alone(proto, bits=4, terms=2)
        # float compute reads INT4, integer compute UINT4: stored once each
        assert len(stored(after)) == 4
