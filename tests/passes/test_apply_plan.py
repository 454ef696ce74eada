"""A plan saved, edited, loaded and applied again."""

import json

import numpy as np
import pytest
from expanding import basis_nodes, expand
from onnx import numpy_helper
from small import conv_model, model, weights

from onnxq.errors import ConfigError
from onnxq.plan import Plan


def two_layers():
    return model(
        """g (float[1,3,8,8] x) => (float[1,2,6,6] y) {
            [one] a = Conv <pads = [1,1,1,1]> (x, u)
            [relu] r = Relu (a)
            [two] y = Conv (r, v)
        }""",
        {"u": weights(4, 3, 3, 3), "v": weights(2, 4, 3, 3, seed=1)},
    )


OPTIONS = [
    {"series": "joint"},
    {"series": "fixed_ratio", "bits": 3},
    {"layout": "merged"},
    {"activations": "none", "block_size": 7},
    {"activations": "none", "bits": 8, "terms": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip_gives_the_same_bytes(tmp_path, options):
    proto = two_layers()
    after, plan = expand(proto, **options)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.nodes == plan.nodes
    assert set(again.scales) == {"one", "two"}
    for name, scales in plan.scales.items():
        for want, got in zip(scales, again.scales[name], strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
    assert expand(proto, again)[0].SerializeToString() == after.SerializeToString()


def test_without_its_scales_they_are_searched_again(tmp_path):
    proto = two_layers()
    after, plan = expand(proto, series="joint")
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.npz").unlink()
    again = Plan.load(tmp_path / "plan.json")
    assert again.scales == {}
    assert expand(proto, again)[0].SerializeToString() == after.SerializeToString()


def test_given_scales_are_used(tmp_path):
    """Not searched again: halved scales reach the graph."""
    proto = two_layers()
    _, plan = expand(proto, activations="none", terms=1, bits=8)
    plan.scales["one"] = tuple(scale * np.float32(0.5) for scale in plan.scales["one"])
    plan.save(tmp_path / "plan.json")
    after, _ = expand(proto, Plan.load(tmp_path / "plan.json"))
    stored = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    np.testing.assert_array_equal(stored["u/term0/scale"].reshape(-1), plan.scales["one"][0])


def edited(path, name, **changes) -> Plan:
    text = json.loads(path.read_text())
    next(node for node in text["nodes"] if node["name"] == name).update(changes)
    path.write_text(json.dumps(text))
    return Plan.load(path)


@pytest.mark.parametrize(
    "changes", [{"bits": 3}, {"terms": 3}, {"series": "joint"}, {"granularity": "per_tensor"}]
)
def test_an_edit_drops_the_stale_scales_of_that_node_only(tmp_path, changes):
    proto = two_layers()
    _, plan = expand(proto, bits=5, terms=2)
    path = tmp_path / "plan.json"
    plan.save(path)
    again = edited(path, "one", **changes)
    assert set(again.scales) == {"two"}
    after, done = expand(proto, again)
    assert len(basis_nodes(after, "one")) == changes.get("terms", 2)
    assert len(done.scales["one"]) == changes.get("terms", 2)
    for want, got in zip(plan.scales["two"], done.scales["two"], strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_edit_of_what_scales_do_not_depend_on_keeps_them(tmp_path):
    _, plan = expand(two_layers(), bits=4, terms=2)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert set(edited(path, "one", activations="none").scales) == {"one", "two"}


def test_a_node_left_alone_by_an_edit(tmp_path):
    proto = two_layers()
    _, plan = expand(proto)
    path = tmp_path / "plan.json"
    plan.save(path)
    after, _ = expand(proto, edited(path, "one", reason="by hand"))
    assert basis_nodes(after, "one") == []
    assert basis_nodes(after, "two")
    assert "u" in {t.name for t in after.graph.initializer}


class TestAnotherModel:
    """Refused before anything is changed, naming the node that differs."""

    @pytest.fixture
    def plan(self):
        return expand(two_layers())[1]

    def refused(self, proto, plan: Plan) -> str:
        with pytest.raises(ConfigError) as error:
            expand(proto, plan)
        assert str(error.value).startswith("the plan was made for another model: ")
        assert str(error.value).endswith("; make a new one with --plan-out")
        return str(error.value)

    def test_no_such_node(self, plan):
        assert "it has no Conv node 'one'" in self.refused(conv_model(), plan)

    def test_another_operator(self, plan):
        proto = model(
            "g (float[2,5] x) => (float[2,4] y) { [one] y = MatMul (x, w) }", {"w": weights(5, 4)}
        )
        assert "it has no Conv node 'one'" in self.refused(proto, plan)

    def test_another_shape(self, plan):
        proto = model(
            "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { [one] y = Conv (x, u) }",
            {"u": weights(4, 3, 1, 1)},
        )
        message = self.refused(proto, plan)
        assert "weight of node 'one' is [4, 3, 1, 1], not [4, 3, 3, 3]" in message

    def test_other_values(self, plan):
        proto = two_layers()
        array = weights(2, 4, 3, 3, seed=1)
        array[0, 0, 0, 0] += 1
        proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(array, "v"))
        assert "the weight of node 'two' has other values" in self.refused(proto, plan)

    def test_a_weight_that_is_no_constant(self, plan):
        proto = model(
            """g (float[1,3,8,8] x, float[4,3,3,3] u) => (float[1,4,6,6] y) {
                [one] y = Conv (x, u)
            }"""
        )
        message = self.refused(proto, plan)
        assert "node 'one' cannot be quantized: weight 'u' is an input of the graph" in message
