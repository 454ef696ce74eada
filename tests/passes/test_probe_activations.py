"""A switched node reads what dynamic compute would multiply; all others read what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from budgeting import classifier, images, planned
from expanding import expand, gamma
from small import model, run, weights

from onnxq.kernels_ref.activation_series import activation_series
from onnxq.kernels_ref.outliers import split_columns
from onnxq.passes.probe import OpenModel, open_weights
from onnxq.passes.probe_activations import (
    NO_UNIT,
    ActivationMode,
    Modes,
    SwitchedModel,
    SwitchedUnit,
    activation_mode,
    switch_activations,
)
from onnxq.plan import NodePlan, Plan

Feed = dict[str, np.ndarray]

LINEAR = "g (float[3,32] x) => (float[3,5] y) { [fc] y = MatMul (x, w) }"
CONV = """g (float[1,4,6,6] x) => (float[1,5,6,6] y) {
    [fc] y = Conv <pads = [1,1,1,1]> (x, w)
}"""
MODES = tuple(ActivationMode(bits, terms) for bits, terms in ((8, 1), (7, 2), (8, 2), (3, 3)))


def opened(proto: onnx.ModelProto) -> tuple[OpenModel, Feed]:
    """The model with open weights, and those weights to feed."""
    made = open_weights(*planned(proto, activations="dynamic"))
    return made, {
        made.inputs[name]: weight.from_matrix(weight.matrix()).reshape(weight.shape)
        for name, weight in made.weights.items()
    }


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made


def switched(
    proto: onnx.ModelProto, units: Sequence[tuple[Sequence[str], Sequence[Modes]]]
) -> tuple[SwitchedModel, Feed]:
    made, exact = opened(proto)
    named = [SwitchedUnit(tuple(nodes), tuple(modes)) for nodes, modes in units]
    return switch_activations(made.proto, named), exact


def outputs(made: SwitchedModel, feed: Mapping[str, Any], unit: int, mode: int = 0) -> np.ndarray:
    onnx.checker.check_model(made.proto, full_check=True)
    switches = {made.unit: np.array(unit, np.int64), made.mode: np.array(mode, np.int64)}
    return run(made.proto, {**feed, **switches})[0]


def summed(x: np.ndarray, mode: ActivationMode, *, nonnegative: bool = False) -> np.ndarray:
    """What a node reads, by the reference."""
    others, parts = x, []
    if mode.columns:
        others, _ = split_columns(x, np.array(mode.columns))
        parts.append(x - others)
    parts += [
        term.dequantize()
        for term in activation_series(others, mode.bits, mode.terms, nonnegative=nonnegative)
    ]
    return np.sum(parts, axis=0, dtype=np.float32)


@pytest.mark.parametrize("text", [LINEAR, CONV])
def test_a_node_reads_the_series_bit_for_bit(text: str) -> None:
    shapes = ((32, 5), (3, 32)) if text is LINEAR else ((5, 4, 3, 3), (1, 4, 6, 6))
    proto, x = model(text, {"w": weights(*shapes[0])}), weights(*shapes[1], seed=1)
    modes = [*MODES, ActivationMode(8, 1, (3, 7)), ActivationMode(7, 2, (0,))]
    modes = modes if text is LINEAR else modes[:-2]
    made, exact = switched(proto, [(["fc"], [(mode,) for mode in modes])])
    float_, _ = opened(proto)
    for index, mode in enumerate(modes):
        expected = run(float_.proto, {**exact, "x": summed(x, mode)})[0]
        np.testing.assert_array_equal(outputs(made, {**exact, "x": x}, 0, index), expected)


def test_what_is_not_switched_reads_what_it_did() -> None:
    made, exact = switched(classifier(), [([n], [(MODES[0],)]) for n in ("conv1", "fc1")])
    float_, _ = opened(classifier())
    feed = {**exact, **images(1)[0]}
    (expected,) = run(float_.proto, feed)
    np.testing.assert_array_equal(outputs(made, feed, NO_UNIT), expected)
    found = [outputs(made, feed, unit) for unit in (0, 1)]
    assert not np.array_equal(found[0], expected) and not np.array_equal(found[0], found[1])


def test_what_cannot_be_negative_has_all_levels_above_zero() -> None:
    """As in dynamic compute: the range of fewer than 8 bits needs no minimum after a Relu."""
    text = "g (float[3,32] x) => (float[3,5] y) { r = Relu (x) [fc] y = MatMul (r, w) }"
    proto, x = model(text, {"w": weights(32, 5)}), np.abs(weights(3, 32, seed=1)) + 1
    mode = ActivationMode(4, 1)
    made, exact = switched(proto, [(["fc"], [(mode,)])])
    float_, _ = opened(proto)
    wanted = {**exact, "x": summed(x, mode, nonnegative=True)}
    np.testing.assert_array_equal(outputs(made, {**exact, "x": x}, 0), run(float_.proto, wanted)[0])


@pytest.mark.parametrize("change", [(8, 1, ()), (7, 2, ()), (8, 1, (2, 9)), (7, 2, (2, 9))])
@pytest.mark.parametrize("target", ["cpu-avx2", "cpu-vnni", "cpu-arm"])
def test_it_is_what_the_lowered_node_multiplies(change: Any, target: str) -> None:
    """The expanded model, whose weights are read in the probe: equal up to float32 rounding.

    Weights of 7 bits, since this machine may saturate other targets' products of 8.
    """
    bits, terms, columns = change
    proto, x = model(LINEAR, {"w": weights(32, 5)}), weights(3, 32, seed=1)
    x[:, [2, 9]] *= 30
    update = {"activation_bits": bits, "activation_terms": terms, "outliers": columns}
    _, plan = planned(proto, activations="dynamic", bits=7, target=target, layout="parallel")
    plan = Plan(nodes=[NodePlan(**{**node.model_dump(), **update}) for node in plan.nodes])
    after, plan = expand(proto, plan)
    mode = activation_mode(plan.nodes[0])
    assert mode == ActivationMode(bits, terms, columns)
    made, exact = switched(proto, [(["fc"], [(mode,)])])
    (name,) = exact
    scale = plan.scales["fc"][0]
    exact[name] = (np.rint(exact[name] / scale) * scale).astype(np.float32)
    expected = run(after, {"x": x})[0]
    # Of both: a sum of 32 products, two roundings of each factor, and the sums of terms; and the
    # first scale may differ by an ulp of what divides by 255, its levels by 255 of those.
    magnitude = np.abs(x) @ np.abs(exact[name])
    slack = 2 * gamma(32 + 8) * magnitude + gamma(2) * np.ptp(x) * np.abs(exact[name]).sum(0)
    assert (np.abs(outputs(made, {**exact, "x": x}, 0) - expected) <= slack).all()


def test_nodes_of_a_unit_are_switched_together_each_as_it_says() -> None:
    text = """g (float[3,32] x) => (float[3,32] y, float[3,32] z) {
        [a] y = MatMul (x, w)
        [b] z = MatMul (x, w)
    }"""
    proto, x = model(text, {"w": weights(32, 32)}), weights(3, 32, seed=1)
    one, other = ActivationMode(4, 1), ActivationMode(4, 1, (5,))
    made, exact = switched(proto, [(["a", "b"], [(one, other), (None, one)])])
    float_, _ = opened(proto)
    feed = {**exact, "x": x}
    wanted = {
        mode: run(float_.proto, {**exact, "x": x if mode is None else summed(x, mode)})[0]
        for mode in (one, other, None)
    }
    for index, modes in enumerate([(one, other), (None, one)]):
        switches = {made.unit: np.array(0), made.mode: np.array(index)}
        for found, mode in zip(run(made.proto, {**feed, **switches}), modes, strict=True):
            np.testing.assert_array_equal(found, wanted[mode])


def test_nodes_in_bodies_and_of_old_opsets() -> None:
    """DequantizeLinear is of opset 10; the body reads the activation of the graph around it."""
    proto = model(
        """g (bool c, float[2,8] x) => (float[2,8] y) {
            y = If (c) <
                then_branch = t () => (float[2,8] a) { [inner] a = MatMul (x, w) },
                else_branch = e () => (float[2,8] b) { b = Identity (x) }
            >
        }""",
        {"w": weights(8, 8)},
        opset=9,
        ir=4,
    )
    mode, x = ActivationMode(8, 2), weights(2, 8, seed=3)
    made, exact = switched(proto, [(["inner"], [(mode,)])])
    float_, _ = opened(proto)
    for there in (True, False):
        feed = {**exact, "c": np.array(there)}
        read = summed(x, mode) if there else x
        np.testing.assert_array_equal(
            outputs(made, {**feed, "x": x}, 0), run(float_.proto, {**feed, "x": read})[0]
        )


def test_only_dynamic_compute_reads_a_series() -> None:
    entry = NodePlan(name="fc", op_type="MatMul", activations="dynamic", activation_terms=3)
    assert activation_mode(entry) == ActivationMode(8, 3)
    # one product: that of the first terms
    assert activation_mode(entry.model_copy(update={"products": 1})) == ActivationMode(8, 1)
    for update in ({"reason": "excluded"}, {"activations": "none"}, {"activations": "static"}):
        assert activation_mode(entry.model_copy(update=update)) is None


def test_the_step_is_what_a_series_leaves() -> None:
    x = weights(1000, seed=4)
    for mode in MODES:
        left = np.abs(x - summed(x, mode)).max()
        # half a step, and what float32 adds: less than a hundredth of a step of 16 bits
        assert 0.4 < left / (mode.step * np.ptp(x)) < 0.51
