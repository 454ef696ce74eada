"""The table of what candidates cost and how much error they make, against running the model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from budgeting import classifier, drawn, images, planned, shared
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from small import model, run, weights

from onnxq.candidates import EFFICIENT, LEFT_IN_FLOAT, bits, integer, reading, with_columns
from onnxq.feeds import Feed
from onnxq.kernels_ref.activation_series import activation_series, residual_step
from onnxq.kernels_ref.term import Term
from onnxq.model import Model, load, raise_opset, to_proto
from onnxq.passes import Expand, required_opset
from onnxq.passes.probe import open_weights
from onnxq.plan import Plan
from onnxq.probing import Probe
from onnxq.sensitivity import estimate, measure
from onnxq.trial import Trial

Array = npt.NDArray[Any]


def expanded(proto: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    made = raise_opset(load(proto), required_opset(plan))
    Expand(plan)(made)
    return to_proto(made)


def energy(proto: onnx.ModelProto, plan: Plan, feeds: list[dict[str, np.ndarray]]) -> float:
    """Of the expanded model's error, relative to the output's."""
    other = expanded(proto, plan)
    pairs = [(run(proto, feed)[0], run(other, feed)[0]) for feed in feeds]
    exact, found = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return float(np.sum((found - exact) ** 2) / np.sum(exact**2))


def rounding(proto: onnx.ModelProto, feeds: list[Feed]) -> float:
    """Error of float32 in a model's first output, relative to it, found in float64."""
    double = onnx.ModelProto()
    double.CopyFrom(proto)
    for i, tensor in enumerate(double.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            double.graph.initializer[i].CopyFrom(numpy_helper.from_array(array, tensor.name))
    exact = ReferenceEvaluator(double)
    pairs = []
    for feed in feeds:
        (y,) = exact.run(None, {name: x.astype(np.float64) for name, x in feed.items()})
        assert y.dtype == np.float64
        pairs.append((y, run(proto, feed)[0]))
    y, found = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(found - y) / np.linalg.norm(y))


def assert_same_error(one: float, other: float, noise: float) -> None:
    """Two energies of one error, each found from two runs that float32 rounds by `noise`.

    Each run may be off by twice as much as the one that told the noise.
    """
    assert abs(np.sqrt(one) - np.sqrt(other)) <= 4 * 2 * noise
    assert np.sqrt(other) > 100 * noise  # so that this says something


def test_each_entry_is_the_error_of_that_node_alone() -> None:
    loaded, plan = planned(classifier())
    canonical = to_proto(loaded)
    feeds = images(4)
    noise = rounding(canonical, feeds)
    # of what is below LINEAR the first is measured, too
    candidates = (bits(3), bits(8), LEFT_IN_FLOAT)
    table = measure(loaded, plan, candidates, feeds)
    for unit in range(len(table.units)):
        for option in (0, 1):
            chosen = [2] * len(table.units)
            chosen[unit] = option
            found = energy(canonical, table.plan(plan, chosen), feeds)
            assert_same_error(table.error[unit, option], found, noise)
    assert not np.any(np.where(np.isfinite(table.error), table.activation_error, 0))


WIDE, IN, OUT = "g (float[N,4,64] x) => (float[N,4,512] y) { [fc] y = MatMul (x, w) }", 64, 512


def wide(**options: Any) -> tuple[Model, Plan, Array, list[Feed]]:
    """One MatMul whose output has far more numbers than its input: (model, plan, W, feeds)."""
    w = weights(IN, OUT, seed=1)
    return *planned(model(WIDE, {"w": w}), **options), w, drawn(8, 4, IN)


def spread(gram: Array, steps: Array) -> float:
    """Standard deviation of Σ_o uᵀGu s_o², relative to its mean, u uniform on ±1/2 in every place.

    var(uᵀGu) = 2 tr(G²)/144 - Σ G_ii²/120, without its second part; the mean is tr(G)/12.
    """
    one = 2 * np.sum(gram**2) / np.trace(gram) ** 2
    return float(np.sqrt(one * np.sum(steps**4) / np.sum(steps**2) ** 2))


def rows(feeds: list[Feed]) -> Array:
    return np.concatenate([feed["x"].reshape(-1, IN) for feed in feeds]).astype(np.float64)


def test_finer_candidates_are_scaled_from_coarser_ones() -> None:
    """The error of y = XW is Σ_o δ_oᵀXᵀX δ_o: of both candidates a draw of the same noise."""
    loaded, plan, w, feeds = wide()
    table = measure(loaded, plan, [bits(8), bits(8, terms=2), LEFT_IN_FLOAT], feeds)
    found = energy(to_proto(loaded), table.plan(plan, [1]), feeds)
    x = rows(feeds)
    deviation = spread(x.T @ x, np.abs(w).max(0))
    assert deviation < 0.05
    assert table.error[0, 1] / found == pytest.approx(1, abs=5 * np.sqrt(2) * deviation)


def test_of_activations_and_weights_the_energies_are_added() -> None:
    """Each is what it is alone; both together, but for what chance has them in common."""
    loaded, plan, w, feeds = wide(activations="dynamic", layout="parallel")
    canonical = to_proto(loaded)
    table = measure(loaded, plan, [bits(8), LEFT_IN_FLOAT], feeds)
    scale = table.scales[0, 0][0].astype(np.float64)
    of_weight = np.rint(w / scale) * scale - w
    of_rows = rows(read(feeds, 8, 1)) - rows(feeds)
    y = rows(feeds) @ w
    one, other = rows(feeds) @ of_weight, of_rows @ w
    signal, noise = np.sum(y**2), rounding(canonical, feeds)
    assert_same_error(table.weight_error[0, 0], np.sum(one**2) / signal, noise)
    assert_same_error(table.activation_error[0, 0], np.sum(other**2) / signal, noise)
    assert table.error[0, 0] == table.weight_error[0, 0] + table.activation_error[0, 0]
    found = energy(canonical, table.plan(plan, [0]), feeds)
    # 2⟨XδW, δXW⟩ for a δW that is uniform, and δXδW, which is to XδW as δX to X
    common = np.sqrt(np.sum((rows(feeds).T @ other) ** 2 * scale**2 / 12))
    both = np.linalg.norm(of_rows) / np.linalg.norm(rows(feeds)) * np.sum(one**2)
    slack = (5 * 2 * common + 2 * both) / signal + 4 * noise * np.sqrt(found)
    assert slack < found / 10
    assert found == pytest.approx(table.error[0, 0], abs=slack)


def test_further_terms_of_activations_are_scaled_from_the_first() -> None:
    """The error of a row is δWWᵀδᵀ: as above, with as many draws as rows."""
    loaded, plan, w, feeds = wide(activations="dynamic", layout="parallel")
    two = reading(bits(8), 7, 2)
    scaled = measure(loaded, plan, [bits(8), two], feeds)
    alone = measure(loaded, plan, [two], feeds)
    steps = np.array([np.ptp(feed["x"]) for feed in feeds for _ in range(4)])
    deviation = spread(w.astype(np.float64) @ w.T, steps)
    assert deviation < 0.05
    ratio = scaled.activation_error[0, 1] / alone.activation_error[0, 0]
    assert ratio == pytest.approx(1, abs=5 * np.sqrt(2) * deviation)


def test_products_that_are_left_out_are_errors_of_the_activation() -> None:
    """Of two by two terms the product of both second ones: what one term leaves of each."""
    loaded, plan, w, feeds = wide(activations="dynamic", layout="parallel")
    options = [bits(8), reading(bits(8, terms=2), 8, 2)]
    table = measure(loaded, plan, options, feeds)
    every = Plan(nodes=[node.model_copy(update={"products": "all"}) for node in plan.nodes])
    one, both = np.asarray(table.activation_error)[0]
    rest = np.asarray(measure(loaded, every, options, feeds).activation_error)[0, 1]
    assert rest == pytest.approx(one * residual_step(8) ** 2, rel=1e-6)
    # digits: the first of two has the scale of the second 256 times
    scale = table.scales[0, 1][0].astype(np.float64)
    of_weight = np.rint(w / scale) * scale - w
    of_rows = rows(read(feeds, 8, 1)) - rows(feeds)
    expected = np.sum((of_rows @ of_weight) ** 2) / np.sum((rows(feeds) @ w) ** 2)
    steps = np.array([np.ptp(feed["x"]) for feed in feeds for _ in range(4)])
    deviation = np.hypot(*(spread(v.astype(np.float64) @ v.T, steps) for v in (w, of_weight)))
    assert (both - rest) / expected == pytest.approx(1, abs=5 * deviation)


def read(feeds: list[Feed], number: int, terms: int) -> list[Feed]:
    """What a node reads that is the first of its model."""
    series = [activation_series(feed["x"], number, terms) for feed in feeds]
    return [{"x": sum_of(one)} for one in series]


def sum_of(series: tuple[Term, ...]) -> Array:
    return np.sum([term.dequantize() for term in series], axis=0, dtype=np.float64)


def test_what_few_columns_hold_shows_in_the_error() -> None:
    """Two of 64 columns reach 30 times as far."""
    loaded, plan, w, feeds = wide(activations="dynamic", layout="parallel")
    for feed in feeds:
        feed["x"][..., [5, 40]] *= 30
    options = [bits(8), with_columns(bits(8), 4), LEFT_IN_FLOAT]
    table = measure(loaded, plan, options, feeds)
    assert table.entries[0, 1][0].outliers == (5, 40)
    assert [entry.outliers for entry in table.plan(plan, [0]).nodes] == [()]
    made = table.plan(plan, [1])
    assert [entry.outliers for entry in made.nodes] == [(5, 40)]
    assert not plan.nodes[0].outliers  # the given plan is as it was
    assert table.weight_error[0, 1] == pytest.approx(table.weight_error[0, 0], rel=1e-12)
    # the error of all columns goes with the square of the range, that of two is gone
    rest = np.delete(np.arange(IN), [5, 40])
    gram = w.astype(np.float64) @ w.T
    left, whole = (
        np.array([np.ptp(f["x"][..., columns]) for f in feeds for _ in range(4)])
        for columns in (rest, slice(None))
    )
    expected = np.sum(left**2) * np.trace(gram[rest][:, rest]) / np.sum(whole**2) / np.trace(gram)
    deviation = np.hypot(spread(gram[rest][:, rest], left), spread(gram, whole))
    ratio = table.activation_error[0, 1] / table.activation_error[0, 0]
    assert ratio / expected == pytest.approx(1, abs=5 * deviation)
    # both errors together, whatever they have in common
    canonical = to_proto(loaded)
    found, slack = np.sqrt(energy(canonical, made, feeds)), 8 * rounding(canonical, feeds)
    one, other = np.sqrt([table.weight_error[0, 1], table.activation_error[0, 1]])
    assert abs(one - other) - slack <= found <= one + other + slack
    plain = [{"x": weights(1, 4, IN, seed=i)} for i in range(8)]
    assert not np.isfinite(measure(loaded, plan, options, plain).error[0, 1])


def test_each_weight_and_each_activation_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    for name in ("weight_error", "activation_error"):
        whole = getattr(Probe, name)
        monkeypatch.setattr(
            Probe, name, lambda self, *a, n=name, f=whole: runs.append(n) or f(self, *a)
        )
    loaded, plan, _, feeds = wide(activations="dynamic", layout="parallel")
    for feed in feeds:
        feed["x"][..., [5, 40]] *= 30
    table = measure(loaded, plan, integer(columns=4, terms=True), feeds)
    assert np.isfinite(table.error).all()
    # 3 to 7 bits; with and without columns: the rest is scaled or another one's
    assert runs == ["weight_error"] * 5 + ["activation_error"] * 2


def test_static_compute_is_that_of_weights() -> None:
    """Their ranges are not known yet."""
    loaded, plan = planned(classifier(), activations="static")
    static = measure(loaded, plan, [bits(8)], images(2))
    none = measure(*planned(classifier()), [bits(8)], images(2))
    np.testing.assert_array_equal(static.error, none.error)


def test_depthwise_nodes_stay_in_float_compute() -> None:
    proto = model(
        """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
            [depth] a = Conv <group = 8, pads = [1,1,1,1]> (x, v)
            [point] y = Conv (a, w)
        }""",
        {"v": weights(8, 1, 3, 3, seed=1), "w": weights(8, 8, 1, 1, seed=2)},
    )
    loaded, plan = planned(proto, activations="dynamic", layout="parallel")
    options = integer(columns=8, terms=True)
    table = measure(loaded, plan, options, drawn(2, 8, 6, 6))
    there = dict(zip([u.name for u in table.units], np.isfinite(table.error), strict=True))
    names = [one.name for one in options]
    assert [n for n, kept in zip(names, there["depth"], strict=True) if kept] == [
        *(f"{number}x1" for number in range(3, 9)),
        "8x2",
        "float",
    ]
    assert not np.any(np.asarray(table.activation_error)[0, there["depth"]])
    assert np.isfinite(table.error[1, names.index("8x1·7x2")])


def test_another_error_of_weights_leaves_that_of_activations() -> None:
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    table = measure(loaded, plan, [bits(8, block_size=64), bits(8), LEFT_IN_FLOAT], images(2))
    half = table.with_weight_error(table.weight_error / 2)
    np.testing.assert_allclose(half.weight_error, table.weight_error / 2, rtol=1e-9, atol=1e-20)
    np.testing.assert_array_equal(half.activation_error, table.activation_error)
    assert np.isinf(half.error[:, 0]).all() and not half.error[:, 2].any()
    assert (half.error[:, 1] < table.error[:, 1]).all()
    estimated = estimate(loaded, plan, [bits(8)])
    np.testing.assert_array_equal(estimated.weight_error, estimated.error)


def test_errors_fall_with_bits_and_float_has_none() -> None:
    loaded, plan = planned(classifier())
    options = [bits(4), bits(6), bits(8), LEFT_IN_FLOAT]
    for table in (measure(loaded, plan, options, images(4)), estimate(loaded, plan, options)):
        for row in table.error:
            assert all(one > other for one, other in pairwise(row))
            assert row[-1] == 0


def test_the_estimate_is_the_energy_of_the_weights_error() -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(4)])
    for unit, what in enumerate(table.units):
        made = table.plan(plan, [0] * len(table.units))
        scale = made.scales[what.name][0][:, None]
        w = what.weight.matrix()
        noise = np.clip(np.round(w / scale), -7, 7) * scale - w
        # float32 rounds products of up to 7 steps once, and so does the table: each by 7 u steps of
        # a noise of 1/√12 steps, so that the energy is within 2 · 2 · 7 √12 u of itself
        expected = float(np.sum(noise.astype(np.float64) ** 2) / np.sum(w.astype(np.float64) ** 2))
        assert table.error[unit, 0] == pytest.approx(expected, rel=28 * np.sqrt(12) * 2.0**-24)


def test_the_estimate_knows_nothing_of_activations() -> None:
    loaded, plan = planned(classifier(), activations="dynamic", layout="parallel")
    table = estimate(loaded, plan, integer(columns=8, terms=True))
    assert table.candidates == integer()
    assert not np.any(table.activation_error)


def test_the_model_and_the_plan_are_left_as_they_were() -> None:
    loaded, plan = planned(classifier())
    before = to_proto(loaded).SerializeToString(), plan.model_dump()
    measure(loaded, plan, EFFICIENT, images(1))
    assert (to_proto(loaded).SerializeToString(), plan.model_dump()) == before
    assert not plan.scales


def test_nodes_that_share_a_weight_are_one_unit() -> None:
    loaded, plan = planned(shared())
    table = measure(loaded, plan, EFFICIENT, drawn(3, 32))
    assert [[e.name for e in unit.entries] for unit in table.units] == [["m1", "m2"], ["m3"]]
    three, eight = EFFICIENT.index(bits(3)), EFFICIENT.index(bits(8))
    made = table.plan(plan, [eight, three])
    assert [node.bits for node in made.nodes] == [8, 8, 3]
    # stored once
    assert table.bytes[0, three] == table.bytes[1, three]
    feeds = drawn(3, 32)
    found = energy(
        to_proto(loaded), table.plan(plan, [three, EFFICIENT.index(LEFT_IN_FLOAT)]), feeds
    )
    assert_same_error(table.error[0, three], found, rounding(to_proto(loaded), feeds))


def test_weights_in_bodies_are_inputs_too() -> None:
    proto = model(
        """g (bool c, float[2,8] x) => (float[2,8] y) {
            y = If (c) <
                then_branch = t () => (float[2,8] a) { [inner] a = MatMul (x, w) },
                else_branch = e () => (float[2,8] b) { b = Identity (x) }
            >
        }""",
        {"w": weights(8, 8)},
    )
    loaded, plan = planned(proto)
    feed = {"c": np.array(True), "x": weights(2, 8, seed=3)}
    opened = open_weights(loaded, plan)
    assert list(opened.inputs) == ["inner"]
    assert not opened.proto.graph.initializer
    doubled = {opened.inputs["inner"]: 2 * weights(8, 8)}
    np.testing.assert_allclose(
        run(opened.proto, {**feed, **doubled})[0], 2 * run(proto, feed)[0], rtol=1e-5
    )
    table = measure(loaded, plan, [bits(4), LEFT_IN_FLOAT], [feed])
    assert table.error[0, 0] > 0


def test_what_a_node_cannot_have_is_not_there() -> None:
    loaded, plan = planned(classifier())
    table = estimate(loaded, plan, [bits(4, block_size=64), bits(4), LEFT_IN_FLOAT])
    names = [unit.name for unit in table.units]
    # rows of 27, 72, 256 and 64 inputs
    there = dict(zip(names, np.isfinite(table.error[:, 0]), strict=True))
    assert there == {"conv1": False, "conv2": True, "fc1": True, "fc2": False}
    dynamic = planned(classifier(), activations="dynamic")
    assert not np.isfinite(estimate(*dynamic, [bits(4, block_size=32)]).error).any()


def test_an_output_that_is_not_finite_rules_a_candidate_out() -> None:
    """4 bits make a weight of 0.01 zero, whose reciprocal is no number."""
    proto = model(
        """g (float[N,4] x) => (float[N,4] y) {
            [m] a = MatMul (x, w)
            y = Reciprocal (a)
        }""",
        {"w": np.array([[1.0] * 4, [0.01] * 4] * 2, np.float32)},
    )
    loaded, plan = planned(proto)
    feed = {"x": np.array([[0, 1, 0, 1]], np.float32)}
    table = measure(loaded, plan, [bits(4), bits(8)], [feed])
    assert np.isinf(table.error[0, 0]) and np.isfinite(table.error[0, 1])


@pytest.mark.parametrize("option", range(len(EFFICIENT)), ids=lambda i: EFFICIENT[i].name)
def test_bytes_are_those_of_the_file(option: int) -> None:
    """Summed over all nodes, once the table knows what names and nodes take."""
    loaded, plan = planned(classifier())
    with Trial(loaded, ()) as trial:
        table = trial.exact_bytes(estimate(loaded, plan, EFFICIENT), plan)
        exact = len(EFFICIENT) - 1
        chosen = [option if np.isfinite(row[option]) else exact for row in table.bytes]
        weights_taken = sum(4 * unit.weight.size for unit in table.units)
        rest = trial.float_bytes - weights_taken
        size = trial.size(table.plan(plan, chosen))
    assert rest + sum(table.bytes[range(4), chosen]) == pytest.approx(size, abs=1e-3)
