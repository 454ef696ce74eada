"""Outlier columns: right for every input and every choice, and chosen where inputs have some."""

import numpy as np
import pytest
from expanding import basis_nodes, expand, gamma, initializers, node, optimized, with_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from small import model, ops, run, weights

from onnxq.kernels_ref.activation_series import activation_series
from onnxq.kernels_ref.outliers import split_columns
from onnxq.model import load
from onnxq.passes import SelectNodes
from onnxq.passes.choose_outliers import ChooseOutliers
from onnxq.plan import NodePlan, Plan

WIDTH, OUT = 32, 5
LINEAR = "g (float[3,32] x) => (float[3,5] y) { [fc] y = MatMul (x, w) }"
SHARED = """g (float[2,3,32] x) => (float[2,3,5] a, float[2,3,5] b) {
    [one] a = MatMul (x, w)
    [two] b = MatMul (x, v)
}"""


def planned(proto, outliers, **options):
    """A plan with these outlier columns for every node."""
    plan = SelectNodes(activations="dynamic", **options)(load(proto))
    nodes = [entry.model_copy(update={"outliers": tuple(outliers)}) for entry in plan.nodes]
    return expand(proto, Plan(nodes=[NodePlan(**entry.model_dump()) for entry in nodes]))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    columns=st.sets(st.integers(0, WIDTH - 1), min_size=1, max_size=WIDTH - 1),
    far=st.sampled_from([1.0, 100.0]),
    weight=st.sampled_from(
        [(8, 1, "parallel"), (7, 2, "parallel"), (4, 2, "parallel"), (4, 2, "merged")]
    ),
    activation=st.sampled_from([(8, 1), (7, 2), (4, 1), (3, 3)]),
)
def test_exact_but_for_rounding(seed, columns, far, weight, activation):
    """Error: of the others half a level each times |w|; of the columns only the weight's."""
    bits, count, layout = weight
    w, x = weights(WIDTH, OUT, seed=seed), weights(3, WIDTH, seed=seed + 1)
    chosen = sorted(columns)
    x[:, chosen] *= far
    after, plan = planned(
        model(LINEAR, {"w": w}),
        chosen,
        bits=bits,
        terms=count,
        activation_bits=activation[0],
        activation_terms=activation[1],
        products="all",
        layout=layout,
    )
    others, few = split_columns(x, np.array(chosen))
    terms = activation_series(others, *activation)  # uint8, as in every pair of MatMul on x86
    found = basis_nodes(after, "fc")
    names = list(dict.fromkeys(basis.input[0] for basis in found))
    seen = with_outputs(after, names, {"x": x})
    for name, term in zip(names, terms, strict=True):
        np.testing.assert_array_equal(seen[name], term.q, strict=True)
    # Digits: one wide integer; one of them is what absmax gives.
    levels = ((1 << bits - 1) - 1) * sum(2 ** (bits * i) for i in range(count))
    step = np.abs(w).max(0) / levels
    # Half a step of the weight for every element of x, and what the last term of x leaves.
    bound = np.abs(x).sum(1, keepdims=True) * step / 2
    bound = bound + terms[-1].scale / 2 * (np.abs(w) + step).sum(0)
    magnitude = np.abs(x) @ (np.abs(w) + step)
    bound = bound * 1.001 + gamma(WIDTH + 20) * magnitude
    exact = x.astype(np.float64) @ w
    for optimize in (True, False):
        (y,) = run(after, {"x": x}, optimize=optimize)
        assert (np.abs(y - exact) <= bound).all()
    assert few.shape[1] == len(chosen) == len(plan["fc"].outliers)


def test_far_columns_cost_the_others_nothing():
    w, x = weights(WIDTH, OUT), weights(64, WIDTH, seed=1)
    x[:, [3, 20]] *= 50
    proto = model(LINEAR.replace("3,", "64,"), {"w": w})
    exact = x.astype(np.float64) @ w

    def error(outliers):
        after, _ = planned(proto, outliers, bits=8, terms=2)
        return np.sqrt(np.mean((run(after, {"x": x})[0] - exact) ** 2))

    def levels(columns):
        others, _ = split_columns(x, np.array(columns, np.int64))
        return others.max() - others.min()

    # Rounding errors are even within a level, so they follow the range.
    expected = levels([3, 20]) / levels([])
    assert error([3, 20]) == pytest.approx(error([]) * expected, rel=0.25)


def test_columns_far_beyond_what_was_expected():
    """Nothing saturates: columns that were not chosen set the range as ever."""
    w, x = weights(WIDTH, OUT), weights(3, WIDTH, seed=1)
    x[1, 9] = 1e4
    after, _ = planned(model(LINEAR, {"w": w}), [2], bits=8, terms=2)
    (y,) = run(after, {"x": x})
    exact = x.astype(np.float64) @ w
    assert np.abs(y - exact).max() <= 1e4 / 255 * np.abs(w).sum(0).max()
    assert np.abs(y[1] - exact[1]).max() <= 0.01 * np.abs(exact[1]).max()


def test_beside_terms_of_some_channels():
    """The rows of the weight are those of all its terms, whichever channels they cover."""
    w, x = weights(WIDTH, OUT), weights(3, WIDTH, seed=1)
    x[:, [3, 20]] *= 100
    points = np.array([1, 3, 2, 1, 3], np.int8)
    entry = SelectNodes(activations="dynamic", bits=4, terms=3)(load(model(LINEAR, {"w": w})))
    entry = entry["fc"].model_copy(update={"outliers": (3, 20), "activation_terms": 4})

    def output(columns):
        node_plan = entry.model_copy(update={"outliers": columns, "products": "all"})
        after, _ = expand(model(LINEAR, {"w": w}), Plan(nodes=[node_plan], points={"fc": points}))
        return run(after, {"x": x})[0]

    # With four terms nothing but the weight's error is left, which columns do not change.
    scale = np.abs(x) @ np.abs(w)
    assert (np.abs(output((3, 20)) - output(())) <= gamma(WIDTH + 30) * scale).all()


class TestGraph:
    def test_readers_of_one_tensor_share_the_split(self):
        constants = {"w": weights(WIDTH, OUT), "v": weights(WIDTH, OUT, seed=1)}
        after, _ = planned(model(SHARED, constants), [1, 5], bits=8, terms=1)
        assert ops(after).count("DynamicQuantizeLinear") == 1
        assert [n for n in ops(after) if n in ("MatMulInteger", "MatMul")] == [
            "MatMulInteger",
            "MatMul",
        ] * 2
        few = node(after, "one/outliers").input[0]
        assert few == node(after, "two/outliers").input[0] == "x/outliers/few"

    def test_rows_are_computed_at_load_and_stored_once(self):
        after, _ = planned(model(LINEAR, {"w": weights(WIDTH, OUT)}), [1, 5], bits=8, terms=1)
        stored = [t for t in initializers(after).values() if OUT in t.dims and WIDTH in t.dims]
        assert len(stored) == 1
        kinds = [n.op_type for n in optimized(after).graph.node]
        assert "Cast" not in kinds
        assert kinds.count("Gather") == 1

    def test_names(self):
        after, _ = planned(model(LINEAR, {"w": weights(WIDTH, OUT)}), [1], bits=7, terms=2)
        assert {"fc/term0", "fc/term1", "fc/outliers", "fc/sum"} <= {
            n.name for n in after.graph.node
        }

    def test_other_nodes_are_as_before(self):
        proto = model(LINEAR, {"w": weights(WIDTH, OUT)})
        plain, _ = planned(proto, [], bits=8, terms=1)
        assert "Gather" not in ops(plain)


GOOD = {"name": "fc", "op_type": "MatMul", "shape": (32, 5), "activations": "dynamic"}


class TestPlan:
    def test_is_kept(self, tmp_path):
        plan = Plan(nodes=[NodePlan(**GOOD, outliers=(1, 4))])
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json")["fc"].outliers == (1, 4)

    @pytest.mark.parametrize(
        "change",
        [
            {"op_type": "Conv", "shape": (4, 3, 3, 3)},
            {"activations": "none"},
            {"shape": (2, 32, 5)},
            {"outliers": (4, 1)},
            {"outliers": (1, 1)},
            {"outliers": (-1,)},
            {"outliers": (32,)},
            {"outliers": tuple(range(32))},
            {"offset": True},
        ],
    )
    def test_contradictions(self, change):
        with pytest.raises(ValueError, match="outliers"):
            NodePlan(**{**GOOD, "outliers": (1,), **change})


class TestChoose:
    # `far` is large in two channels whatever x is; 64 of them, as at most a sixteenth are taken.
    MODEL = """g (float[4,64] x) => (float[4,5] y, float[4,5] z) {
        scaled = Mul (x, gain)
        [far] y = MatMul (scaled, w)
        [near] z = MatMul (x, v)
    }"""

    def choose(self, **options):
        gain = np.ones(64, np.float32)
        gain[[7, 30]] = 40
        constants = {"gain": gain, "w": weights(64, OUT), "v": weights(64, OUT, seed=1)}
        proto = model(self.MODEL, constants)
        source = load(proto)
        plan = SelectNodes(activations="dynamic", bits=8, terms=1)(source)

        def observe(names):
            for seed in range(3):
                x = np.sign(weights(4, 64, seed=seed))  # all other columns reach equally far
                yield with_outputs(proto, list(names), {"x": x}) | {"x": x}

        return ChooseOutliers(observe, **options)(source, plan)

    def test_where_the_input_has_some(self):
        plan = self.choose()
        assert plan["far"].outliers == (7, 30)
        assert plan["near"].outliers == ()

    def test_not_more_than_allowed(self):
        assert len(self.choose(most=1)["far"].outliers) <= 1
