"""What is proved to be >= 0, and what must not be."""

import numpy as np
import onnx
import pytest
from expanding import expand
from small import model, ops, run, weights

from onnxq.model import load
from onnxq.passes import ConstantsToInitializers
from onnxq.passes.nonnegative import is_nonnegative


def proved(body: str, constants: dict | None = None, *, opset: int = 17) -> bool:
    """Whether `t` is proved in a graph over x [1, 2, 4, 4]."""
    text = f"g (float[1,2,4,4] x, float[1,2,4,4] z) => (float[a,b,c,d] t) {{ {body} }}"
    loaded = load(model(text, constants, opset=opset, ir=8 if opset > 10 else 4))
    return is_nonnegative(loaded.graph.outputs[0])


POOL = "<kernel_shape = [2,2]>"


@pytest.mark.parametrize(
    "body",
    [
        "t = Relu (x)",
        "t = Sigmoid (x)",
        "t = HardSigmoid (x)",
        "t = Softplus (x)",
        "t = Exp (x)",
        "t = Abs (x)",
        "t = Softmax (x)",
        f"r = Relu (x) t = MaxPool {POOL} (r)",
        f"r = Relu (x) t = AveragePool {POOL} (r)",
        "r = Relu (x) t = GlobalAveragePool (r)",
        "r = Relu (x) i = Identity (r) t = Transpose <perm = [0,1,3,2]> (i)",
        "r = Relu (x) s = Sigmoid (z) t = Mul (r, s)",
        "r = Relu (x) s = Exp (z) t = Add (r, s)",
        "r = Relu (x) s = Exp (z) t = Concat <axis = 1> (r, s)",
    ],
)
def test_proves(body):
    assert proved(body)


@pytest.mark.parametrize(
    "body",
    [
        "t = LeakyRelu (x)",
        "t = Tanh (x)",
        f"t = MaxPool {POOL} (x)",
        f"r = LeakyRelu (x) t = MaxPool {POOL} (r)",
        "t = Identity (x)",
        "r = Relu (x) t = Add (r, z)",
        "r = Relu (x) t = Mul (z, r)",
        "r = Relu (x) t = Concat <axis = 1> (r, z)",
        "r = Relu (x) t = Sub (r, z)",
        "r = Relu (x) t = Neg (r)",
        "r = HardSwish (x) t = Identity (r)",
    ],
)
def test_does_not_prove(body):
    assert not proved(body)


class TestConstants:
    @pytest.mark.parametrize(("value", "expected"), [(0.5, True), (0.0, True), (-0.5, False)])
    def test_initializer(self, value, expected):
        body = "r = Relu (x) t = Add (r, c)"
        assert proved(body, {"c": np.full(4, value, np.float32)}) is expected

    @pytest.mark.parametrize(("value", "expected"), [("0.5", True), ("-0.5", False)])
    def test_constant_node(self, value, expected):
        body = f"r = Relu (x) c = Constant <value = float {{{value}}}> () t = Add (r, c)"
        assert proved(body) is expected

    def test_overridable(self):
        text = "g (float[4] x, float[4] c) => (float[4] t) { r = Relu (x) t = Add (r, c) }"
        loaded = load(model(text, {"c": np.ones(4, np.float32)}))
        assert loaded.overridable == {"c"}
        assert not is_nonnegative(loaded.graph.outputs[0])


class TestClip:
    @pytest.mark.parametrize(
        ("attributes", "expected"),
        [("min = 0.0, max = 6.0", True), ("min = -1.0", False), ("max = 6.0", False)],
    )
    def test_attribute(self, attributes, expected):
        assert proved(f"t = Clip <{attributes}> (x)", opset=6) is expected

    @pytest.mark.parametrize(("low", "expected"), [(0, True), (2, True), (-1e-6, False)])
    @pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "[1]"])
    def test_input(self, low, expected, shape):
        # [1] is no valid Clip, but exporters wrote it and onnxruntime takes it
        array = np.full(shape, low, np.float32)
        loaded = load(model("g (float[4] x) => (float[4] t) { t = Clip (x, low) }",
                            {"low": np.float32(low)}))  # fmt: skip
        if shape:
            proto = onnx.ModelProto()
            proto.CopyFrom(loaded.source.proto)
            proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "low"))
            loaded = load(proto)
        assert is_nonnegative(loaded.graph.outputs[0]) is expected

    def test_constant_node(self):
        body = "c = Constant <value = float {0.0}> () t = Clip (x, c)"
        assert proved(body)

    def test_absent(self):
        assert not proved("t = Clip (x)")
        assert not proved("t = Clip (x, , high)", {"high": np.float32(6)})

    def test_computed(self):
        text = "g (float[4] x, float lo) => (float[4] t) { a = Abs(lo) t = Clip (x, a) }"
        assert not is_nonnegative(load(model(text)).graph.outputs[0])


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('mode = "linear"', True),
        ('mode = "nearest"', True),
        ('mode = "cubic"', False),
        (
            'mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize", '
            "extrapolation_value = -1.0",
            False,
        ),
    ],
)
def test_resize(attributes, expected):
    constants = {
        "roi": np.float32([0, 0, 0, 0, 1, 1, 2, 2]),
        "scales": np.float32([1, 1, 2, 2]),
    }
    assert proved(f"r = Relu (x) t = Resize <{attributes}> (r, roi, scales)", constants) is expected


def test_an_operator_of_another_domain_proves_nothing():
    loaded = load(model("g (float[4] x) => (float[4] t) { t = Relu (x) }"))
    loaded.graph.nodes[0].domain = "my.ops"
    assert not is_nonnegative(loaded.graph.outputs[0])


def test_a_loop_carried_tensor_proves_nothing():
    proto = model(
        """g (float[4] x, int64 n, bool go) => (float[4] y) {
            r = Relu (x)
            y = Loop (n, go, r) <body = b (int64 i, bool c, float[4] s) => (bool d, float[4] t) {
                d = Identity (c)
                t = Identity (s)
            }>
        }"""
    )
    body = load(proto).graph.nodes[1].attrs["body"]
    assert not is_nonnegative(body.outputs[1])


class TestInTheGraph:
    """The proof changes the emitted nodes: all 256 levels go to the positive side."""

    def ops_after(self, before_conv: str, constants: dict | None = None, **kwargs) -> list[str]:
        proto = model(
            f"""g (float[1,3,8,8] x) => (float[a,b,c,d] y) {{
                {before_conv}
                [conv] y = Conv (t, w)
            }}""",
            {"w": weights(4, 3, 3, 3), **(constants or {})},
            **kwargs,
        )
        return ops(expand(proto, bits=4, terms=1)[0])

    def test_max_pool_after_relu(self):
        assert "ReduceMin" not in self.ops_after(f"r = Relu (x) t = MaxPool {POOL} (r)")

    def test_max_pool_after_leaky_relu(self):
        assert "ReduceMin" in self.ops_after(f"r = LeakyRelu (x) t = MaxPool {POOL} (r)")

    def test_relu6_of_opset_6(self):
        # raising the opset turns the attribute into a Constant node
        found = self.ops_after("t = Clip <min = 0.0, max = 6.0> (x)", opset=6, ir=4)
        assert "QuantizeLinear" in found and "ReduceMin" not in found

    def test_wrongly_proved_would_be_seen(self):
        """Negative values survive MaxPool after LeakyRelu, and the product feels them."""
        proto = model(
            f"""g (float[1,1,2,2] x) => (float[1,1,1,1] y) {{
                r = LeakyRelu <alpha = 0.5> (x)
                t = MaxPool {POOL} (r)
                [conv] y = Conv (t, w)
            }}""",
            {"w": np.ones((1, 1, 1, 1), np.float32)},
        )
        after, _ = expand(proto, bits=7, terms=1)
        (y,) = run(after, {"x": np.full((1, 1, 2, 2), -4, np.float32)})
        # one value: |error| <= half an activation step, 2/255/2, times the weight 1 (exact in q)
        np.testing.assert_allclose(y.item(), -2.0, rtol=0, atol=2 / 255 / 2 + 1e-6)


def test_constants_become_initializers_before():
    proto = model(
        "g (float[4] x) => (float[4] t) { c = Constant <value_float = 0.0> () t = Clip (x, c) }"
    )
    loaded = load(proto)
    ConstantsToInitializers()(loaded)
    assert is_nonnegative(loaded.graph.outputs[0])
