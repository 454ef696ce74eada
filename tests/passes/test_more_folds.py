"""Constants behind weights, no-ops, Gemm to MatMul, affine chains, split batch norms."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small import assert_pass, model, ops, weights

from onnxq.passes import (
    FoldAffine,
    FoldConstants,
    GemmToMatMul,
    RemoveNoOps,
    SplitBatchNorm,
)

# One rounding per folded weight and per product; see test_canonical.
FOLD = 1e-5


class TestFoldConstants:
    @pytest.mark.parametrize(
        ("chain", "shape"),
        [
            ("t = Transpose <perm = [1,0]> (w)", (4, 5)),
            ("t = Reshape (w, s)", (20,)),
            ("i = Identity (w) t = Transpose <perm = [1,0]> (i)", (4, 5)),
            ("a = Unsqueeze (w, ax) u = Squeeze (a, ax) t = Transpose (u)", (4, 5)),
        ],
    )
    def test_shape_changes_behind_a_weight(self, chain, shape):
        proto = model(
            f"g (float[2,5] x) => (float[2,4] y) {{ {chain} [fc] y = MatMul (x, t) }}",
            {"w": weights(*shape), "s": np.int64([5, 4]), "ax": np.int64([0])},
        )
        assert_pass(proto, FoldConstants(), expect=["MatMul"], rtol=FOLD)

    @pytest.mark.parametrize("stored", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
    def test_half_precision_behind_casts(self, stored):
        proto = self._half(stored)
        after = assert_pass(proto, FoldConstants(), expect=["Conv"], rewritten=("cast",), rtol=FOLD)
        assert after.graph.initializer[0].data_type == TensorProto.FLOAT

    def _half(self, stored: int) -> onnx.ModelProto:
        tensor = helper.make_tensor("h", stored, [4, 3, 3, 3], weights(4, 3, 3, 3).reshape(-1))
        nodes = [
            helper.make_node("Cast", ["h"], ["w"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
            [tensor],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    def _dequantized(self, activations: str) -> onnx.ModelProto:
        return model(
            f"""g (float[1,3,6,6] x) => (float[1,4,4,4] y) {{
                {activations}
                [dq] w = DequantizeLinear <axis = 0> (q, s)
                [conv] y = Conv (a, w)
            }}""",
            {
                "q": np.random.default_rng(0).integers(-8, 8, (4, 3, 3, 3)).astype(np.int8),
                "s": np.float32([0.1, 0.2, 0.3, 0.4]),
                "xs": np.float32(0.05),
                "xz": np.uint8(128),
            },
        )

    def test_weights_that_alone_are_quantized(self):
        proto = self._dequantized("[r] a = Relu (x)")
        assert_pass(proto, FoldConstants(), expect=["Relu", "Conv"], rewritten=("dq",), rtol=FOLD)

    def test_keeps_a_quantized_model(self):
        proto = self._dequantized(
            "[q] b = QuantizeLinear (x, xs, xz) [d] a = DequantizeLinear (b, xs, xz)"
        )
        assert_pass(proto, FoldConstants(), expect=ops(proto), skipped={"dq": "quantized already"})

    def test_keeps_computations_that_feed_no_parameter(self):
        proto = model(
            "g (float[2,3] x) => (float[3,2] y) { c = Cast <to = 7> (s) y = Reshape (x, c) }",
            {"s": np.int32([3, 2])},
        )
        assert_pass(proto, FoldConstants(), expect=ops(proto), rewritten=())

    def test_keeps_the_terms_of_a_quantized_model(self):
        import onnxq

        source = model(
            "g (float[1,3,6,6] x) => (float[1,4,4,4] y) { [conv] y = Conv (x, w) }",
            {"w": weights(4, 3, 3, 3)},
        )
        for layout in ("parallel", "merged"):
            proto = onnxq.quantize(source, activations="none", layout=layout).model
            after = assert_pass(proto, FoldConstants(), expect=ops(proto), rewritten=(), rtol=FOLD)
            kinds = {i.data_type for i in after.graph.initializer}
            assert TensorProto.INT4 in kinds


class TestRemoveNoOps:
    @pytest.mark.parametrize(
        "text",
        [
            "[n] a = Dropout (x) y = Relu (a)",
            "[n] a = Cast <to = 1> (x) y = Relu (a)",
            "[n] a = Transpose <perm = [0,1,2]> (x) y = Relu (a)",
            "[n] a = Pad (x, none) y = Relu (a)",
        ],
    )
    def test_takes_out(self, text):
        proto = model(
            f"g (float[2,3,4] x) => (float[2,3,4] y) {{ {text} }}", {"none": np.zeros(6, np.int64)}
        )
        assert_pass(proto, RemoveNoOps(), expect=["Relu"], rewritten=("n",))

    @pytest.mark.parametrize(
        ("text", "shape"),
        [
            ("a = Cast <to = 11> (x) y = Cast <to = 1> (a)", "2,3,4"),
            ("y = Transpose <perm = [0,2,1]> (x)", "2,4,3"),
            ("y = Pad (x, some)", "2,3,5"),
        ],
    )
    def test_keeps_what_does_something(self, text, shape):
        proto = model(
            f"g (float[2,3,4] x) => (float[{shape}] y) {{ {text} }}",
            {"some": np.int64([0, 0, 0, 0, 0, 1])},
        )
        assert_pass(proto, RemoveNoOps(), expect=ops(proto), rewritten=())

    def test_joins_two_transposes(self):
        proto = model("""g (float[2,3,4] x) => (float[4,2,3] y) {
            [p] a = Transpose <perm = [1,2,0]> (x)
            [q] y = Transpose <perm = [1,2,0]> (a)
        }""")
        after = assert_pass(proto, RemoveNoOps(), expect=["Transpose"])
        assert list(after.graph.node[0].attribute[0].ints) == [2, 0, 1]

    def test_transposes_that_undo_each_other_vanish(self):
        proto = model("""g (float[2,3,4] x) => (float[2,3,4] y) {
            [p] a = Transpose <perm = [1,2,0]> (x)
            [q] b = Transpose <perm = [2,0,1]> (a)
            y = Relu (b)
        }""")
        assert_pass(proto, RemoveNoOps(), expect=["Relu"])

    def test_the_second_of_two_reshapes_stays(self):
        proto = model(
            "g (float[2,6] x) => (float[4,3] y) { a = Reshape (x, s) y = Reshape (a, t) }",
            {"s": np.int64([3, 4]), "t": np.int64([4, -1])},
        )
        assert_pass(proto, RemoveNoOps(), expect=["Reshape"])

    def test_keeps_reshapes_where_the_second_copies_a_dimension(self):
        proto = model(
            "g (float[2,6] x) => (float[3,4] y) { a = Reshape (x, s) y = Reshape (a, t) }",
            {"s": np.int64([3, 4]), "t": np.int64([0, -1])},
        )
        assert_pass(proto, RemoveNoOps(), expect=ops(proto), rewritten=())

    def test_keeps_a_transpose_that_is_read_twice(self):
        proto = model("""g (float[2,3] x) => (float[2,3] y, float[3,2] z) {
            a = Transpose <perm = [1,0]> (x)
            y = Transpose <perm = [1,0]> (a)
            z = Relu (a)
        }""")
        assert_pass(proto, RemoveNoOps(), expect=ops(proto), rewritten=())


class TestGemmToMatMul:
    @pytest.mark.parametrize("trans_a", [0, 1])
    @pytest.mark.parametrize("trans_b", [0, 1])
    @pytest.mark.parametrize("bias", [None, (4,), (1, 4), (2, 1), (1,)])
    def test_every_form(self, trans_a, trans_b, bias):
        shape = "5,2" if trans_a else "2,5"
        constants = {"w": weights(4, 5) if trans_b else weights(5, 4)}
        if bias:
            constants["c"] = weights(*bias, seed=1)
        proto = model(
            f"""g (float[{shape}] x) => (float[2,4] y) {{
                [fc] y = Gemm <transA = {trans_a}, transB = {trans_b}, alpha = 0.5, beta = 2.0>
                    (x, w{", c" if bias else ""})
            }}""",
            constants,
        )
        expect = ["Transpose"] * trans_a + ["MatMul"] + (["Add"] if bias else [])
        after = assert_pass(proto, GemmToMatMul(), expect=expect, rewritten=("fc",), rtol=FOLD)
        assert after.graph.node[trans_a].name == "fc"

    def test_a_weight_that_two_read_is_stored_once(self):
        proto = model(
            """g (float[2,5] x) => (float[2,4] y, float[2,4] z) {
                [a] y = Gemm <transB = 1> (x, w)
                [b] z = Gemm <transB = 1> (x, w)
            }""",
            {"w": weights(4, 5)},
        )
        after = assert_pass(proto, GemmToMatMul(), expect=["MatMul", "MatMul"], rtol=FOLD)
        read = {node.input[1] for node in after.graph.node}
        assert len(read) == 1

    def test_keeps_a_weight_that_is_computed(self):
        proto = model("g (float[2,5] x, float[5,4] w) => (float[2,4] y) { [fc] y = Gemm (x, w) }")
        assert_pass(proto, GemmToMatMul(), expect=["Gemm"], skipped={"fc": "not constant"})


class TestFoldAffine:
    def test_a_chain_after_matmul(self):
        proto = model(
            """g (float[2,5] x) => (float[2,4] y) {
                [fc] a = MatMul (x, w)
                b = Add (a, b1)
                c = Mul (b, s)
                d = Sub (c, b1)
                y = Div (d, two)
            }""",
            {
                "w": weights(5, 4),
                "b1": weights(4, seed=1),
                "s": weights(4, seed=2),
                "two": np.float32([2]),
            },
        )
        assert_pass(proto, FoldAffine(), expect=["MatMul", "Add"], rewritten=("fc",), rtol=FOLD)

    def test_batch_norm_where_channels_are_last(self):
        proto = model(
            """g (float[2,5] x) => (float[2,4] y) <float[2,4] a> {
                [fc] a = MatMul (x, w)
                [bn] y = BatchNormalization (a, g1, b1, m1, v1)
            }""",
            {
                "w": weights(5, 4),
                "g1": weights(4, seed=1),
                "b1": weights(4, seed=2),
                "m1": weights(4, seed=3),
                "v1": np.float32([0.5, 1, 2, 3]),
            },
        )
        assert_pass(proto, FoldAffine(), expect=["MatMul", "Add"], rtol=FOLD)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_chain_after_conv_transpose(self, groups, bias):
        proto = model(
            f"""g (float[1,4,5,5] x) => (float[1,6,11,11] y) {{
                [up] a = ConvTranspose <strides = [2,2], group = {groups}>
                    (x, w{", c" if bias else ""})
                b = Add (a, b1)
                y = BatchNormalization (b, g1, b2, m1, v1)
            }}""",
            {
                "w": weights(4, 6 // groups, 3, 3),
                "c": weights(6, seed=9),
                "b1": weights(6, 1, 1, seed=1),
                "g1": weights(6, seed=2),
                "b2": weights(6, seed=3),
                "m1": weights(6, seed=4),
                "v1": np.float32([0.5, 1, 2, 3, 1, 1]),
            },
        )
        assert_pass(proto, FoldAffine(), expect=["ConvTranspose"], rewritten=("up",), rtol=FOLD)

    @pytest.mark.parametrize(
        ("node", "reason"),
        [
            ("[n] y = Mul (a, rows)", "not per output channel"),
            ("[n] y = Div (s, a)", "divides by a tensor"),
            ("[n] y = BatchNormalization (a, s, s, s, v)", "not known to be"),
        ],
    )
    def test_keeps_with_a_reason(self, node, reason):
        declared = "" if "Batch" in node else "<float[4,4] a>"
        proto = model(
            f"""g (float[4,5] x) => (float[4,4] y) {declared} {{
                [fc] a = MatMul (x, w)
                {node}
            }}""",
            {
                "w": weights(5, 4),
                "rows": weights(4, 1),
                "s": weights(4, seed=1),
                "v": np.float32([0.5, 1, 2, 3]),
            },
        )
        assert_pass(proto, FoldAffine(), expect=ops(proto), skipped={"n": reason})

    def test_keeps_matmul_and_add(self):
        proto = model(
            "g (float[4,5] x) => (float[4,4] y) { [fc] a = MatMul (x, w) y = Add (a, b) }",
            {"w": weights(5, 4), "b": weights(4)},
        )
        assert_pass(proto, FoldAffine(), expect=["MatMul", "Add"], rewritten=())

    def test_does_not_change_a_weight_that_another_node_reads(self):
        proto = model(
            """g (float[2,5] x) => (float[2,4] y, float[2,4] z) {
                [fc] a = MatMul (x, w)
                y = Mul (a, s)
                [other] z = MatMul (x, w)
            }""",
            {"w": weights(5, 4), "s": weights(4)},
        )
        assert_pass(proto, FoldAffine(), expect=["MatMul", "MatMul"], rtol=FOLD)


class TestSplitBatchNorm:
    def concat(self, first: str = "[c1] a = Conv (x, w1)", axis: int = 1) -> onnx.ModelProto:
        out = "1,5,4,4" if axis == 1 else "1,2,8,4"
        channels = 5 if axis == 1 else 2
        return model(
            f"""g (float[1,3,4,4] x) => (float[{out}] y) {{
                {first}
                [c2] b = Conv (x, w2)
                [cat] c = Concat <axis = {axis}> (a, b)
                [bn] y = BatchNormalization (c, g1, b1, m1, v1)
            }}""",
            {
                "w1": weights(channels - 3 if axis == 1 else 2, 3, 1, 1),
                "w2": weights(3 if axis == 1 else 2, 3, 1, 1, seed=1),
                "g1": weights(channels, seed=2),
                "b1": weights(channels, seed=3),
                "m1": weights(channels, seed=4),
                "v1": np.linspace(0.5, 3, channels).astype(np.float32),
            },
        )

    def test_moves_a_part_to_each_conv(self):
        expect = ["Conv", "Conv", "BatchNormalization", "BatchNormalization", "Concat"]
        proto = self.concat()
        after = assert_pass(proto, SplitBatchNorm(), expect=expect, rewritten=("bn",), rtol=FOLD)
        sizes = {i.name: numpy_helper.to_array(i).size for i in after.graph.initializer}
        assert sizes["bn/part0/mean"] == 2
        assert sizes["bn/part1/mean"] == 3

    @pytest.mark.parametrize(
        ("proto", "reason"),
        [
            ({"axis": 2}, "axis 1"),
            ({"first": "[c1] d = Conv (x, w1) [r] a = Relu (d)"}, "comes from a Conv"),
        ],
    )
    def test_keeps_with_a_reason(self, proto, reason):
        built = self.concat(**proto)
        assert_pass(built, SplitBatchNorm(), expect=ops(built), skipped={"bn": reason})
