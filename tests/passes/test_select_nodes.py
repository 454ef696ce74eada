"""Which nodes are quantized, and the reason of each one that is left alone."""

import numpy as np
import onnx
import pytest
from onnx import helper
from small import conv_model, model, weights

from onnxq.errors import ConfigError, ModelError
from onnxq.model import load
from onnxq.passes import SelectNodes
from onnxq.plan import NodePlan


def only(text: str, constants: dict | None = None, **options) -> NodePlan:
    """The one entry of the plan of a small model."""
    (entry,) = SelectNodes(**options)(load(model(text, constants))).nodes
    return entry


class TestSelects:
    def test_conv(self):
        (entry,) = SelectNodes(bits=3, terms=2)(load(conv_model())).nodes
        assert entry.quantized
        assert (entry.name, entry.op_type, entry.weight) == ("conv", "Conv", "w")
        assert entry.shape == (4, 3, 3, 3)
        assert (entry.bits, entry.terms, entry.series) == (3, 2, "digit")
        assert (entry.granularity, entry.activations) == ("per_channel", "dynamic")

    def test_matmul(self):
        entry = only(
            "g (float[2,5] x) => (float[2,4] y) { [op] y = MatMul (x, w) }", {"w": weights(5, 4)}
        )
        assert entry.quantized and entry.activations == "dynamic" and entry.note is None

    @pytest.mark.parametrize(
        ("options", "series"),
        [
            ({"terms": 1}, "fixed_ratio"),
            ({"terms": 2}, "digit"),
            ({"terms": 2, "layout": "merged"}, "digit"),
            ({"terms": 2, "series": "joint"}, "joint"),
        ],
    )
    def test_series(self, options, series):
        (entry,) = SelectNodes(**options)(load(conv_model())).nodes
        assert entry.series == series

    def test_blocks(self):
        (entry,) = SelectNodes(activations="none", block_size=32)(load(conv_model())).nodes
        assert (entry.granularity, entry.block_size) == ("per_block", 32)


class TestFloatInstead:
    """Nodes that are quantized, but computed in float although dynamic was asked for."""

    def test_depthwise(self):
        entry = only(
            "g (float[1,4,8,8] x) => (float[1,4,6,6] y) { [op] y = Conv <group = 4> (x, w) }",
            {"w": weights(4, 1, 3, 3)},
        )
        assert entry.quantized and entry.activations == "none" and "depthwise" in entry.note

    def test_keeps_grouped(self):
        entry = only(
            "g (float[1,4,8,8] x) => (float[1,4,6,6] y) { [op] y = Conv <group = 2> (x, w) }",
            {"w": weights(4, 2, 3, 3)},
        )
        assert entry.activations == "dynamic" and entry.note is None

    def test_keeps_one_channel_without_groups(self):
        entry = only(
            "g (float[1,1,8,8] x) => (float[1,4,6,6] y) { [op] y = Conv (x, w) }",
            {"w": weights(4, 1, 3, 3)},
        )
        assert entry.activations == "dynamic"

    def test_3d(self):
        entry = only(
            "g (float[1,2,4,4,4] x) => (float[1,3,3,3,3] y) { [op] y = Conv (x, w) }",
            {"w": weights(3, 2, 2, 2, 2)},
        )
        assert entry.quantized and entry.activations == "none" and "3-D" in entry.note

    def test_a_vector_times_a_batched_weight(self):
        entry = only(
            "g (float[5] x) => (float[2,4] y) { [op] y = MatMul (x, w) }", {"w": weights(2, 5, 4)}
        )
        assert entry.quantized and entry.activations == "none" and "vector" in entry.note

    def test_constant_left_operand(self):
        entry = only(
            "g (float[4,2] x) => (float[5,2] y) { [op] y = MatMul (w, x) }", {"w": weights(5, 4)}
        )
        assert entry.quantized and entry.activations == "none"
        assert "constant left operand" in entry.note


X = "float[2,5] x"


@pytest.mark.parametrize(
    ("text", "constants", "reason"),
    [
        (
            "g (float[4,2] x) => (float[5,4] y) { [op] y = MatMul (v, w) }",
            {"v": weights(5, 3), "w": weights(3, 4)},
            "both operands are constant",
        ),
        (
            f"""g ({X}, float[2,5] t) => (float[2,2] y) {{
                k = Transpose (t)
                [op] y = MatMul (x, k)
            }}""",
            None,
            "no constant operand",
        ),
        (
            """g (float[1,3,8,8] x, float[4,3,3,3] t) => (float[1,4,6,6] y) {
                [abs] k = Abs (t)
                [op] y = Conv (x, k)
            }""",
            None,
            "weight 'k' is computed by Abs 'abs'",
        ),
        (
            "g (float[1,3,8,8] x, float[4,3,3,3] k) => (float[1,4,6,6] y) { [op] y = Conv (x, k) }",
            None,
            "weight 'k' is an input of the graph",
        ),
        (
            "g (double[2,5] x) => (double[2,4] y) { [op] y = MatMul (x, w) }",
            {"w": weights(5, 4).astype(np.float64)},
            "weight 'w' is float64; only float32 is quantized",
        ),
        (
            "g (float16[2,5] x) => (float16[2,4] y) { [op] y = MatMul (x, w) }",
            {"w": weights(5, 4).astype(np.float16)},
            "weight 'w' is float16; only float32 is quantized",
        ),
        (
            f"g ({X}) => (float[2] y) {{ [op] y = MatMul (x, w) }}",
            {"w": weights(5)},
            "weight 'w' has rank 1",
        ),
        (
            "g (float[2,0] x) => (float[2,4] y) { [op] y = MatMul (x, w) }",
            {"w": np.zeros((0, 4), np.float32)},
            "weight 'w' is empty",
        ),
        (
            f"g ({X}, float[5,4] w) => (float[2,4] y) {{ [op] y = MatMul (x, w) }}",
            {"w": weights(5, 4)},
            "weight 'w' is a graph input that can be overridden at run time",
        ),
        (
            "g (float[1,3,8,8] x, float[4,3,3,3] w) => (float[1,4,6,6] y) { [op] y = Conv (x, w) }",
            {"w": weights(4, 3, 3, 3)},
            "weight 'w' is a graph input that can be overridden at run time",
        ),
        (
            "g (uint8[2,5] x, uint8[5,4] w) => (int32[2,4] y) { [op] y = MatMulInteger (x, w) }",
            None,
            "MatMulInteger is not quantized",
        ),
        (
            """g (float[2,5] x, float[5,4] w) => (float[2,4] y) {
                [op] y = Einsum <equation = "ij,jk->ik"> (x, w)
            }""",
            None,
            "Einsum is not quantized",
        ),
    ],
)
def test_reasons(text, constants, reason):
    entry = only(text, constants)
    assert entry.name == "op"
    assert entry.reason == reason
    assert not entry.quantized


def test_an_operator_of_another_domain():
    """Nobody knows what a Conv of another domain computes."""
    proto = conv_model()
    proto.graph.node[0].domain = "my.ops"
    proto.opset_import.append(helper.make_opsetid("my.ops", 1))
    assert not any(entry.quantized for entry in SelectNodes()(load(proto)).nodes)


def test_operators_without_weights_are_no_candidates():
    proto = model("g (float[2,5] x) => (float[2,5] y) { [r] a = Relu (x) [s] y = Softmax (a) }")
    assert SelectNodes()(load(proto)).nodes == []


def test_already_quantized():
    proto = conv_model()
    proto.graph.node[0].metadata_props.add(key="onnxq.term", value="0")
    # such a node reads a computed weight
    proto.graph.node.insert(0, helper.make_node("Abs", ["w"], ["k"], name="abs"))
    proto.graph.node[1].input[1] = "k"
    (entry,) = SelectNodes()(load(proto)).nodes
    assert entry.reason == "already quantized by onnxq"


def chain(**constants: np.ndarray) -> onnx.ModelProto:
    """Three MatMuls called encoder/one, encoder/two and head."""
    proto = model(
        """g (float[2,5] x) => (float[2,5] y) {
            [one] a = MatMul (x, u)
            [two] b = MatMul (a, v)
            [head] y = MatMul (b, w)
        }""",
        {
            "u": weights(5, 5),
            "v": weights(5, 5, seed=1),
            "w": weights(5, 5, seed=2),
        }
        | constants,
    )
    proto.graph.node[0].name, proto.graph.node[1].name = "encoder/one", "encoder/two"
    return proto


class TestGlobs:
    def reasons(self, **options) -> dict[str, str | None]:
        return {entry.name: entry.reason for entry in SelectNodes(**options)(load(chain())).nodes}

    def test_exclude(self):
        why = "excluded by --exclude encoder/*"
        assert self.reasons(exclude=("encoder/*",)) == {
            "encoder/one": why,
            "encoder/two": why,
            "head": None,
        }

    def test_include(self):
        why = "not matched by --include"
        assert self.reasons(include=("head",)) == {
            "encoder/one": why,
            "encoder/two": why,
            "head": None,
        }

    def test_exclude_wins_over_include(self):
        found = self.reasons(include=("encoder/*",), exclude=("*/two",))
        assert found == {
            "encoder/one": None,
            "encoder/two": "excluded by --exclude */two",
            "head": "not matched by --include",
        }

    def test_case_matters(self):
        with pytest.raises(ConfigError, match="--include 'HEAD' matches no quantizable node"):
            self.reasons(include=("HEAD",))

    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_did_you_mean(self, option):
        with pytest.raises(ConfigError) as error:
            self.reasons(**{option: ("encoder/tow",)})
        assert f"--{option} 'encoder/tow' matches no quantizable node" in str(error.value)
        assert "did you mean 'encoder/two'" in str(error.value)

    def test_nothing_alike(self):
        with pytest.raises(ConfigError, match="see `onnxq inspect` for the names"):
            self.reasons(exclude=("####",))


class TestNotFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_is_refused_by_name(self, value):
        bad = weights(5, 5)
        bad[1, 2] = bad[3, 3] = value
        with pytest.raises(ModelError) as error:
            SelectNodes()(load(chain(v=bad)))
        assert str(error.value) == (
            "weight 'v' of MatMul 'encoder/two' has 2 NaN or infinite values: repair the model, "
            "or leave the node alone with --exclude 'encoder/two'"
        )

    def test_excluded_it_does_not_matter(self):
        bad = np.full((5, 5), np.nan, np.float32)
        plan = SelectNodes(exclude=("encoder/two",))(load(chain(v=bad)))
        assert [entry.name for entry in plan.quantized] == ["encoder/one", "head"]
