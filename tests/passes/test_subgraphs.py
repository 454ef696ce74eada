"""Nodes in the bodies of If, Loop and Scan."""

import numpy as np
import onnx
import pytest
from expanding import basis_nodes, expand, gamma, initializers, names, nodes, optimized
from small import model, run, weights

from onnxq.kernels_ref import conv

MODES = [("dynamic", "parallel"), ("dynamic", "merged"), ("none", "parallel"), ("none", "merged")]
PACKED = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)

pytestmark = pytest.mark.parametrize(("activations", "layout"), MODES)


def plain(v: np.ndarray, activations: str, layout: str, *, relu: bool = False) -> onnx.ModelProto:
    """The Conv of all bodies below, expanded in a main graph: what a body must compute."""
    proto = model(
        f"""g (float[1,3,8,8] x) => (float[1,3,8,8] y) {{
            {"[relu] r = Relu (x)" if relu else ""}
            [conv] y = Conv <pads = [1,1,1,1]> ({"r" if relu else "x"}, w, b)
        }}""",
        {"w": v, "b": weights(3, seed=1)},
    )
    return expand(proto, bits=4, terms=2, activations=activations, layout=layout)[0]


def apply(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return run(proto, {"x": x}, optimize=False)[0]


def moved_inside(proto: onnx.ModelProto, name: str, index: int = 0) -> None:
    """Make the initializer one of the body in attribute `index` of the only node."""
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    proto.graph.node[-1].attribute[index].g.initializer.add().CopyFrom(tensor)


def dropped(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model without this initializer of the main graph, checked again."""
    kept = [t for t in proto.graph.initializer if t.name != name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def packed(proto: onnx.ModelProto) -> list[str]:
    return [name for name, t in initializers(proto).items() if t.data_type in PACKED]


W, V = weights(3, 3, 3, 3, scale=0.2), weights(3, 3, 3, 3, seed=9, scale=0.2)
X = weights(1, 3, 8, 8, seed=4)


def if_model(**constants: np.ndarray) -> onnx.ModelProto:
    """Conv in both branches: `then` reads w; `else` reads w too, after a Relu."""
    return model(
        """g (bool p, float[1,3,8,8] x) => (float[1,3,8,8] y) {
            [if] y = If (p) <
                then_branch = t () => (float[1,3,8,8] yt) {
                    [one] yt = Conv <pads = [1,1,1,1]> (x, w, b)
                },
                else_branch = e () => (float[1,3,8,8] ye) {
                    [relu] r = Relu (x)
                    [two] ye = Conv <pads = [1,1,1,1]> (r, w, b)
                }
            >
        }""",
        {"w": W, "b": weights(3, seed=1), **constants},
    )


def check_if(
    after: onnx.ModelProto, then: np.ndarray, other: np.ndarray, mode: tuple[str, str]
) -> None:
    """Each branch computes what the same nodes compute in a main graph."""
    for flag, v in ((True, then), (False, other)):
        want = apply(plain(v, *mode, relu=not flag), X)
        feed = {"p": np.array(flag), "x": X}
        (got,) = run(after, feed, optimize=False)
        np.testing.assert_array_equal(got, want)
        (fused,) = run(after, feed)
        # Other kernels add in another order. Either order is within gamma of the exact sum over
        # |x| times |w0| + |w1|, and a digit is at most 2 absmax; 27 products, a few sums, twice.
        reach = conv(np.abs(X), np.full_like(v, 3 * np.abs(v).max()), pads=[1, 1, 1, 1])
        assert (np.abs(fused - want) <= 2 * gamma(27 + 8) * (reach + 3)).all()


class TestIf:
    def test_weight_of_the_outer_scope_read_by_both_branches(self, activations, layout):
        after, _ = expand(if_model(), bits=4, terms=2, activations=activations, layout=layout)
        # stored once, in the main graph, though both bodies use it
        assert [t.name for t in after.graph.initializer if t.data_type in PACKED] == [
            "w/term0/q",
            "w/term1/q",
        ]
        assert packed(after) == ["w/term0/q", "w/term1/q"]
        assert basis_nodes(after, "one") and basis_nodes(after, "two")
        check_if(after, W, W, (activations, layout))

    def test_weights_are_folded_in_the_branches_too(self, activations, layout):
        after, _ = expand(if_model(), bits=4, terms=2, activations=activations, layout=layout)
        final = optimized(after)
        used = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1}
        computed = {name for found in nodes(final.graph) for name in found.output}
        products = [found for found in nodes(final.graph) if found.op_type in used]
        assert len(products) == (2 if layout == "merged" else 4)
        assert not any(found.input[1] in computed for found in products)

    def test_weights_of_the_bodies(self, activations, layout):
        proto = if_model()
        moved_inside(proto, "w", 0)
        moved_inside(proto, "w", 1)
        dropped(proto, "w")
        else_weight = proto.graph.node[0].attribute[1].g.initializer[0]
        else_weight.CopyFrom(onnx.numpy_helper.from_array(V, "w"))  # one name, two weights
        after, _ = expand(proto, bits=4, terms=2, activations=activations, layout=layout)
        assert len(packed(after)) == 4
        assert not any(t.data_type in PACKED for t in after.graph.initializer)
        check_if(after, W, V, (activations, layout))

    def test_weight_read_inside_and_outside(self, activations, layout):
        proto = if_model()
        proto.graph.node.append(
            onnx.helper.make_node("Conv", ["x", "w", "b"], ["z"], name="main", pads=[1, 1, 1, 1])
        )
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
        )
        after, _ = expand(proto, bits=4, terms=2, activations=activations, layout=layout)
        assert packed(after) == ["w/term0/q", "w/term1/q"]
        feed = {"p": np.array(True), "x": X}
        y, z = run(after, feed, optimize=False)
        want = apply(plain(W, activations, layout), X)
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(z, want)


@pytest.mark.parametrize("inside", [False, True], ids=["outer weight", "weight in the body"])
class TestLoopAndScan:
    def test_loop(self, activations, layout, inside):
        proto = model(
            """g (float[1,3,8,8] x, int64 n, bool go) => (float[1,3,8,8] y) {
                [loop] y = Loop (n, go, x) <
                    body = b (int64 i, bool c, float[1,3,8,8] s) => (bool d, float[1,3,8,8] t) {
                        [cond] d = Identity (c)
                        [conv] t = Conv <pads = [1,1,1,1]> (s, w, b)
                    }
                >
            }""",
            {"w": W, "b": weights(3, seed=1)},
        )
        if inside:
            moved_inside(proto, "w")
            dropped(proto, "w")
        after, _ = expand(proto, bits=4, terms=2, activations=activations, layout=layout)
        assert packed(after) == ["w/term0/q", "w/term1/q"]
        single, want = plain(W, activations, layout), X
        for _ in range(3):
            want = apply(single, want)
        feed = {"x": X, "n": np.array(3), "go": np.array(True)}
        (got,) = run(after, feed, optimize=False)
        np.testing.assert_array_equal(got, want)

    def test_scan(self, activations, layout, inside):
        proto = model(
            """g (float[4,1,3,8,8] x) => (float[4,1,3,8,8] y) {
                [scan] y = Scan <
                    num_scan_inputs = 1,
                    body = b (float[1,3,8,8] s) => (float[1,3,8,8] t) {
                        [conv] t = Conv <pads = [1,1,1,1]> (s, w, b)
                    }
                > (x)
            }""",
            {"w": W, "b": weights(3, seed=1)},
        )
        if inside:
            body = next(i for i, a in enumerate(proto.graph.node[0].attribute) if a.name == "body")
            moved_inside(proto, "w", body)
            dropped(proto, "w")
        after, _ = expand(proto, bits=4, terms=2, activations=activations, layout=layout)
        assert packed(after) == ["w/term0/q", "w/term1/q"]
        single, x = plain(W, activations, layout), weights(4, 1, 3, 8, 8, seed=5)
        (got,) = run(after, {"x": x}, optimize=False)
        for i in range(4):
            np.testing.assert_array_equal(got[i], apply(single, x[i]))


def test_names_are_unique_across_bodies(activations, layout):
    after, _ = expand(if_model(), bits=4, terms=2, activations=activations, layout=layout)
    assert len(set(names(after))) == len(names(after))
    made = [name for found in nodes(after.graph) for name in found.output if name]
    assert len(set(made)) == len(made)
