"""Latencies of nodes add up to those of whole models, on a clock that runs with the operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from budgeting import classifier, drawn, images, planned, shared
from small import model, weights

from onnxq.allocate import Goal, Infeasible, allocate
from onnxq.candidates import (
    EFFICIENT,
    LEFT_IN_FLOAT,
    Candidate,
    bits,
    reading,
    with_columns,
)
from onnxq.errors import CalibrationError, ConfigError
from onnxq.excerpts import Excerpts, signature
from onnxq.feeds import Feed
from onnxq.latencies import Latencies, MeasureLatencies, node_latencies, parse_latency
from onnxq.model import Model, to_proto
from onnxq.plan import Plan
from onnxq.sensitivity import Table, estimate, measure
from onnxq.session import open_session, run
from onnxq.stopwatch import Runner, Timer
from onnxq.tolerance import Tolerance
from onnxq.trial import Trial

CALL = 0.25  # seconds that every call of a session takes
COSTS = {
    "Conv": 8.0,
    "ConvInteger": 3.0,
    "MatMul": 4.0,
    "MatMulInteger": 1.0,
    "DynamicQuantizeLinear": 1.0,
    "QuantizeLinear": 0.5,
    "DequantizeLinear": 0.5,
    "Relu": 0.5,
    "AveragePool": 2.5,
    "LSTM": 6.0,
}
DYNAMIC = (bits(4), bits(8), bits(4, terms=3), LEFT_IN_FLOAT)


def cost(written: bytes) -> float:
    """Seconds of a model, what its operators cost in sum."""
    nodes = onnx.ModelProto.FromString(written).graph.node
    return sum(COSTS.get(node.op_type, 0.0) for node in nodes)


@dataclass
class Clock:
    """Goes on by what a model costs when it runs, and counts how often each cost was met."""

    now: float = 0.0
    runs: Counter[float] = field(default_factory=Counter)

    def __call__(self) -> float:
        return self.now

    def run(self, runner: Runner) -> None:
        seconds = cost(runner._session._model_bytes)
        self.runs[seconds] += 1
        self.now += CALL + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(Runner, "__call__", lambda runner: made.run(runner))  # noqa: PLW0108 (a method)
    yield made


def found_for(loaded: Model, table: Table, feed: Feed, clock: Clock, rounds: int = 3) -> Latencies:
    return node_latencies(loaded, table, feed, threads=1, rounds=rounds, clock=clock)


def column(table: Table, candidate: Candidate) -> int:
    return [c.name for c in table.candidates].index(candidate.name)


def test_float_nodes_and_the_rest_are_the_whole(clock: Clock) -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, EFFICIENT)
    found = found_for(loaded, table, images(1)[0], clock)
    # two Conv + Relu, MatMul + Relu, MatMul, and AveragePool beside them
    whole = 2 * 8.5 + 4.5 + 4 + 2.5
    exact = found.nodes[:, column(table, LEFT_IN_FLOAT)]
    np.testing.assert_allclose(exact, np.array([8.5, 8.5, 4.5, 4.0]) / whole)
    assert found.rest == pytest.approx(2.5 / whole)
    assert found.float_seconds == pytest.approx(whole)
    assert found.table()[:, -1].sum() == pytest.approx(1.0)
    assert found.notes == ()


def test_nodes_add_up_to_whole_models(clock: Clock) -> None:
    """No two nodes read the same tensor, so nothing is counted twice."""
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    table = estimate(loaded, plan, DYNAMIC)
    latencies = found_for(loaded, table, images(1)[0], clock).table()
    rng = np.random.default_rng(3)
    with Trial(loaded, ()) as trial:
        exact = cost(to_proto(loaded).SerializeToString())
        for _ in range(6):
            chosen = rng.integers(0, len(DYNAMIC), len(table.units))
            written = trial.write(table.plan(plan, chosen.tolist()))
            assert isinstance(written, bytes)
            said = latencies[np.arange(len(chosen)), chosen].sum()
            assert said == pytest.approx(cost(written) / exact)


def test_candidates_that_a_node_cannot_have_are_inf(clock: Clock) -> None:
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    table = estimate(loaded, plan, EFFICIENT)
    found = found_for(loaded, table, images(1)[0], clock)
    np.testing.assert_array_equal(np.isfinite(found.nodes), np.isfinite(table.bytes))


def test_what_onnxruntime_makes_the_same_of_is_not_timed(clock: Clock) -> None:
    """In float compute the weights are float ones when the model is loaded."""
    loaded, plan = planned(classifier())
    options = (bits(4), bits(8), bits(8, terms=2), LEFT_IN_FLOAT)
    table = estimate(loaded, plan, options)
    found = found_for(loaded, table, images(1)[0], clock)
    np.testing.assert_array_equal(found.nodes, np.repeat(found.nodes[:, -1:], 4, axis=1))


def test_equal_nodes_are_timed_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    times = Timer.times
    monkeypatch.setattr(
        Timer, "times", lambda self, runs, s: timed.append(len(runs)) or times(self, runs, s)
    )
    loaded, plan = planned(
        model(
            """g (float[1,4,6,6] x) => (float[1,4,6,6] y) {
                [a] p = Conv <pads = [1,1,1,1]> (x, w1)
                [b] q = Conv <pads = [1,1,1,1]> (p, w2)
                [c] y = Conv <pads = [1,1,1,1]> (q, w3)
            }""",
            {f"w{i}": weights(4, 4, 3, 3, seed=i) for i in (1, 2, 3)},
        ),
        activations="dynamic",
        layout="parallel",
    )
    table = estimate(loaded, plan, [bits(8), LEFT_IN_FLOAT])
    found = found_for(loaded, table, drawn(1, 4, 6, 6)[0], clock)
    assert timed == [3, 2]  # whole, nothing and node; node and candidate
    np.testing.assert_allclose(found.nodes[0], found.nodes[2])


def test_which_columns_are_outliers_makes_no_difference(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes with four columns each, other ones: the float node and two candidates are timed."""
    timed: list[int] = []
    times = Timer.times
    monkeypatch.setattr(
        Timer, "times", lambda self, runs, s: timed.append(len(runs)) or times(self, runs, s)
    )
    loaded, plan = planned(
        model(
            """g (float[1,64] x) => (float[1,64] y) {
                [a] p = MatMul (x, v)
                [b] y = MatMul (p, w)
            }""",
            {name: weights(64, 64, seed=i) for i, name in enumerate("vw")},
        ),
        activations="dynamic",
        layout="parallel",
    )
    columns = {"a": (1, 2, 3, 4), "b": (5, 8, 13, 21)}
    nodes = [node.model_copy(update={"outliers": columns[node.name]}) for node in plan.nodes]
    options = [bits(8), with_columns(bits(8), 4), reading(bits(8), 7, 2), LEFT_IN_FLOAT]
    # nothing is looked for where the plan says what outliers are
    table = measure(loaded, Plan(nodes=nodes), options, drawn(1, 64))
    assert table.entries[1, 1][0].outliers == columns["b"] and not table.entries[1, 0][0].outliers
    found = found_for(loaded, table, drawn(1, 64)[0], clock)
    assert timed == [3, 2, 2, 2]  # whole, nothing and node; node and candidate
    np.testing.assert_array_equal(found.nodes[0], found.nodes[1])
    # one product more, in float; two in integers, with QuantizeLinear, DequantizeLinear, and again
    np.testing.assert_allclose(found.nodes[0] * 8, [2.0, 2.0 + 4.0, 2 * 1.0 + 3 * 0.5, 4.0])


def test_a_node_is_lowered_as_it_is_in_the_whole_model() -> None:
    """conv2 reads what a Relu wrote: its range needs no minimum. conv1 reads anything."""
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    table = estimate(loaded, plan, [bits(4)])
    with Trial(loaded, ()) as trial:
        exact = Excerpts(trial.write(Plan(nodes=[])))
        made = Excerpts(trial.write(table.plan(plan, [0] * len(table.units))))
    values = {
        "x": np.zeros((1, 3, 8, 8), np.float32),
        "ra": np.zeros((1, 16, 8, 8), np.float32),
    }
    for name, minimum in (("conv1", True), ("conv2", False)):
        place = exact.place(name)
        assert place is not None and len(place.inputs) == 1
        cut = made.cut(place, values)
        assert cut is not None
        ops = [node.op_type for node in cut.graph.node]
        assert ("ReduceMin" in ops) == minimum
        assert ops.count("ConvInteger") == 1 and ops[-1] == "Relu"
        run(open_session(cut.SerializeToString()), {place.inputs[0]: values[place.inputs[0]]})


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("[m] a = MatMul (x, w) b = Add (a, v) y = Relu (b)", "y"),
        ("[m] a = MatMul (x, w) b = Add (x, a) y = Relu (b)", "a"),  # no bias
        ("[m] a = MatMul (x, w) b = Relu (a) y = Add (a, b)", "a"),  # read twice
        ("[m] a = MatMul (x, w) y = Softmax (a)", "a"),
        ("[m] y = MatMul (x, w) b = Relu (y)", "y"),  # an output
    ],
)
def test_where_a_node_ends(text: str, end: str) -> None:
    proto = model(
        f"g (float[2,8] x) => (float[2,8] y) {{ {text} }}", {"w": weights(8, 8), "v": weights(8)}
    )
    place = Excerpts(proto.SerializeToString()).place("m")
    assert place is not None and place.outputs == (end,) and place.inputs == ("x",)


def test_signatures_differ_in_all_but_numbers() -> None:
    def made(step: int = 1, size: int = 6, seed: int = 0, name: str = "a") -> object:
        text = f"""g (float[1,4,{size},{size}] x) => (float[1,4,{size},{size}] y) {{
            [{name}] {name} = Conv <pads = {[step] * 4}, dilations = {[step] * 2}> (x, w)
            y = Relu ({name})
        }}"""
        return signature(model(text, {"w": weights(4, 4, 3, 3, seed=seed)}))

    assert made() == made(seed=5) == made(name="other")
    assert len({made(), made(step=2), made(size=7)}) == 3


def test_nodes_that_share_a_weight_are_timed_together(clock: Clock) -> None:
    loaded, plan = planned(shared())
    found = found_for(loaded, estimate(loaded, plan, [LEFT_IN_FLOAT]), drawn(1, 32)[0], clock)
    np.testing.assert_allclose(found.nodes[:, 0], np.array([9.0, 4.0]) / 13)


def test_nodes_in_bodies_are_estimated(clock: Clock) -> None:
    proto = model(
        """g (bool c, float[2,8] x) => (float[2,8] y) {
            [outer] z = MatMul (x, w)
            y = If (c) <
                then_branch = t () => (float[2,8] a) { [inner] a = MatMul (z, v) },
                else_branch = e () => (float[2,8] b) { b = Identity (z) }
            >
        }""",
        {"w": weights(8, 8, seed=1), "v": weights(8, 8, seed=2)},
    )
    loaded, plan = planned(proto)
    table = estimate(loaded, plan, [bits(4), LEFT_IN_FLOAT])
    found = found_for(loaded, table, {"c": np.array(True), "x": weights(2, 8)}, clock)
    # on this clock the body costs nothing: with as many products as the outer one, the sum is
    # twice the whole, and is made shorter
    np.testing.assert_allclose(found.nodes, 0.5)
    assert found.rest == 0
    assert found.notes == ("latency estimated from products, not measured: inner",)


def test_both_weights_of_a_recurrent_node_share_its_time(clock: Clock) -> None:
    proto = model(
        """g (float[5,1,8] x) => (float[5,1,1,6] y) {
            [rnn] y = LSTM <hidden_size = 6> (x, w, r)
        }""",
        {"w": weights(1, 24, 8, seed=1), "r": weights(1, 24, 6, seed=2)},
    )
    loaded, plan = planned(proto)
    table = estimate(loaded, plan, [bits(8), LEFT_IN_FLOAT])
    found = found_for(loaded, table, {"x": weights(5, 1, 8)}, clock)
    np.testing.assert_allclose(found.nodes, 0.5)


def test_really_timed() -> None:
    """On the real clock: nothing is stated of the times but that there are some."""
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    table = estimate(loaded, plan, DYNAMIC)
    before = to_proto(loaded).SerializeToString()
    steps: list[tuple[str, int, int]] = []
    found = node_latencies(
        loaded, table, images(1)[0], threads=1, rounds=3, progress=lambda *a: steps.append(a)
    )
    assert np.isfinite(found.nodes).all() and (found.nodes >= 0).all()
    assert found.table()[:, -1].sum() == pytest.approx(1.0)
    assert to_proto(loaded).SerializeToString() == before
    assert steps[0] == ("latency", 0, 5) and steps[-1] == ("latency", 5, 5)


def test_a_sample_that_does_not_fit() -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(8), LEFT_IN_FLOAT])
    with pytest.raises(CalibrationError, match="latencies: the float model fails"):
        node_latencies(loaded, table, {"x": np.zeros((1, 5, 8, 8), np.float32)}, rounds=3)


def test_static_activations_are_refused() -> None:
    loaded, plan = planned(classifier(), activations="static")
    with pytest.raises(ConfigError, match="static"):
        node_latencies(loaded, estimate(loaded, plan, [bits(8)]), images(1)[0])


@pytest.mark.parametrize(("text", "ratio"), [("0.5x", 0.5), (" .75 X", 0.75), ("1x", 1.0)])
def test_bounds(text: str, ratio: float) -> None:
    assert parse_latency(text) == ratio


@pytest.mark.parametrize("text", ["", "x", "0.5", "5ms", "0x", "-1x", "nanx", "1e-3x"])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-latency .*0\.5x") as caught:
        parse_latency(text)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ in the search


def measuring(loaded: Model, clock: Clock) -> MeasureLatencies:
    return MeasureLatencies(loaded, images(1)[0], threads=1, rounds=3, clock=clock)


def test_the_least_error_within_a_latency(clock: Clock) -> None:
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    latency = measuring(loaded, clock)
    errors = []
    for most in (0.75, 0.95):
        found = allocate(
            loaded,
            plan,
            images(12),
            Goal(max_latency=most, minimize="error"),
            candidates=DYNAMIC,
            latency=latency,
            timed=latency.whole,
        )
        assert found.latency is not None and found.latency <= most
        with Trial(loaded, ()) as trial:
            written = trial.write(found.plan)
        assert isinstance(written, bytes)
        exact = cost(to_proto(loaded).SerializeToString())
        # here the calls of the sessions are in both
        assert found.latency == pytest.approx((cost(written) + CALL) / (exact + CALL))
        assert found.measured is not None
        errors.append(found.measured.energy.value)
    assert errors[1] < errors[0]


def test_a_latency_out_of_reach(clock: Clock) -> None:
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    goal = Goal(max_latency=0.1, minimize="error")
    with pytest.raises(Infeasible, match=r"latency 0\.1x cannot be kept; .*latency 0\.571x"):
        allocate(
            loaded, plan, images(12), goal, candidates=DYNAMIC, latency=measuring(loaded, clock)
        )


@pytest.mark.parametrize("minimize", ["size", "error"])
def test_a_latency_and_a_tolerance_that_exclude_each_other(minimize: str) -> None:
    """8x2 keeps the tolerance, but at 3 a node."""
    loaded, plan = planned(classifier())
    goal = Goal(Tolerance.parse("error=0.1%"), max_latency=8, minimize=minimize)  # type: ignore[arg-type]
    with pytest.raises(Infeasible, match=r"error=0\.1% cannot be kept"):
        allocate(
            loaded,
            plan,
            images(12),
            goal,
            candidates=[bits(8), bits(8, terms=2)],
            latency=lambda table: np.tile([1.0, 3.0], (len(table.units), 1)),
        )


def test_of_equally_fast_plans_the_smallest() -> None:
    """Not the float model, which is as fast, and more exact."""
    loaded, plan = planned(classifier())
    found = allocate(
        loaded,
        plan,
        images(12),
        Goal(Tolerance.parse("error=10%"), minimize="latency"),
        latency=lambda table: np.where(np.isfinite(table.bytes), 0.25, np.inf),
    )
    smallest = allocate(loaded, plan, images(12), Goal(Tolerance.parse("error=10%")))
    assert found.latency == 1.0
    assert found.size == smallest.size


def test_where_nothing_is_faster_than_the_float_model() -> None:
    loaded, plan = planned(classifier())
    with pytest.raises(Infeasible, match="nothing that keeps error=10% is faster"):
        allocate(
            loaded,
            plan,
            images(12),
            Goal(Tolerance.parse("error=10%"), minimize="latency"),
            candidates=[bits(8), LEFT_IN_FLOAT],
            latency=lambda table: np.tile([0.5, 0.25], (len(table.units), 1)),
        )


def test_what_whole_models_take_beyond_the_sum_is_made_up_for() -> None:
    loaded, plan = planned(classifier())
    seen: list[float] = []

    def latency(table: Table) -> np.ndarray:
        return np.tile([1.0, 3.0], (len(table.units), 1)) / 10

    def timed(_: Trial, made: Plan) -> float:
        """0.15 more than the sum."""
        seen.append(sum(0.3 if node.terms == 2 else 0.1 for node in made.nodes) + 0.15)
        return seen[-1]

    found = allocate(
        loaded,
        plan,
        images(12),
        Goal(max_latency=0.8, minimize="error"),
        candidates=[bits(8), bits(8, terms=2)],
        latency=latency,
        timed=timed,
    )
    assert seen == pytest.approx([0.95, 0.75])
    assert found.latency == pytest.approx(0.75)
    with pytest.raises(Infeasible, match=r"latency 0\.5x cannot be kept; the closest is 0\.55x"):
        allocate(
            loaded,
            plan,
            images(12),
            Goal(max_latency=0.5, minimize="error"),
            candidates=[bits(8), bits(8, terms=2)],
            latency=latency,
            timed=timed,
        )
