"""Q/DQ pairs: which kernels onnxruntime reaches, and that nothing else of the model changes."""

import numpy as np
import onnx
import pytest
from calibrating import static
from expanding import node, optimized
from small import conv_model, model, ops, run, weights

from onnxq.errors import ConfigError
from onnxq.passes.integer_ops import INTEGER_OPS

AB = {"w": weights(4, 4, 1, 1), "b": weights(4, seed=1), "v": weights(4, 4, 1, 1, seed=2)}
X = weights(2, 4, 6, 6, seed=5)


def between(text: str, out: str = "2,4,6,6", **constants: np.ndarray) -> onnx.ModelProto:
    """x -> Conv -> t -> `text` -> u -> Conv -> y."""
    return model(
        f"""g (float[2,4,6,6] x) => (float[{out}] y) {{
            [one] t = Conv (x, w, b)
            {text}
            [two] y = Conv (u, v)
        }}""",
        {**AB, **constants},
    )


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


F = np.float32
TWO = np.array([1, 1, 2, 2], F)
CASES = {
    "MaxPool": between("u = MaxPool <kernel_shape = [2,2]> (t)", "2,4,5,5"),
    "Reshape": between("u = Reshape (t, s)", "2,4,4,9", s=ints(2, 4, 4, 9)),
    "Flatten": between("f = Flatten (t) u = Reshape (f, s)", s=ints(2, 4, 6, 6)),
    "Squeeze": between("r = Unsqueeze (t, a) u = Squeeze (r, a)", a=ints(0)),
    "Unsqueeze": between("r = Unsqueeze (t, a) u = Squeeze (r, a)", a=ints(0)),
    "Transpose": between("u = Transpose <perm = [0,1,3,2]> (t)"),
    "DepthToSpace": between(
        "d = DepthToSpace <blocksize = 2> (t) u = Concat <axis = 1> (d, d, d, d)", "2,4,12,12"
    ),
    "Slice": between("u = Slice (t, s, e, a)", "2,4,3,6", s=ints(0), e=ints(3), a=ints(2)),
    "Split": between("p, q = Split <axis = 2> (t) u = Concat <axis = 2> (q, p)"),
    "Gather": between("u = Gather <axis = 2> (t, i)", "2,4,2,6", i=ints(3, 1)),
    "Pad": between("u = Pad (t, p)", "2,4,8,8", p=ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "Add": between("m = MaxPool <kernel_shape = [1,1]> (t) u = Add (t, m)"),
    "Mul": between("m = MaxPool <kernel_shape = [1,1]> (t) u = Mul (t, m)"),
    "Concat": between("c = Concat <axis = 2> (t, t) u = Relu (c)", "2,4,12,6"),
    "AveragePool": between("u = AveragePool <kernel_shape = [2,2]> (t)", "2,4,5,5"),
    "GlobalAveragePool": between("u = GlobalAveragePool (t)", "2,4,1,1"),
    "LeakyRelu": between("u = LeakyRelu <alpha = 0.1> (t)"),
    "Relu": between("m = Relu (t) u = Add (t, m)"),
    "HardSigmoid": between("u = HardSigmoid <alpha = 0.25, beta = 0.5> (t)"),
    "Sigmoid": between("u = Sigmoid (t)"),
    "Softmax": between("u = Softmax <axis = 1> (t)"),
}
# Moves of values that onnxruntime runs on any type.
MOVES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather"}


def resize() -> onnx.ModelProto:
    """Written by hand: the text form has no empty input."""
    proto = between("u = Identity (t)", s=TWO)
    found = next(n for n in proto.graph.node if n.op_type == "Identity")
    found.op_type = "Resize"
    found.input.extend(["", "s"])
    found.attribute.append(onnx.helper.make_attribute("mode", "nearest"))
    for dim in proto.graph.output[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 12
    return proto


CASES["Resize"] = resize()


def error(proto: onnx.ModelProto, after: onnx.ModelProto, feed: dict | None = None) -> float:
    feed = feed or {"x": X}
    want, got = run(proto, feed)[0], run(after, feed)[0]
    assert want.shape == got.shape and want.dtype == got.dtype
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_every_operator_of_the_table_has_a_case() -> None:
    assert set(CASES) == set(INTEGER_OPS)


@pytest.mark.parametrize("op", sorted(CASES))
def test_the_operator_runs_on_8_bits(op: str) -> None:
    """One pair at either end of the graph and integers between: no float operator is left."""
    after, _ = static(CASES[op], [{"x": X}])
    kernels = ops(optimized(after))
    assert kernels.count("QuantizeLinear") == 1 and kernels.count("DequantizeLinear") == 1
    assert kernels.count("QLinearConv") == 2
    kernel = INTEGER_OPS[op].kernel
    if op not in MOVES:  # a move may vanish into its neighbours
        assert any(found.endswith(kernel) for found in kernels)
    left = set(kernels) - {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "Transpose"}
    allowed = MOVES | {"DepthToSpace", "Resize", "Pad", "MaxPool", "NhwcMaxPool"}
    assert all(found in allowed or found.startswith("QLinear") for found in left)
    assert error(CASES[op], after) < 0.02


RESIDUAL = model(
    """g (float[2,4,6,6] x) => (float[2,4,6,6] y, float[2,4,6,6] a) {
        [stem] s = Conv (x, w, b)
        [stem_relu] r = Relu (s)
        [one] c = Conv (r, v)
        [sum] t = Add (c, r)
        [act] a = Clip (t, low, high)
        [two] d = Conv (a, w)
        [end] y = HardSwish (d)
    }""",
    {**AB, "low": F(0), "high": F(6)},
)


def test_residual_and_outputs() -> None:
    after, plan = static(RESIDUAL, [{"x": X}])
    assert [o.name for o in after.graph.output] == ["y", "a"]
    assert {"r", "a"} <= set(plan.ranges) and not {"s", "t", "y"} & set(plan.ranges)
    assert not {"Relu", "Clip"} & set(ops(after))  # saturation does it
    kernels = ops(optimized(after))
    assert kernels.count("QLinearConv") == 3 and kernels.count("QLinearAdd") == 1
    want, got = run(RESIDUAL, {"x": X}), run(after, {"x": X})
    assert all(np.abs(w - g).max() < 0.05 * np.abs(w).max() for w, g in zip(want, got, strict=True))


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0), (-0.7, 0.2)])
def test_clip_becomes_saturation(bounds: tuple[float, float]) -> None:
    proto = between("u = Clip (t, low, high)", low=F(bounds[0]), high=F(bounds[1]))
    after, _ = static(proto, [{"x": X}])
    assert "Clip" not in ops(after)
    assert ops(optimized(after)).count("QLinearConv") == 2
    assert error(proto, after) < 0.03


def test_a_clip_that_excludes_zero_stays() -> None:
    proto = between("u = Clip (t, low, high)", low=F(0.5), high=F(6))
    after, _ = static(proto, [{"x": X}])
    assert "Clip" in ops(after)
    assert ops(optimized(after)).count("QLinearConv") == 2
    assert error(proto, after) < 0.03


def test_hard_swish_is_saturation_too() -> None:
    """Its gate is 0 and 1 exactly where the float one is."""
    proto = between("u = HardSwish (t)")
    samples = [{"x": 4 * X}, {"x": np.abs(4 * X)}, {"x": -np.abs(4 * X)}]
    after, _ = static(proto, samples)
    kernels = ops(optimized(after))
    assert "QLinearLeakyRelu" in kernels and "QLinearMul" in kernels
    assert "HardSigmoid" not in kernels
    assert all(error(proto, after, feed) < 0.03 for feed in samples)


def test_a_hard_sigmoid_beside_large_values() -> None:
    """In the range of the Concat it would end far above 1."""
    proto = between(
        "h = HardSigmoid (t) c = Concat <axis = 1> (t, h, t, h) m, n = Split <axis = 1> (c) "
        "u = Add (m, n)",
        v=weights(4, 8, 1, 1),
    )
    feed = {"x": 20 * X}
    after, plan = static(proto, [feed])
    assert plan.ranges["h"][1] <= 1 < plan.ranges["c"][1]
    assert error(proto, after, feed) < 0.03


@pytest.mark.parametrize("size", [0.01, 1000.0])
def test_a_hard_sigmoid_whose_level_does_not_fit_stays_float(size: float) -> None:
    proto = between("u = HardSigmoid (t)", b=np.zeros(4, F))
    after, _ = static(proto, [{"x": F(size) * X}])
    assert "HardSigmoid" in ops(after)
    unoptimized = (run(after, {"x": F(size) * X}, optimize=on)[0] for on in (True, False))
    np.testing.assert_allclose(*unoptimized, rtol=0, atol=1e-6)


def test_a_relu_beside_negative_values_costs_no_float_conv() -> None:
    proto = between(
        "o = Conv (x, v) r = Relu (o) c = Concat <axis = 1> (t, r) m, n = Split <axis = 1> (c) "
        "u = Add (m, n)"
    )
    after, _ = static(proto, [{"x": X}])
    assert ops(optimized(after)).count("QLinearConv") == 3
    assert error(proto, after) < 0.03


ENCODER = model(
    """g (float[n,5,8] x) => (float[n,5,8] y) {
        [norm] h = LayerNormalization <axis = -1> (x, one, zero)
        [up] m = MatMul (h, w)
        [up_bias] p = Add (m, b)
        [act] r = Tanh (p)
        [down] d = MatMul (r, v)
        [down_bias] e = Add (d, c)
        [residual] y = Add (e, h)
    }""",
    {
        "one": np.ones(8, F),
        "zero": np.zeros(8, F),
        "w": weights(8, 16),
        "b": weights(16, seed=1),
        "v": weights(16, 8, seed=2),
        "c": weights(8, seed=3),
    },
)


def test_float_readers_keep_the_float_tensor() -> None:
    x = weights(3, 5, 8, seed=4)
    after, plan = static(ENCODER, [{"x": x}])
    assert set(plan.ranges) == {"h", "r"}
    assert "h" in node(after, "residual").input and "h" not in node(after, "up/term0").input
    kernels = ops(optimized(after))
    assert kernels.count("MatMulIntegerToFloat") == 2 and "MatMul" not in kernels
    assert error(ENCODER, after, {"x": x}) < 0.02


def fixed(proto: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    done = onnx.ModelProto()
    done.CopyFrom(proto)
    for value in (*done.graph.input, *done.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return done


def test_matmul_and_bias_of_known_shape_stay_integer() -> None:
    """There onnxruntime fuses a bias [N] to a float Gemm."""
    x = weights(3, 5, 8, seed=4)
    after, _ = static(fixed(ENCODER, 3), [{"x": x}])
    kernels = ops(optimized(after))
    assert kernels.count("MatMulIntegerToFloat") == 2 and "Gemm" not in kernels
    assert error(ENCODER, after, {"x": x}) < 0.02


HEAD = model(
    """g (float[2,4,6,6] x) => (float[2,5] y) {
        [conv] t = Conv (x, w, b)
        [pool] p = GlobalAveragePool (t)
        [flat] f = Flatten (p)
        [hidden] h = Gemm <transB = 1> (f, u, c)
        [act] r = Relu (h)
        [top] l = Gemm <transB = 1> (r, z, d)
        [prob] y = Softmax <axis = 1> (l)
    }""",
    {
        **{name: AB[name] for name in "wb"},
        "u": weights(7, 4),
        "c": weights(7, seed=1),
        "z": weights(5, 7),
        "d": weights(5, seed=3),
    },
)


def test_the_head_of_a_classifier() -> None:
    after, plan = static(HEAD, [{"x": X}], bits=4, terms=2)
    kernels = ops(optimized(after))
    assert kernels.count("QGemm") == 2 and kernels.count("QLinearGlobalAveragePool") == 1
    assert kernels[-1] == "Softmax" and "Relu" not in kernels
    assert not {"l", "y"} & set(plan.ranges)
    assert error(HEAD, after) < 0.02


def test_shared_ranges_need_no_second_rounding() -> None:
    """What Concat gets from its branches it passes on unchanged."""
    proto = model(
        """g (float[2,4,6,6] x) => (float[2,4,5,11] y) {
            [one] t = Conv (x, w)
            [two] s = Conv (x, v)
            [join] c = Concat <axis = 3> (t, s)
            [pool] p = MaxPool <kernel_shape = [2,2]> (c)
            [three] y = Conv (p, w)
        }""",
        AB,
    )
    after, plan = static(proto, [{"x": X}])
    assert len({plan.ranges[name] for name in ("t", "s", "c", "p")}) == 1
    scales = {n.input[1] for n in after.graph.node if n.name.split("/")[0] in "tscp"}
    assert len(scales) == 1
    assert error(proto, after) < 0.02


def test_a_body_stays_float() -> None:
    proto = model(
        """g (float[2,4,6,6] x, bool f) => (float[2,4,6,6] y) {
            [stem] t = Conv (x, w, b)
            [branch] y = If (f) <
                then_branch = a () => (float[2,4,6,6] p) { [inner] p = Conv (t, v) },
                else_branch = e () => (float[2,4,6,6] q) { [other] q = Relu (t) }
            >
        }""",
        AB,
    )
    feed = {"x": X, "f": np.array(True)}
    after, plan = static(proto, [feed])
    assert plan["inner"].activations == "none" and "body" in (plan["inner"].note or "")
    assert set(plan.ranges) == {"x", "t"}
    assert error(proto, after, feed) < 0.02


def test_an_unknown_tensor_is_refused() -> None:
    _, plan = static(conv_model(), [{"x": weights(1, 3, 8, 8)}])
    plan.ranges["nowhere"] = (0.0, 1.0)
    with pytest.raises(ConfigError, match="'nowhere'"):
        static(conv_model(), [], plan)


def test_nothing_to_do_without_ranges() -> None:
    proto = conv_model()
    after, plan = static(proto, [{"x": weights(1, 3, 8, 8)}], exclude=("conv",))
    assert not plan.ranges and ops(after) == ops(proto)


def test_the_rank_behind_a_computed_reshape_is_known() -> None:
    """PyTorch's x.view(x.size(0), -1): onnx infers nothing of its output."""
    proto = model(
        """g (float[n,4,1,1] x) => (float[n,5] y) {
            s = Shape (x) k = Gather <axis = 0> (s, first) i = Unsqueeze (k, axes)
            t = Concat <axis = 0> (i, rest) f = Reshape (x, t)
            [top] y = Gemm <transB = 1> (f, w, b)
        }""",
        {
            "first": np.array(0),
            "axes": ints(0),
            "rest": ints(-1),
            "w": weights(5, 4),
            "b": weights(5, seed=1),
        },
    )
    x = weights(3, 4, 1, 1, seed=4)
    after, _ = static(proto, [{"x": x}])
    assert "QGemm" in ops(optimized(after))
    assert error(proto, after, {"x": x}) < 0.02
