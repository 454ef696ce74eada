"""FoldLinearBranches: what it keeps and why, names, shared weights, bodies of If and Loop."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small import assert_pass, model, ops, run, weights

from onnxq.model import load, to_proto
from onnxq.passes import FoldLinearBranches, signature, verify

# Each weight is rounded once by the fold, each of a few hundred products and sums once more.
FOLD = 1e-5
PADS = "pads = [1,1,1,1]"


def constants(channels: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "w3": weights(channels, channels, 3, 3, seed=1),
        "w1": weights(channels, channels, 1, 1, seed=2),
        "wide": weights(2 * channels, channels, 3, 3, seed=3),
        "down": weights(channels, 2 * channels, 1, 1, seed=14),
        "depth": weights(channels, 1, 3, 3, seed=4),
        "row": weights(channels, channels, 1, 3, seed=5),
        "column": weights(channels, channels, 3, 1, seed=6),
        "narrow": weights(1, channels, 3, 3, seed=7),
        "bias": weights(channels, seed=8),
        "gamma": rng.uniform(0.5, 2, channels).astype(np.float32),
        "beta": weights(channels, seed=9),
        "mean": weights(channels, seed=10),
        "var": rng.uniform(0.1, 3, channels).astype(np.float32),
        "per": weights(channels, 1, 1, seed=11) + np.float32(3),
        "last": weights(8, seed=12),
        "full": weights(1, channels, 8, 8, seed=13),
        "half": np.float16([2.0]),
        "one": np.float32(1.5),
        "zero": np.float32(0.0),
        "nan": np.float32([[[1.0]], [[np.nan]], [[1.0]], [[2.0]]]),
        "around": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
        "crop": np.int64([0, 0, -1, 0, 0, 0, 0, 0]),
        "batch": np.int64([0, 1, 0, 0, 0, 0, 0, 0]),
        "two": np.int64([1, 1, 1, 1]),
        "axes": np.int64([-2, 3]),
    }


def graph(body: str, outputs: str = "float[N,C,P,Q] y", inputs: str = "float[N,4,8,8] x"):
    """A model with those of the constants that its text reads."""
    text = f"g ({inputs}) => ({outputs}) {{ {body} }}"
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return model(text, {k: v for k, v in constants().items() if k in words}, opset=18)


def bn(x: str) -> str:
    return f"BatchNormalization ({x}, gamma, beta, mean, var)"


# what is kept: its text, the node that reports it, and the words of its reason
KEPT = {
    "bias ahead of padding": (
        f"[a] a = Conv (x, w1, bias) [b] y = Conv <{PADS}> (a, w3)",
        "b",
        "a bias ahead of padding",
    ),
    "batch norm ahead of padding": (
        f"[a] a = {bn('x')} [b] y = Conv <{PADS}> (a, w3)",
        "b",
        "a bias ahead of padding",
    ),
    "padding after a kernel": (
        "[a] a = Conv (x, depth) <GROUP> [p] p = Pad (a, around) [r] y = Relu (p)",
        "p",
        "padding after a kernel",
    ),
    "padded kernel after a stride": (
        f"[a] a = Conv <strides = [2,2]> (x, w1) [b] y = Conv <{PADS}> (a, w3)",
        "b",
        "a stride: the border",
    ),
    "different strides": (
        f"[a] a = Conv <{PADS}, strides = [2,2]> (x, w3) "
        "[b] b = Conv <kernel_shape=[3,3], dilations=[2,2]> (x, w3) [s] y = Add (a, b)",
        "s",
        "different strides",
    ),
    "different sizes": (
        "[a] a = Conv <strides = [8,8]> (x, w1) [b] b = Conv <strides = [8,8]> (x, w3) "
        "[s] y = Add (a, b)",
        "s",
        "outputs of different size",
    ),
    "different dilations": (
        f"[a] a = Conv <{PADS}> (x, w3) [b] b = Conv <dilations = [2,2], pads = [2,2,2,2]> (x, w3) "
        "[s] y = Add (a, b)",
        "s",
        "400 weights instead of 288",
    ),
    "tap between the taps": (
        "[a] a = Conv <dilations = [2,2], pads = [1,1,3,3]> (x, w3) [b] b = Conv (x, w1) "
        "[s] y = Sub (a, b)",
        "s",
        "400 weights instead of 160",
    ),
    "row and column alone": (
        "[a] a = Conv <pads = [0,1,0,1]> (x, row) [b] b = Conv <pads = [1,0,1,0]> (x, column) "
        "[s] y = Add (a, b)",
        "s",
        "144 weights instead of 96",
    ),
    "depthwise and pointwise": (
        "[a] a = Conv <group = 4> (x, depth) [b] y = Conv (a, w1)",
        "b",
        "144 weights instead of 52",
    ),
    "kernels in sequence": (
        f"[a] a = Conv <{PADS}> (x, w3) [b] y = Conv (a, w3)",
        "b",
        "400 weights instead of 288",
    ),
    "average that does not count": (
        f"[a] a = Conv <{PADS}> (x, w3) "
        f"[p] p = AveragePool <kernel_shape = [3,3], {PADS}> (x) [s] y = Add (a, p)",
        "p",
        "does not count its padding",
    ),
    "average with ceil_mode": (
        "[a] a = Conv (x, w3) [p] y = AveragePool <kernel_shape = [2,2], ceil_mode = 1> (a)",
        "p",
        "has ceil_mode",
    ),
    "auto_pad with stride": (
        '[a] a = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (x, w3) [m] y = Mul (a, one)',
        "a",
        "auto_pad SAME_UPPER with a stride",
    ),
    "constant along another axis": (
        f"[a] a = Conv <{PADS}> (x, w3) [m] y = Mul (a, last)",
        "m",
        "not per channel",
    ),
    "constant per position": (
        f"[a] a = Conv <{PADS}> (x, w3) [m] y = Add (full, a)",
        "m",
        "not per channel",
    ),
    "pad with a value": ("[p] p = Pad (x, around, one) [c] y = Conv (p, w3)", "p", "pads with 1.5"),
    "pad by reflection": (
        '[p] p = Pad <mode = "reflect"> (x, around) [c] y = Conv (p, w3)',
        "p",
        "mode reflect",
    ),
    "pad of channels": (
        "[p] p = Pad (x, batch) [n] n = Neg (p) [s] y = Relu (n)",
        "p",
        "pads the batch or the channels",
    ),
    "pad that crops": ("[p] p = Pad (x, crop) [c] y = Conv (p, w3)", "p", "crops"),
    "identity beside more channels": (
        f"[a] a = Conv <{PADS}> (x, narrow) [s] y = Add (a, x)",
        "s",
        "changes the number of channels",
    ),
    "identity beside a stride": (
        "[a] a = Conv <strides = [8,8]> (x, w3) [s] y = Add (a, x)",
        "s",
        "Conv with stride",
    ),
    "not float32": (
        f"[a] a = Conv <{PADS}> (x, w3) [k] k = Cast <to = 10> (a) [m] m = Mul (k, half) "
        "[n] n = Mul (m, half) [q] q = Cast <to = 1> (n) [p] y = Relu (q)",
        None,
        None,
    ),
    "NaN": (f"[a] a = Conv <{PADS}> (x, w3) [m] y = Mul (a, nan)", "m", "NaN or Inf"),
    "Div by a tensor": (
        f"[a] a = Conv <{PADS}> (x, w3) [d] y = Div (one, a)",
        "d",
        "divides by a tensor",
    ),
    "Div by zero": (f"[a] a = Conv <{PADS}> (x, w3) [d] y = Div (a, zero)", "d", "by zero"),
    "several channels made of one": (
        f"[a] a = Conv <{PADS}> (x, narrow) [m] y = Mul (a, per)",
        "m",
        "a constant makes 4 channels of 1",
    ),
}


def text_of(case: str) -> str:
    body = KEPT[case][0]
    return body.replace("Conv (x, depth) <GROUP>", "Conv <group = 4> (x, depth)")


@pytest.mark.parametrize("case", KEPT)
def test_keeps_and_says_why(case):
    _, node, reason = KEPT[case]
    proto = graph(text_of(case))
    loaded = load(proto)
    contract = signature(loaded)
    result = FoldLinearBranches()(loaded)
    verify(loaded, contract, "FoldLinearBranches")
    assert result.rewritten == ()
    assert ops(to_proto(loaded)) == ops(proto)
    if node is None:
        assert result.skipped == {}
    else:
        assert reason in result.skipped[node]


@pytest.mark.parametrize(
    ("body", "outputs", "node", "reason"),
    [
        (
            f"[a] a = Conv <{PADS}> (x, w3) [b] y = {bn('a')} [r] z = Relu (a)",
            "float[N,C,P,Q] y, float[N,C,P,Q] z",
            "b",
            "'a' is also read elsewhere",
        ),
        (
            f"[a] a = Conv <{PADS}> (x, w3) [b] y = {bn('a')}",
            "float[N,C,P,Q] y, float[N,C,P,Q] a",
            "b",
            "'a' is an output of the graph",
        ),
        (
            f"[a] a = Conv <{PADS}> (x, w3) [b] b = {bn('x')} [s] y = Add (a, b) [r] z = Relu (a)",
            "float[N,C,P,Q] y, float[N,C,P,Q] z",
            "s",
            "'a' is also read elsewhere",
        ),
        (
            f"[a] a = Conv <{PADS}> (x, w3) [b] b = {bn('x')} [s] y = Add (a, b)",
            "float[N,C,P,Q] y, float[N,C,P,Q] b",
            "s",
            "'b' is an output of the graph",
        ),
    ],
)
def test_keeps_a_tensor_that_somebody_reads(body, outputs, node, reason):
    proto = graph(body, outputs)
    assert_pass(proto, FoldLinearBranches(), expect=ops(proto), skipped={node: reason})


@pytest.mark.parametrize(
    ("inputs", "body", "node", "reason"),
    [
        ("float[N,4,8,8] x, float[4,4,3,3] v", "[a] a = Conv (x, v) [m] y = Mul (a, one)", "a", ""),
        (
            "float[N,4,8,8] x, float[4] v",
            f"[a] a = Conv <{PADS}> (x, w3) [b] y = BatchNormalization (a, v, beta, mean, var)",
            "b",
            "not constant",
        ),
        (
            "float[N,4,8,8] x, int64[8] v",
            "[p] p = Pad (x, v) [a] y = Conv (p, w3)",
            "p",
            "not constant",
        ),
    ],
)
def test_keeps_parameters_that_are_not_constant(inputs, body, node, reason):
    proto = graph(body, inputs=inputs)
    loaded = load(proto)
    result = FoldLinearBranches()(loaded)
    assert result.rewritten == ()
    assert (reason or "not constant") in result.skipped[node]


def test_keeps_an_initializer_that_can_be_overridden():
    proto = graph(f"[a] a = Conv <{PADS}> (x, w3) [m] y = Mul (a, per)")
    proto.graph.input.append(helper.make_tensor_value_info("w3", 1, [4, 4, 3, 3]))
    result = FoldLinearBranches()(loaded := load(proto))
    assert result.rewritten == ()
    assert [n.op for n in loaded.graph.nodes] == ["Conv", "Mul"]
    assert "not constant" in result.skipped["a"]


def test_keeps_batch_norm_in_training_mode():
    proto = graph(
        f"[a] a = Conv <{PADS}> (x, w3) "
        "[b] y, m, v = BatchNormalization <training_mode = 1> (a, gamma, beta, mean, var)",
    )
    assert "training mode" in FoldLinearBranches()(load(proto)).skipped["b"]


def test_keeps_batch_norm_with_a_negative_variance():
    proto = graph(f"[a] a = Conv <{PADS}> (x, w3) [b] y = {bn('a')}")
    variance = next(i for i in proto.graph.initializer if i.name == "var")
    variance.CopyFrom(numpy_helper.from_array(np.float32([1, -1, 1, 1]), "var"))
    assert (
        "variance + epsilon of the batch norm is not positive"
        in FoldLinearBranches()(load(proto)).skipped["b"]
    )


def test_keeps_what_float32_cannot_hold():
    proto = graph(f"[a] a = Conv <{PADS}> (x, w3) [m] m = Mul (a, one) [n] y = Mul (m, one)")
    factor = next(i for i in proto.graph.initializer if i.name == "one")
    factor.CopyFrom(numpy_helper.from_array(np.float32(1e30), "one"))
    loaded = load(proto)
    result = FoldLinearBranches()(loaded)
    assert "exceed float32" in result.skipped["n"]
    assert [n.op for n in loaded.graph.nodes] == ["Conv", "Mul"]  # the first one does fit


def test_keeps_a_per_channel_constant_where_the_channels_are_not_known():
    """Were there one channel, the constant would make four of it."""
    body = "[r] r = Exp (x) [n] n = Neg (r) [m] m = Mul (n, per) [c] y = Conv (m, w3)"
    proto = graph(body, inputs="float[N,C,8,8] x")
    result = FoldLinearBranches()(load(proto))
    assert "the rank of the input of Mul 'm' is not known" in result.skipped["m"]
    body = "[m] m = Mul (x, per) [c] y = Conv (m, w3)"
    result = FoldLinearBranches()(load(graph(body, inputs="float[N,C,8,8] x")))
    assert "the channels of 'x' are not known" in result.skipped["m"]


@pytest.mark.parametrize("first", ["[n] n = Neg (x)", "[n] n = Mul (x, one)"])
def test_keeps_one_channel_that_a_constant_makes_four_of(first):
    proto = graph(f"{first} [m] m = Mul (n, per) [c] y = Conv (m, w3)", inputs="float[N,1,8,8] x")
    assert_pass(proto, FoldLinearBranches(), expect=ops(proto))


def test_keeps_operators_of_other_domains():
    proto = graph(f"[a] a = Conv <{PADS}> (x, w3) [m] y = Mul (a, one)")
    proto.graph.node[0].domain = "elsewhere"
    proto.opset_import.append(helper.make_opsetid("elsewhere", 1))
    assert FoldLinearBranches()(load(proto)).rewritten == ()


def test_keeps_a_sum_of_constants():
    proto = graph(
        f"[k] k = Add (per, one) [s] s = Sum (per, per) [a] a = Conv <{PADS}> (x, w3) "
        "[t] t = Sum (k, s) [m] y = Mul (a, t)"
    )
    assert_pass(proto, FoldLinearBranches(), expect=ops(proto), rewritten=(), skipped={})


def test_keeps_a_residual_without_a_word():
    """Ordinary parts of a model are no candidates."""
    proto = graph(f"[a] a = Conv <{PADS}> (x, w3) [r] r = Relu (a) [s] y = Add (r, x)")
    assert_pass(proto, FoldLinearBranches(), expect=ops(proto), rewritten=(), skipped={})


class TestFolds:
    @pytest.mark.parametrize(
        "body",
        [
            "[p] p = Pad (x, around) [c] y = Conv (p, w3)",
            "[p] p = Pad (x, two, , axes) [c] y = Conv (p, w3)",
            "[m] m = Sub (one, x) [c] y = Conv (m, w3)",
            f"[c] c = Conv <{PADS}> (x, w3) [d] y = Div (c, per)",
            f"[c] c = Conv <{PADS}> (x, w3) [s] y = Sum (c, x, per)",
            f"[c] c = Conv <{PADS}> (x, w3) [a] a = Add (c, c) [b] y = Sub (a, x)",
            '[c] c = Conv <auto_pad = "SAME_LOWER", strides = [2,2]> (x, w1) [n] y = Neg (c)',
            f"[c] c = Conv <{PADS}> (x, w3) [p] p = AveragePool <kernel_shape = [3,3], {PADS}, "
            "count_include_pad = 1> (x) [s] y = Sub (p, c)",
            f"[a] a = Conv <{PADS}, group = 4> (x, depth) [b] b = Conv (a, w1) "
            f"[c] c = Conv <{PADS}> (x, w3) [s] y = Add (b, c)",
        ],
    )
    def test_to_one_conv(self, body):
        assert_pass(graph(body), FoldLinearBranches(), expect=["Conv"], rtol=FOLD, skipped={})

    def test_what_would_grow_does_not_keep_the_rest_from_folding(self):
        proto = graph(
            "[a] a = Conv <group = 4> (x, depth) [b] b = Conv (a, w1) [m] m = Mul (b, per) "
            "[n] y = Neg (m)"
        )
        after = assert_pass(
            proto, FoldLinearBranches(), expect=["Conv", "Conv"], rewritten=("b",), rtol=FOLD
        )
        assert [n.name for n in after.graph.node] == ["a", "b"]

    def test_doubling_many_times_takes_no_time(self):
        """Each tensor is read once, though 2^40 paths lead through the graph."""
        lines = [f"[c] t0 = Conv <{PADS}> (x, w3)", "[k] k0 = Mul (t0, tiny)"]
        lines += [f"[a{i}] k{i + 1} = Add (k{i}, k{i})" for i in range(40)]
        lines.append("[z] y = Neg (k40)")
        text = f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ {' '.join(lines)} }}"
        proto = model(text, {"w3": constants()["w3"], "tiny": np.float32(2.0**-40)})
        # powers of two: nothing is rounded but the sum itself, in another order
        assert_pass(proto, FoldLinearBranches(), expect=["Conv"], rtol=FOLD)

    def test_a_chain_longer_than_pythons_stack(self):
        count = 1500
        lines = [f"[c] t0 = Conv <{PADS}> (x, w3)"]
        lines += [f"[n{i}] t{i + 1} = Neg (t{i})" for i in range(count)]
        lines.append(f"[z] y = Neg (t{count})")
        text = f"g (float[N,4,8,8] x) => (float[N,4,8,8] y) {{ {' '.join(lines)} }}"
        loaded = load(model(text, {"w3": constants()["w3"]}))
        FoldLinearBranches()(loaded)
        assert [n.op for n in loaded.graph.nodes] == ["Conv"]


class TestNames:
    def test_the_largest_conv_gives_its_name_and_metadata(self):
        proto = graph(
            f"[small] a = Conv (x, w1) [large] b = Conv <{PADS}> (x, w3) [sum] y = Add (a, b)"
        )
        proto.graph.node[1].metadata_props.add(key="layer", value="7")
        after = assert_pass(
            proto, FoldLinearBranches(), expect=["Conv"], rewritten=("large",), rtol=FOLD
        )
        node = after.graph.node[0]
        assert (node.name, list(node.input), list(node.output)) == ("large", ["x", "w3"], ["y"])
        assert {p.key: p.value for p in node.metadata_props} == {"layer": "7", "onnxq.pass": "fold"}

    def test_a_weight_of_another_shape_gets_another_name(self):
        """Some exporters declare the shapes of weights; a stale one fails the checker."""
        proto = graph(f"[a] a = Conv <{PADS}> (x, wide) [b] y = Conv (a, down)")
        declared = helper.make_tensor_value_info("wide", onnx.TensorProto.FLOAT, [8, 4, 3, 3])
        proto.graph.value_info.append(declared)
        after = assert_pass(proto, FoldLinearBranches(), expect=["Conv"], rtol=FOLD)
        assert [list(i.dims) for i in after.graph.initializer] == [[4, 4, 3, 3]]

    def test_shared_weights_stay_as_they_are(self):
        proto = graph(
            f"[a] a = Conv <{PADS}> (x, w3) [b] b = {bn('a')} [s] y = Add (b, x) "
            f"[o] o = Conv <{PADS}> (x, w3) [r] z = Relu (o)",
            "float[N,C,P,Q] y, float[N,C,P,Q] z",
        )
        after = assert_pass(proto, FoldLinearBranches(), expect=["Conv", "Conv", "Relu"], rtol=FOLD)
        kept = {i.name: numpy_helper.to_array(i) for i in after.graph.initializer}
        np.testing.assert_array_equal(kept["w3"], constants()["w3"])
        assert [n.input[1] for n in after.graph.node[:2]] == ["w3/folded", "w3"]

    def test_a_weight_that_is_an_output_stays(self):
        proto = graph(
            f"[a] a = Conv <{PADS}> (x, w3) [m] y = Mul (a, one)",
            "float[N,C,P,Q] y, float[4,4,3,3] w3",
        )
        assert_pass(proto, FoldLinearBranches(), expect=["Conv"], rtol=FOLD)

    def test_a_weight_that_two_branches_share(self):
        proto = graph(
            f"[n] n = Mul (x, one) [a] a = Conv <{PADS}> (x, w3) [b] b = Conv <{PADS}> (n, w3) "
            "[s] y = Add (a, b)"
        )
        assert_pass(proto, FoldLinearBranches(), expect=["Conv"], rtol=FOLD)


class TestBodies:
    def block(self, x: str, y: str) -> str:
        return (
            f"[{y}3] {y}a = Conv <{PADS}> ({x}, w3) [{y}b] {y}b = {bn(x)} "
            f"[{y}s] {y} = Add ({y}a, {y}b)"
        )

    def test_if_with_outer_constants(self):
        proto = graph(
            f"""[r] r = Relu (x) [if] y = If (p) <
                then_branch = t () => (float[N,4,8,8] a) {{ {self.block("r", "a")} }},
                else_branch = e () => (float[N,4,8,8] b) {{ {self.block("r", "b")} }}
            >""",
            inputs="float[N,4,8,8] x, bool p",
        )
        loaded = load(proto)
        contract = signature(loaded)
        assert FoldLinearBranches()(loaded).rewritten == ("a3", "b3")
        verify(loaded, contract, "FoldLinearBranches")
        after = to_proto(loaded)
        onnx.checker.check_model(after, full_check=True)
        bodies = {a.name: [n.op_type for n in a.g.node] for a in after.graph.node[1].attribute}
        assert bodies == {"then_branch": ["Conv"], "else_branch": ["Conv"]}
        assert FoldLinearBranches()(loaded).rewritten == ()
        for chosen in (False, True):
            feed = {"x": weights(2, 4, 8, 8), "p": np.asarray(chosen)}
            for optimize in (False, True):
                want, got = (run(m, feed, optimize=optimize)[0] for m in (proto, after))
                np.testing.assert_allclose(got, want, rtol=0, atol=FOLD * np.abs(want).max())

    def test_loop_with_a_carried_tensor(self):
        body = self.block("state", "next")
        proto = graph(
            f"""[loop] y = Loop (count, , x) <
                body = b (int64 i, bool c, float[N,4,8,8] state)
                    => (bool again, float[N,4,8,8] next) {{ again = Identity (c) {body} }}
            >""",
            inputs="float[N,4,8,8] x, int64 count",
        )
        loaded = load(proto)
        contract = signature(loaded)
        assert FoldLinearBranches()(loaded).rewritten == ("next3",)
        verify(loaded, contract, "FoldLinearBranches")
        after = to_proto(loaded)
        onnx.checker.check_model(after, full_check=True)
        inner = next(a.g for a in after.graph.node[0].attribute if a.name == "body")
        assert [n.op_type for n in inner.node] == ["Identity", "Conv"]
        feed = {"x": weights(1, 4, 8, 8), "count": np.asarray(2)}
        want, got = run(proto, feed)[0], run(after, feed)[0]
        # the error of the first pass goes through the weights of the second
        kernel, offset = (
            numpy_helper.to_array(i) for i in (*after.graph.initializer, *inner.initializer)
        )
        gain = np.abs(kernel).sum((1, 2, 3)).max()
        first = gain * np.abs(feed["x"]).max() + np.abs(offset).max()
        limit = FOLD * (np.abs(want).max() + gain * first)
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)

    def test_keeps_a_tensor_of_the_outer_graph_that_a_body_reads(self):
        proto = graph(
            f"""[a] a = Conv <{PADS}> (x, w3) [m] m = Mul (a, per) [if] z = If (p) <
                then_branch = t () => (float[N,4,8,8] u) {{ [u] u = Neg (a) }},
                else_branch = e () => (float[N,4,8,8] v) {{ [v] v = Neg (m) }}
            > [s] y = Add (z, x)""",
            inputs="float[N,4,8,8] x, bool p",
        )
        result = FoldLinearBranches()(load(proto))
        assert result.rewritten == ()
        assert result.skipped["m"] == "'a' is also read elsewhere"
