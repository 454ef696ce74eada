"""The exact float folds, each with what it rewrites and what it keeps."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small import assert_pass, conv_model, feeds, model, ops, run, weights

from onnxq.model import load, to_proto
from onnxq.passes import (
    PIPELINE,
    ConstantsToInitializers,
    FoldBatchNorm,
    FreezeParameters,
    NameNodes,
    RemoveIdentity,
)

# A fold rounds each weight once (2^-24) and each product once; with the few hundred products of
# these models the outputs agree to well under 1e-5 of their largest value.
FOLD = 1e-5


def batch_norm(channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "gamma": rng.uniform(0.5, 2, channels).astype(np.float32) * np.float32([1, -1, 1, 1]),
        "beta": weights(channels, seed=6),
        "mean": weights(channels, seed=7),
        "var": rng.uniform(0.1, 3, channels).astype(np.float32),
    }


BN = "BatchNormalization <epsilon = 0.01> (c, gamma, beta, mean, var)"


class TestNameNodes:
    def test_names_unnamed_nodes_after_their_output(self):
        proto = model("g (float[2] x) => (float[2] y) { a = Relu(x) y = Neg(a) }")
        after = assert_pass(proto, NameNodes(), expect=["Relu", "Neg"], rewritten=("a", "y"))
        assert [n.name for n in after.graph.node] == ["a", "y"]

    def test_separates_nodes_of_one_name(self):
        # onnxruntime refuses such a file, so there is nothing to compare outputs with
        loaded = load(model("g (float[2] x) => (float[2] y) { [n] a = Relu(x) [n] y = Neg(a) }"))
        assert NameNodes()(loaded).rewritten == ("y",)
        assert [node.name for node in loaded.graph.nodes] == ["n", "y"]
        assert NameNodes()(loaded).rewritten == ()

    def test_keeps_names(self):
        assert_pass(conv_model(), NameNodes(), expect=["Conv", "Relu"], rewritten=())


class TestConstantsToInitializers:
    def test_moves_the_value(self):
        proto = model("""g (float[2] x) => (float[2] y) {
            [k] c = Constant <value = float[2] {1.5, -2}> ()
            [a] y = Add(x, c)
        }""")
        after = assert_pass(proto, ConstantsToInitializers(), expect=["Add"], rewritten=("k",))
        assert [i.name for i in after.graph.initializer] == ["c"]

    @pytest.mark.parametrize(
        ("attribute", "dtype"), [("value_float = 2.0", np.float32), ("value_int = 3", np.int64)]
    )
    def test_moves_scalar_attributes(self, attribute, dtype):
        proto = model(f"""g (float[2] x) => (float[2] y) {{
            [k] c = Constant <{attribute}> ()
            [cast] f = Cast <to = 1> (c)
            [a] y = Add(x, f)
        }}""")
        after = assert_pass(proto, ConstantsToInitializers(), expect=["Cast", "Add"])
        assert onnx.numpy_helper.to_array(after.graph.initializer[0]).dtype == dtype

    def test_keeps_packed_types(self):
        tensor = helper.make_tensor("v", TensorProto.INT4, [3], [1, -8, 7])
        node = helper.make_node("Constant", [], ["c"], name="k", value=tensor)
        cast = helper.make_node("Cast", ["c"], ["y"], name="cast", to=TensorProto.FLOAT)
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
        graph = helper.make_graph([node, cast], "g", [], [out])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        after = assert_pass(proto, ConstantsToInitializers(), expect=["Cast"])
        assert after.graph.initializer[0].data_type == TensorProto.INT4

    def test_keeps_a_constant_that_is_a_graph_output(self):
        proto = model("""g (float[2] x) => (float[2] y, float[2] c) {
            [k] c = Constant <value = float[2] {1.5, -2}> ()
            [a] y = Add(x, c)
        }""")
        assert_pass(
            proto,
            ConstantsToInitializers(),
            expect=["Constant", "Add"],
            skipped={"k": "output of the graph"},
        )

    def test_works_in_bodies(self):
        proto = model("""g (bool p, float[2] x) => (float[2] y) {
            [if] y = If (p) <
                then_branch = t () => (float[2] a) {
                    [k] c = Constant <value = float[2] {1, 2}> ()
                    [add] a = Add(x, c)
                },
                else_branch = e () => (float[2] b) { [neg] b = Neg(x) }
            >
        }""")
        assert_pass(proto, ConstantsToInitializers(), expect=["If"], rewritten=("k",))


class TestRemoveIdentity:
    def test_bypasses(self):
        proto = model("g (float[2] x) => (float[2] y) { [i] a = Identity(x) [r] y = Relu(a) }")
        assert_pass(proto, RemoveIdentity(), expect=["Relu"], rewritten=("i",))

    def test_keeps_the_name_of_a_graph_output(self):
        proto = model("""g (float[2] x) => (float[2] y, float[2] z) {
            [r] a = Relu(x)
            [i] y = Identity(a)
            [n] z = Neg(a)
        }""")
        after = assert_pass(proto, RemoveIdentity(), expect=["Relu", "Neg"])
        assert after.graph.node[0].output[0] == "y"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("g (float[2] x) => (float[2] y) { [i] y = Identity(x) }", "directly"),
            (
                """g (float[2] x) => (float[2] a, float[2] y) {
                    [r] a = Relu(x)
                    [i] y = Identity(a)
                }""",
                "both",
            ),
        ],
    )
    def test_keeps_what_names_an_output(self, text, reason):
        proto = model(text)
        assert_pass(proto, RemoveIdentity(), expect=ops(proto), skipped={"i": reason})

    def test_keeps_an_outer_tensor_that_a_body_returns(self):
        proto = model("""g (bool p, float[2] x) => (float[2] y) {
            [r] a = Relu(x)
            [if] y = If (p) <
                then_branch = t () => (float[2] b) { [i] b = Identity(a) },
                else_branch = e () => (float[2] c) { [neg] c = Neg(a) }
            >
        }""")
        assert_pass(proto, RemoveIdentity(), expect=["Relu", "If"], skipped={"i": "outer graph"})


class TestFreezeParameters:
    def listed(self, extra: str = "") -> onnx.ModelProto:
        proto = conv_model()
        for name in ("w", "b"):
            shape = [4, 3, 3, 3] if name == "w" else [4]
            proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return proto

    def test_drops_weights_from_the_inputs(self):
        after = assert_pass(
            self.listed(),
            FreezeParameters(),
            expect=["Conv", "Relu"],
            rewritten=("b", "w"),
            rtol=FOLD,  # onnxruntime chooses another Conv kernel for a weight that is constant
        )
        assert [i.name for i in after.graph.input] == ["x"]

    def test_keeps_an_overridable_input_that_is_no_parameter(self):
        proto = model(
            """g (float[2] x, float[2] t) => (float[2] y) { [p] y = Pow(x, t) }""",
            {"t": np.float32([2, 3])},
        )
        after = assert_pass(
            proto, FreezeParameters(), expect=["Pow"], rewritten=(), skipped={"t": "no trained"}
        )
        assert [i.name for i in after.graph.input] == ["x", "t"]


class TestFoldBatchNorm:
    @pytest.mark.parametrize("bias", [True, False])
    def test_folds_into_conv(self, bias):
        constants = {"w": weights(4, 3, 3, 3), **batch_norm(4)}
        if bias:
            constants["b"] = weights(4, seed=1)
        proto = model(
            f"""g (float[1,3,8,8] x) => (float[1,4,8,8] y) {{
                [conv] c = Conv <pads = [1,1,1,1]> (x, w{", b" if bias else ""})
                [bn] y = {BN}
            }}""",
            constants,
        )
        after = assert_pass(proto, FoldBatchNorm(), expect=["Conv"], rewritten=("bn",), rtol=FOLD)
        assert after.graph.node[0].name == "conv"
        assert after.graph.node[0].output[0] == "y"

    @pytest.mark.parametrize("trans", [0, 1])
    def test_folds_into_gemm(self, trans):
        shape = (4, 5) if trans else (5, 4)
        proto = model(
            f"""g (float[2,5] x) => (float[2,4] y) {{
                [fc] c = Gemm <transB = {trans}> (x, w, b)
                [bn] y = {BN}
            }}""",
            {"w": weights(*shape), "b": weights(1, 4, seed=1), **batch_norm(4)},
        )
        assert_pass(proto, FoldBatchNorm(), expect=["Gemm"], rewritten=("bn",), rtol=FOLD)

    def test_does_not_change_a_weight_that_another_conv_reads(self):
        proto = model(
            f"""g (float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,6,6] z) {{
                [conv] c = Conv (x, w, b)
                [bn] y = {BN}
                [other] z = Conv (x, w, b)
            }}""",
            {"w": weights(4, 3, 3, 3), "b": weights(4, seed=1), **batch_norm(4)},
        )
        assert_pass(proto, FoldBatchNorm(), expect=["Conv", "Conv"], rtol=FOLD)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (f"[conv] c = Conv (x, w) [bn] y = {BN} [r] z = Relu(c)", "also read elsewhere"),
            (f"[conv] z = Conv (x, w) [c] c = Relu(z) [bn] y = {BN}", "follows Relu"),
        ],
    )
    def test_keeps_what_is_not_a_plain_pair(self, text, reason):
        proto = model(
            f"g (float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,6,6] z) {{ {text} }}",
            {"w": weights(4, 3, 3, 3), **batch_norm(4)},
        )
        assert_pass(proto, FoldBatchNorm(), expect=ops(proto), skipped={"bn": reason})

    def test_keeps_gemm_with_alpha(self):
        proto = model(
            f"""g (float[2,5] x) => (float[2,4] y) {{
                [fc] c = Gemm <alpha = 0.5> (x, w)
                [bn] y = {BN}
            }}""",
            {"w": weights(5, 4), **batch_norm(4)},
        )
        assert_pass(proto, FoldBatchNorm(), expect=ops(proto), skipped={"bn": "alpha"})

    def test_keeps_parameters_that_are_inputs(self):
        proto = model(
            f"""g (float[1,3,8,8] x, float[4] gamma) => (float[1,4,6,6] y) {{
                [conv] c = Conv (x, w)
                [bn] y = {BN}
            }}""",
            {"w": weights(4, 3, 3, 3), **{k: v for k, v in batch_norm(4).items() if k != "gamma"}},
        )
        assert_pass(proto, FoldBatchNorm(), expect=ops(proto), skipped={"bn": "not constant"})


def test_pipeline_in_order_on_an_exporter_like_model():
    """Constant -> Identity -> Conv -> BatchNormalization -> Identity, all at once."""
    proto = model(
        f"""g (float[1,3,8,8] x) => (float[1,4,6,6] y) {{
            k = Constant <value_floats = [0.5, -1.0, 2.0, 0.25]> ()
            b = Identity (k)
            c = Conv (x, w, b)
            n = {BN}
            y = Identity (n)
        }}""",
        {"w": weights(4, 3, 3, 3), **batch_norm(4)},
    )
    loaded = load(proto)
    for pass_ in PIPELINE:
        pass_(loaded)
    after = to_proto(loaded)
    assert ops(after) == ["Conv"]
    feed = feeds(proto)
    want, got = run(proto, feed)[0], run(after, feed)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=FOLD * np.abs(want).max())
    for pass_ in PIPELINE:
        assert pass_(loaded).rewritten == ()
