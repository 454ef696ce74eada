"""Choosing the channels that get more terms, and the plan that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from expanding import expand, rewritten
from small import model, weights

from onnxq.errors import ConfigError
from onnxq.model import load
from onnxq.passes import SearchScales, SelectNodes
from onnxq.passes.plan_points import PlanPoints, point_bytes
from onnxq.passes.weights import candidates
from onnxq.plan import NodePlan, Plan

HARD = [1, 5]  # channels with outliers


def net() -> onnx.ModelProto:
    """Two convolutions and a MatMul; some channels of the first have outliers."""
    w = weights(8, 3, 3, 3)
    w[HARD, 0, 0, 0] = 30
    return model(
        """g (float[1,3,8,8] x) => (float[1,5] y) {
            [one] a = Conv <pads = [1,1,1,1]> (x, w)
            [relu] r = Relu (a)
            [two] b = Conv <group = 2> (r, v)
            [pool] p = GlobalAveragePool (b)
            [flat] f = Flatten (p)
            [three] y = MatMul (f, u)
        }""",
        {"w": w, "v": weights(6, 4, 3, 3, seed=1), "u": weights(6, 5, seed=2)},
    )


def start(**options: object) -> Plan:
    settings = {"activations": "none", "layout": "merged", "terms": 2, **options}
    return SelectNodes(**settings)(load(net()))


def observing(values: dict[str, list[np.ndarray]]):
    def observe(names):
        for i in range(max(map(len, values.values()))):
            yield {name: values[name][i] for name in names}

    return observe


def test_channels_above_the_tolerance_get_a_second_term():
    """A Gaussian row is right to 0.13 with 4 bits; one whose scale an outlier takes, to 0.2."""
    plan = PlanPoints(tolerance=0.02)(load(net()), start())
    assert np.flatnonzero(plan.points["one"] == 2).tolist() == HARD
    assert plan["one"].terms == 2
    after, complete = expand(net(), plan)
    stored = {t.name: t for t in after.graph.initializer}
    assert list(stored["w/term1/q"].dims) == [2, 3, 3, 3]
    assert len(complete.scales["one"]) == 2


@pytest.mark.parametrize(("tolerance", "terms"), [(1.0, 1), (0.0, 2)])
def test_nodes_whose_channels_are_alike_have_no_points(tolerance, terms):
    plan = PlanPoints(tolerance=tolerance)(load(net()), start())
    assert plan.points == {}
    assert {node.terms for node in plan.quantized} == {terms}
    expand(net(), plan)


def test_a_budget_goes_to_the_worst_and_is_kept():
    entry = start()["one"]
    weight = next(c.found for c in candidates(load(net())) if c.name == "one")
    price = point_bytes(weight, entry)
    assert price == 27 / 2 + 4 + 1
    plan = PlanPoints(budget=int(2 * price))(load(net()), start())
    assert np.flatnonzero(plan.points["one"] == 2).tolist() == HARD
    assert plan["two"].terms == plan["three"].terms == 1


def test_the_file_grows_by_what_was_said():
    one, _ = expand(net(), start(terms=1))
    plan = PlanPoints(budget=200)(load(net()), start())
    some, _ = expand(net(), plan)

    def constants(proto: onnx.ModelProto) -> int:
        names = ("/q", "/scale", "/rows")
        return sum(len(t.raw_data) for t in proto.graph.initializer if t.name.endswith(names))

    assert 150 < constants(some) - constants(one) <= 200 + 2  # half bytes


def test_samples_decide():
    """An input that is always zero carries no error, however badly its weights are rounded."""
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    x[:, 0] = 0  # where the outliers are read
    rest = np.random.default_rng(1).standard_normal((1, 8, 8, 8)).astype(np.float32)
    flat = np.ones((1, 6), np.float32)
    observe = observing({"x": [x, x], "r": [rest, rest], "f": [flat, flat]})
    blind = PlanPoints().errors(load(net()), start())["one"][:, 0]
    seen = PlanPoints(observe=observe, samples=2).errors(load(net()), start())["one"][:, 0]
    assert set(np.argsort(blind)[-2:]) == set(HARD)
    # with the outliers out of sight, what they make of the other weights is all the output
    assert (seen[HARD] > 10 * blind[HARD]).all()
    assert all(np.isfinite(e).all() for e in PlanPoints(observe=observe).errors(
        load(net()), start()).values())  # fmt: skip


def test_more_terms_are_never_worse():
    for found in PlanPoints().errors(load(net()), start(terms=4)).values():
        assert (np.diff(found, axis=1) <= 0).all()


def test_shared_weights_have_the_same_points():
    proto = model(
        """g (float[1,8] x) => (float[1,8] y) {
            [one] a = MatMul (x, w)
            [two] y = MatMul (a, w)
        }""",
        {"w": weights(8, 8)},
    )
    plan = SelectNodes(activations="none", layout="merged")(load(proto))
    quiet, loud = np.eye(8, dtype=np.float32), 100 * weights(8, 8, seed=3)
    observe = observing({"x": [quiet], "a": [loud]})
    errors = PlanPoints(observe=observe).errors(load(proto), plan)
    limit = float(np.median(np.maximum(errors["one"], errors["two"])[:, 0]))
    planned = PlanPoints(tolerance=limit, observe=observe)(load(proto), plan)
    np.testing.assert_array_equal(planned.points["one"], planned.points["two"])
    after, _ = expand(proto, planned)
    assert [t.name for t in after.graph.initializer if t.name.endswith("/q")] == [
        "w/term0/q",
        "w/term1/q",
    ]


def test_centre_and_offset():
    plan = start()
    nodes = [
        n.model_copy(update={"centre": n.op_type == "Conv", "offset": n.op_type != "Conv"})
        for n in plan.nodes
    ]
    planned = PlanPoints(tolerance=0.01)(load(net()), plan.model_copy(update={"nodes": nodes}))
    assert planned["one"].terms == 2  # the centre and the rest
    expand(net(), planned)


@pytest.mark.parametrize("options", [{}, {"tolerance": 1.0, "budget": 1}, {"budget": -1}])
def test_refuses(options):
    with pytest.raises(ConfigError, match="points"):
        PlanPoints(**options)(load(net()), start())


class TestFiles:
    def plan(self, offset: bool = False) -> Plan:
        plan = start()
        if offset:
            nodes = [n.model_copy(update={"offset": True}) for n in plan.nodes]
            plan = plan.model_copy(update={"nodes": nodes})
        return SearchScales()(load(net()), PlanPoints(budget=100)(load(net()), plan))

    @pytest.mark.parametrize("offset", [False, True])
    def test_round_trip(self, tmp_path: Path, offset):
        plan = self.plan(offset)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded.nodes == plan.nodes
        for what in ("points", "offsets"):
            one, two = getattr(plan, what), getattr(loaded, what)
            assert one.keys() == two.keys()
            for name, array in one.items():
                assert array.dtype == two[name].dtype
                np.testing.assert_array_equal(array, two[name])
        first, second = (expand(net(), p)[0].SerializeToString() for p in (plan, loaded))
        assert first == second

    def test_edited_settings_drop_the_points(self, tmp_path: Path):
        self.plan().save(tmp_path / "plan.json")
        text = (tmp_path / "plan.json").read_text().replace('"bits": 4', '"bits": 5')
        (tmp_path / "plan.json").write_text(text)
        assert Plan.load(tmp_path / "plan.json").points == {}

    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("one/points", np.array([1, 3], np.int8)),
            ("one/points", np.array([1.0, 2.0])),
            ("one/points", np.zeros(8, np.int8)),
            ("one/offset", np.array([np.nan], np.float32)),
        ],
    )
    def test_damaged(self, tmp_path: Path, name, array):
        self.plan().save(tmp_path / "plan.json")
        arrays = dict(np.load(tmp_path / "plan.npz"))
        np.savez(tmp_path / "plan.npz", **{**arrays, name: array})
        with pytest.raises(ConfigError, match=r"(points|offset)' is (missing or )?damaged"):
            Plan.load(tmp_path / "plan.json")

    def test_an_offset_that_is_missing(self, tmp_path: Path):
        self.plan(offset=True).save(tmp_path / "plan.json")
        arrays = dict(np.load(tmp_path / "plan.npz"))
        del arrays["one/offset"]
        np.savez(tmp_path / "plan.npz", **arrays)
        with pytest.raises(ConfigError, match="offset' is missing"):
            Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"centre": True, "op_type": "MatMul"}, "centre is for a Conv"),
        ({"centre": True, "shape": (4, 4, 2, 2)}, "odd size"),
        ({"centre": True, "shape": (4, 4, 1, 1)}, "odd size"),
        ({"centre": True, "terms": 1}, "terms >= 2"),
        ({"centre": True, "offset": True}, "no offset"),
        ({"centre": True, "activations": "static", "layout": "merged"}, "centre needs"),
        ({"offset": True, "series": "joint"}, "series digit"),
        ({"offset": True, "granularity": "per_tensor"}, "per_channel"),
        ({"offset": True, "activations": "static", "layout": "merged"}, "offset needs"),
    ],
)
def test_contradictions(fields, message):
    given = {"op_type": "Conv", "shape": (4, 3, 3, 3), "terms": 2, "series": "digit", **fields}
    with pytest.raises(ValueError, match=message):
        NodePlan(name="n", **given)


def test_rewriting_is_verified():
    assert rewritten(net(), PlanPoints(tolerance=0.02)(load(net()), start())).plan.points
