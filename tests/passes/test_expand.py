"""The form of the expanded graph: names, metadata, the bias, shared activations, a second run."""

import numpy as np
import onnx
import pytest
from expanding import basis_nodes, expand, metadata, names, node, rewritten
from onnx import numpy_helper
from small import conv_model, feeds, model, ops, run, weights

from onnxq.api import quantize
from onnxq.errors import ModelError
from onnxq.model import to_proto
from onnxq.passes import Expand

LAYOUTS = [("none", "parallel"), ("none", "merged"), ("dynamic", "parallel"), ("dynamic", "merged")]


class TestNames:
    def test_float_parallel(self):
        after, _ = expand(conv_model(), activations="none", terms=2)
        assert [n for n in names(after) if n.startswith("conv")] == [
            "conv/term0",
            "conv/term1",
            "conv/sum",
        ]

    def test_float_merged_keeps_the_node(self):
        after, _ = expand(conv_model(), activations="none", terms=2, layout="merged")
        assert [n for n in names(after) if n.startswith("conv")] == ["conv"]

    def test_three_terms(self):
        after, _ = expand(conv_model(), activations="none", terms=3)
        assert [n for n in names(after) if "sum" in n] == ["conv/sum1", "conv/sum"]
        assert node(after, "conv/sum").input[0] == node(after, "conv/sum1").output[0]

    def test_integer_parallel(self):
        after, _ = expand(conv_model(), terms=2)
        assert {"conv/term0", "conv/term1", "conv/sum", "conv/bias"} <= set(names(after))
        assert node(after, "conv/sum").op_type == node(after, "conv/bias").op_type == "Add"

    def test_integer_merged(self):
        after, _ = expand(conv_model(), terms=2, layout="merged")
        assert [n for n in names(after) if n.startswith("conv")] == [
            "conv/merged",
            "conv/merged/scale",
            "conv/merged/rescaled",
            "conv/bias",
        ]

    @pytest.mark.parametrize(("activations", "layout"), LAYOUTS)
    def test_the_original_output_keeps_its_name(self, activations, layout):
        after, _ = expand(conv_model(), activations=activations, layout=layout)
        assert "c" in {name for n in after.graph.node for name in n.output}
        assert node(after, "relu").input[0] == "c"

    def test_names_that_are_taken(self):
        proto = model(
            """g (float[2,5] x) => (float[2,4] y) {
                [fc] a = MatMul (x, w)
                [one] b = Neg (a)
                [two] y = Neg (b)
            }""",
            {"w": weights(5, 4)},
        )
        proto.graph.node[1].name, proto.graph.node[2].name = "fc/term0", "fc/sum"
        after, _ = expand(proto, activations="none", terms=2)
        assert len(set(names(after))) == len(names(after))
        assert basis_nodes(after, "fc")[0].name == "fc/term0_1"

    def test_no_node_for_the_bias_where_there_is_none(self):
        proto = model(
            "g (float[2,5] x) => (float[2,4] y) { [fc] y = MatMul (x, w) }", {"w": weights(5, 4)}
        )
        after, _ = expand(proto, terms=2)
        assert "fc/bias" not in names(after)
        assert node(after, "fc/sum").output[0] == "y"


class TestMetadata:
    @pytest.mark.parametrize(("activations", "layout"), LAYOUTS)
    def test_of_basis_nodes(self, activations, layout):
        after, _ = expand(conv_model(), bits=3, activations=activations, layout=layout)
        terms = ["0+1"] if layout == "merged" else ["0", "1"]
        found = basis_nodes(after, "conv")
        assert [n.op_type for n in found] == [
            "ConvInteger" if activations == "dynamic" else "Conv"
        ] * len(terms)
        for basis, term in zip(found, terms, strict=True):
            assert metadata(basis) == {
                "onnxq.pass": "expand",
                "onnxq.node": "conv",
                "onnxq.term": term,
                "onnxq.bits": "3",
            }

    def test_of_the_sum(self):
        after, _ = expand(conv_model(), terms=2)
        for name in ("conv/sum", "conv/bias"):
            assert metadata(node(after, name)) == {"onnxq.pass": "expand", "onnxq.node": "conv"}

    def test_of_the_source_stays(self):
        proto = conv_model()
        proto.graph.node[0].metadata_props.add(key="mine", value="kept")
        after, _ = expand(proto, activations="none", layout="merged")
        assert metadata(node(after, "conv"))["mine"] == "kept"


class TestBias:
    """That the value is right is shown beside kernels_ref; here, that it is one addition."""

    @pytest.mark.parametrize("terms", [1, 2, 4])
    def test_float_bias_goes_to_the_first_term(self, terms):
        after, _ = expand(conv_model(), activations="none", terms=terms)
        reads = ["b" in basis.input for basis in basis_nodes(after, "conv")]
        assert reads == [True] + [False] * (terms - 1)

    def test_a_bias_that_is_no_constant(self):
        proto = model(
            """g (float[1,3,8,8] x, float[4] b) => (float[1,4,6,6] y) {
                [conv] y = Conv (x, w, b)
            }""",
            {"w": weights(4, 3, 3, 3)},
        )
        after, _ = expand(proto, terms=2)
        feed = {"x": np.zeros((1, 3, 8, 8), np.float32), "b": weights(4, seed=3)}
        (y,) = run(after, feed)
        np.testing.assert_array_equal(y, np.broadcast_to(feed["b"].reshape(4, 1, 1), y.shape))


class TestSharedActivation:
    TEXT = """g (float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,6,6] z) {
        [a] y = Conv (x, v)
        [b] z = Conv (x, w)
    }"""

    def proto(self) -> onnx.ModelProto:
        return model(self.TEXT, {"v": weights(4, 3, 3, 3), "w": weights(4, 3, 3, 3, seed=1)})

    def test_int8_is_made_once_for_all_readers_and_terms(self):
        after, _ = expand(self.proto(), bits=4, terms=2)
        assert ops(after).count("ConvInteger") == 4
        assert ops(after).count("QuantizeLinear") == 1
        assert ops(after).count("ReduceMax") == ops(after).count("ReduceMin") == 1

    def test_uint8_too(self):
        after, _ = expand(self.proto(), bits=8, terms=2)
        assert ops(after).count("ConvInteger") == 4
        assert ops(after).count("DynamicQuantizeLinear") == 1

    def test_different_tensors_are_quantized_apart(self):
        proto = model(
            """g (float[2,5] x) => (float[2,5] y) {
                [a] h = MatMul (x, w)
                [b] y = MatMul (h, w)
            }""",
            {"w": weights(5, 5)},
        )
        after, _ = expand(proto, terms=2)
        assert ops(after).count("DynamicQuantizeLinear") == 2

    def test_scalars_are_shared(self):
        after, _ = expand(self.proto(), bits=4, terms=2)
        scalars = [t for t in after.graph.initializer if t.name.startswith("onnxq/")]
        values = {(t.data_type, numpy_helper.to_array(t).item()) for t in scalars}
        # 0, 1e-20, 1/255, -128 for the zero point, and the weights' own zero point
        assert len(scalars) == len(values) == 5
        assert all(t.dims == [] for t in scalars)


class TestSecondRun:
    @pytest.mark.parametrize(("activations", "layout"), LAYOUTS)
    def test_a_quantized_model_is_refused(self, activations, layout):
        after, _ = expand(conv_model(), activations=activations, layout=layout)
        with pytest.raises(ModelError, match=r"nothing to quantize.*already quantized by onnxq"):
            quantize(after, terms=1)

    @pytest.mark.parametrize(("activations", "layout"), LAYOUTS)
    def test_the_rest_of_a_partly_quantized_model(self, activations, layout):
        proto = model(
            """g (float[1,3,8,8] x) => (float[1,4,4,4] y) {
                [one] a = Conv (x, v)
                [two] y = Conv (a, w)
            }""",
            {"v": weights(4, 3, 3, 3), "w": weights(4, 4, 3, 3, seed=1)},
        )
        options = {"activations": activations, "layout": layout}
        half, _ = expand(proto, include=("one",), **options)
        assert [n.name for n in half.graph.node if n.name.startswith("two")] == ["two"]
        whole, plan = expand(half, **options)
        assert [entry.name for entry in plan.quantized] == ["two"]
        reasons = {entry.reason for entry in plan.nodes if not entry.quantized}
        assert reasons == {"already quantized by onnxq"}
        at_once, _ = expand(proto, **options)
        feed = feeds(proto)
        for optimize in (True, False):
            (want,) = run(at_once, feed, optimize=optimize)
            (got,) = run(whole, feed, optimize=optimize)
            np.testing.assert_array_equal(got, want)


def test_the_source_is_not_changed():
    proto = conv_model()
    before = proto.SerializeToString()
    expand(proto)
    assert proto.SerializeToString() == before


def test_two_runs_give_the_same_bytes():
    first, second = (expand(conv_model())[0] for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()


def test_result_names_nodes_and_reasons():
    proto = model(
        """g (float[2,5] x, float[5,5] k) => (float[2,5] y) {
            [plain] a = MatMul (x, w)
            [computed] b = Neg (k)
            [left] y = MatMul (a, b)
        }""",
        {"w": weights(5, 5)},
    )
    done = rewritten(proto)
    result = done.passes["Expand"]
    assert result.rewritten == ("plain",)
    assert result.skipped == {"left": "no constant operand"}
    calls = []
    again = rewritten(proto)
    assert to_proto(again.model) == to_proto(done.model)
    Expand(again.plan.model_copy(update={"nodes": []}), lambda *call: calls.append(call))(
        again.model
    )
    assert calls == [("expanding", 0, 0)]
