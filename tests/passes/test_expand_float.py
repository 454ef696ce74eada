"""Float compute: small integers in the file, ordinary float weights once the model is loaded."""

import numpy as np
import onnx
import pytest
from expanding import expand, initializers, of_type, optimized
from float_oracle import check_float
from geometry import convs, float_options, gemms, matmuls
from hypothesis import given, settings
from onnx import numpy_helper
from small import conv_model, model, ops, weights

from onnxq.kernels_ref import PerAxis, PerBlock, realize

SETTINGS = settings(deadline=None, max_examples=80)


@SETTINGS
@given(case=convs(ranks=(1, 2, 3)), options=float_options())
def test_conv(case, options):
    check_float(case, *expand(case.proto, activations="none", **options))


@SETTINGS
@given(case=matmuls(), options=float_options())
def test_matmul(case, options):
    check_float(case, *expand(case.proto, activations="none", **options))


@SETTINGS
@given(case=gemms(), options=float_options())
def test_gemm(case, options):
    check_float(case, *expand(case.proto, activations="none", **options))


def linear(op: str) -> onnx.ModelProto:
    attrs, shape = ("<transB = 1>", (16, 33)) if op == "Gemm" else ("", (33, 16))
    return model(
        f"g (float[2,33] x) => (float[2,16] y) {{ [op] y = {op} {attrs} (x, w) }}",
        {"w": weights(*shape)},
    )


def wide_conv() -> onnx.ModelProto:
    """16 outputs: enough for onnxruntime to choose its blocked Conv."""
    return model(
        "g (float[1,3,8,8] x) => (float[1,16,6,6] y) { [op] y = Conv (x, w, b) }",
        {"w": weights(16, 3, 3, 3), "b": weights(16, seed=1)},
    )


MODELS = {"Conv": wide_conv(), "MatMul": linear("MatMul"), "Gemm": linear("Gemm")}


class TestStorage:
    @pytest.mark.parametrize("op", list(MODELS))
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_types_and_values(self, op, bits):
        proto = MODELS[op]
        after, plan = expand(proto, activations="none", bits=bits, terms=2)
        stored = onnx.TensorProto.INT4 if bits <= 4 else onnx.TensorProto.INT8
        assert of_type(after, stored) == ["w/term0/q", "w/term1/q"]
        weight = numpy_helper.to_array(initializers(proto)["w"])
        rows = np.ascontiguousarray(weight.T) if op == "MatMul" else weight.reshape(16, -1)
        turned = op != "Conv"  # Gemm(transB) becomes MatMul
        series = realize("digit", rows, plan.scales["op"], bits=bits, granularity=PerAxis(0))
        for i, term in enumerate(series.terms):
            q = numpy_helper.to_array(initializers(after)[f"w/term{i}/q"]).astype(np.int8)
            expected = term.q.T if turned else term.q.reshape(weight.shape)
            np.testing.assert_array_equal(q, expected)

    def test_the_float_weight_is_gone_and_the_bias_stays(self):
        after, _ = expand(wide_conv(), activations="none")
        assert of_type(after, onnx.TensorProto.FLOAT) == ["b", "w/term0/scale", "w/term1/scale"]

    @pytest.mark.parametrize(
        ("block", "stored"), [(9, [16, 3, 9]), (10, [16, 3, 10]), (27, [16, 1, 27])]
    )
    def test_blocks_of_conv(self, block, stored):
        after, plan = expand(wide_conv(), activations="none", terms=1, block_size=block)
        found = initializers(after)
        assert list(found["w/term0/q"].dims) == stored
        assert list(found["w/term0/scale"].dims) == [16, stored[1], 1]
        assert plan["op"].matrix_granularity() == PerBlock(1, block)

    @pytest.mark.parametrize("block", [64, 128])
    def test_a_block_longer_than_a_row_is_not_padded(self, block):
        after, _ = expand(wide_conv(), activations="none", terms=1, block_size=block)
        assert list(initializers(after)["w/term0/q"].dims) == [16, 1, 27]

    @pytest.mark.parametrize(("block", "blocks"), [(11, 3), (16, 3), (33, 1)])
    def test_blocks_of_matmul_lie_along_its_inputs(self, block, blocks):
        after, _ = expand(linear("MatMul"), activations="none", terms=1, block_size=block)
        found = initializers(after)
        assert np.prod(found["w/term0/q"].dims) == 16 * blocks * block
        assert np.prod(found["w/term0/scale"].dims) == 16 * blocks


class TestWhatOnnxruntimeMakesOfIt:
    """The weight path is folded when a session with default options loads the model."""

    @pytest.mark.parametrize("op", list(MODELS))
    @pytest.mark.parametrize("layout", ["parallel", "merged"])
    @pytest.mark.parametrize("block", [None, 3, 7], ids=["channel", "dividing", "not dividing"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_nothing_is_left_of_the_weight_path(self, op, layout, block, bits):
        after, _ = expand(
            MODELS[op], activations="none", bits=bits, terms=2, layout=layout, block_size=block
        )
        final = optimized(after)
        # the Add may be fused: MatMul + Add to Gemm, Conv + Add to FusedConv
        kernels = ("Conv", "FusedConv", "MatMul", "Gemm")
        assert set(ops(final)) <= {*kernels, "Add", "ReorderInput", "ReorderOutput"}
        products = [node for node in final.graph.node if node.op_type in kernels]
        assert len(products) == (1 if layout == "merged" else 2)
        stored = {t.name: t for t in final.graph.initializer}
        for node in products:
            assert stored[node.input[1]].data_type == onnx.TensorProto.FLOAT

    def test_it_is_there_before(self):
        after, _ = expand(conv_model(), activations="none", bits=4, terms=2, block_size=7)
        assert {"Cast", "Mul", "Reshape", "Slice"} <= set(ops(after))


class TestOpset:
    """The opset rises only as far as the emitted forms need."""

    @pytest.mark.parametrize(
        ("op", "options", "opset"),
        [
            ("Conv", {"bits": 8, "terms": 2}, 7),
            ("MatMul", {"bits": 8, "terms": 2}, 7),
            ("MatMul", {"bits": 8, "terms": 1, "block_size": 7}, 10),
            ("Gemm", {"bits": 8, "terms": 2}, 7),
            ("Conv", {"bits": 4, "terms": 1}, 21),
            ("Conv", {"bits": 8, "terms": 1, "activations": "dynamic"}, 13),
        ],
    )
    def test_raised_from_7(self, op, options, opset):
        text = {
            "Conv": "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { [op] y = Conv (x, w) }",
            "MatMul": "g (float[2,5] x) => (float[2,4] y) { [op] y = MatMul (x, w) }",
            "Gemm": "g (float[2,5] x) => (float[2,4] y) { [op] y = Gemm (x, w, c) }",
        }[op]
        constants = {"w": weights(4, 3, 3, 3) if op == "Conv" else weights(5, 4)}
        if op == "Gemm":
            constants["c"] = weights(4, seed=1)
        proto = model(text, constants, opset=7, ir=4)
        after, _ = expand(proto, **{"activations": "none", **options})  # expand() runs the checker
        assert after.opset_import[0].version == opset
