"""`--activations auto`: what other options make of it, what a CPU does, and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import small

import onnxq
from onnxq.candidates import EFFICIENT, INTEGER, applicable, bits, integer, units
from onnxq.compute import asked_activations
from onnxq.errors import ConfigError
from onnxq.mixed import mixed
from onnxq.model import load
from onnxq.options import DEFAULT_TOLERANCE, DEFAULT_TOLERANCE_DYNAMIC, Options
from onnxq.plan import Target

TARGETS: tuple[Target, ...] = ("cpu-avx2", "cpu-vnni", "cpu-arm")


def with_a_stem() -> onnx.ModelProto:
    """x [N, 3, 16, 16] -> a Conv that makes 16 places of 64 numbers, and two MatMul by large ones.

    Also a depthwise Conv and a ConvTranspose, beside.
    """
    return small.model(
        """g (float[N,3,16,16] x) => (float[N,16,64] y, float[N,3,32,32] z) {
            [stem] a = Conv <strides = [4,4], kernel_shape = [4,4]> (x, ws)
            flat = Reshape (a, shape)
            rows = Transpose <perm = [0,2,1]> (flat)
            [up] b = MatMul (rows, wu)
            r = Relu (b)
            [down] y = MatMul (r, wd)
            [deep] d = Conv <group = 3, pads = [1,1,1,1]> (x, w1)
            [wider] z = ConvTranspose <strides = [2,2]> (d, w2)
        }""",
        {
            "ws": small.weights(64, 3, 4, 4, seed=1, scale=0.2),
            "shape": np.array([0, 64, 16]),
            "wu": small.weights(64, 1200, seed=2, scale=0.1),
            "wd": small.weights(1200, 64, seed=3, scale=0.1),
            "w1": small.weights(3, 1, 3, 3, seed=4),
            "w2": small.weights(3, 3, 2, 2, seed=5),
        },
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "auto"),
        ({"weight_bits": 4, "terms": 2}, "auto"),
        ({"tolerance": "error=1%", "offset": "off", "outliers": 0}, "auto"),
        ({"max_latency": "1.1x"}, "auto"),
        ({"layout": "merged", "terms": 2}, "auto"),
        ({"block_size": 32}, "none"),
        ({"matmul": "nbits"}, "none"),
        ({"offset": "on", "terms": 1}, "none"),
        ({"points": "auto"}, "none"),
        ({"points": "auto", "max_latency": "0.8x"}, "none"),
        ({"points": "15%"}, "auto"),
        ({"layout": "merged", "terms": 3}, "none"),
        ({"layout": "merged", "series": "joint"}, "none"),
        ({"activation_terms": 2}, "dynamic"),
        ({"activation_bits": 7}, "dynamic"),
        ({"products": "all"}, "dynamic"),
        ({"outliers": 4}, "dynamic"),
        ({"max_latency": "0.8x"}, "dynamic"),
        ({"tolerance": "error=1%", "minimize": "latency"}, "dynamic"),
        ({"matmul": "folded", "max_latency": "0.8x"}, "none"),
        ({"ranges": "mse"}, "static"),
        ({"ranges": "mse", "activation_terms": 2}, "static"),
        ({"activations": "none", "outliers": 4}, "none"),
        ({"activations": "dynamic", "matmul": "folded"}, "dynamic"),
        ({"activations": "static", "outliers": 4}, "static"),
    ],
)
def test_other_options_say_what_is_meant(options: dict[str, Any], expected: str) -> None:
    assert asked_activations(Options.checked(**options)) == expected


def test_two_options_that_need_different_compute() -> None:
    with pytest.raises(ConfigError) as refused:
        Options.checked(ranges="mse", outliers=3, activation_terms=2)
    assert str(refused.value) == (
        "--ranges mse needs --activations static, but --outliers 3 needs --activations dynamic: "
        "leave one out"
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{}, {"terms": 2}, {"weight_bits": 3, "layout": "merged"}])
def test_the_plan_is_that_of_dynamic_where_integers_are_fast(
    target: Target, options: dict[str, Any]
) -> None:
    plans = [
        Options.checked(target=target, activations=kind, **options).select()(load(with_a_stem()))
        for kind in ("auto", "dynamic")
    ]
    assert (plans[0] == plans[1]) == (target != "cpu-avx2")


def test_what_is_computed_how_without_vnni() -> None:
    plan = Options.checked(target="cpu-avx2", terms=2).select()(load(with_a_stem()))
    found = {e.name: (e.activations, e.layout, e.offset) for e in plan.nodes}
    floats = ("none", "merged", True)
    integers = ("dynamic", "parallel", False)
    assert found == {
        "stem": floats,
        "up": integers,
        "down": integers,
        "deep": floats,
        "wider": floats,
    }


def test_an_explicit_layout_holds_for_all() -> None:
    plan = Options.checked(target="cpu-avx2", terms=2, layout="parallel").select()(
        load(with_a_stem())
    )
    assert {entry.layout for entry in plan.nodes} == {"parallel"}


@pytest.mark.parametrize(
    ("proto", "target", "expected"),
    [
        (small.conv_model(), "cpu-avx2", DEFAULT_TOLERANCE),
        (small.conv_model(), "cpu-vnni", DEFAULT_TOLERANCE_DYNAMIC),
        (with_a_stem(), "cpu-avx2", DEFAULT_TOLERANCE_DYNAMIC),
    ],
)
def test_the_default_tolerance_is_that_of_the_compute(
    proto: onnx.ModelProto, target: Target, expected: str
) -> None:
    options = Options.checked(target=target)
    assert options.tolerance_for(options.select()(load(proto))) == expected


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_an_explicit_choice_has_its_tolerance(activations: str) -> None:
    options = Options.checked(activations=activations, target="cpu-avx2")
    expected = DEFAULT_TOLERANCE if activations == "none" else DEFAULT_TOLERANCE_DYNAMIC
    for proto in (small.conv_model(), with_a_stem()):
        assert options.tolerance_for(options.select()(load(proto))) == expected


def test_candidates_are_those_of_a_node_s_own_compute() -> None:
    loaded = load(with_a_stem())
    plan = Options.checked(target="cpu-avx2").select()(loaded)
    for wide in (INTEGER, integer(columns=8, terms=True, narrow=True)):
        both = mixed(EFFICIENT, wide)
        assert not both[-1].quantized
        for unit in units(loaded, plan):
            own = EFFICIENT if unit.entries[0].activations == "none" else wide
            found = {both[i].name for i, _ in applicable(unit, both)}
            assert found == {own[i].name for i, _ in applicable(unit, own)}, unit.name
    (down,) = (unit for unit in units(loaded, plan) if unit.name == "down")
    three = next(one for one in mixed(EFFICIENT, INTEGER) if one.name == "4x3")
    assert down.apply(three) is None and down.apply(bits(4, terms=3)) is not None


@pytest.mark.parametrize(
    ("options", "bound"), [({}, 0.05), ({"tolerance": "error=3%", "effort": "fast"}, 0.03)]
)
def test_a_mixed_model_keeps_its_tolerance(options: dict[str, Any], bound: float) -> None:
    x = np.random.default_rng(3).standard_normal((48, 3, 16, 16)).astype(np.float32)
    result = onnxq.quantize(
        with_a_stem(),
        target="cpu-avx2",
        calibration={"x": x[:24]} if options else None,
        data={"x": x[24:]},
        **options,
    )
    kinds = {e.name: e.activations for e in result.plan.quantized}
    assert kinds["stem"] == "none" and kinds["down"] == "dynamic"
    assert result.report.comparison is not None
    for output in result.report.comparison.outputs:
        assert output.relative_error < 1.5 * bound  # other samples: half as much again
    assert "cpu-avx2 integer convolutions" in result.report.notes["stem"]


def test_blocks_are_allowed_without_naming_the_compute() -> None:
    result = onnxq.quantize(with_a_stem(), block_size=32, terms=1, weight_bits=4)
    assert {e.activations for e in result.plan.quantized} == {"none"}
    assert result.plan["down"].block_size == 32
