"""The centre tap as a term of its own, where it pays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from expanding import expand
from small import model, run, weights

from onnxq.model import load
from onnxq.passes import SearchScales, SelectNodes
from onnxq.passes.choose_centre import ChooseCentre
from onnxq.plan import Plan


def net(centre: float) -> onnx.ModelProto:
    """`folded` has a centre tap so many times as large as the rest; the others have none."""
    w = weights(8, 4, 3, 3)
    w[:, :, 1, 1] *= centre
    return model(
        """g (float[1,4,10,10] x) => (float[1,6,8,8] y) {
            [folded] a = Conv <pads = [1,1,1,1]> (x, w)
            [usual] b = Conv (a, v)
            [point] y = Conv (b, u)
        }""",
        {"w": w, "v": weights(5, 8, 3, 3, seed=1), "u": weights(6, 5, 1, 1, seed=2)},
    )


def planned(proto: onnx.ModelProto, **options: object) -> Plan:
    settings = {"activations": "none", "layout": "merged", "terms": 1, "bits": 4, **options}
    return SelectNodes(**settings)(load(proto))


def chosen(plan: Plan) -> list[str]:
    return [entry.name for entry in plan.quantized if entry.centre]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("bits", "terms"), [(3, 1), (4, 1), (8, 1), (4, 2)])
def test_only_a_large_centre_gets_a_term(bits, terms, offset):
    options = {"bits": bits, "terms": terms, "offset": offset}
    large, usual = net(20.0), net(1.0)
    plan = planned(large, **options)
    found = ChooseCentre()(load(large), plan)
    assert chosen(found) == ["folded"]
    assert found["folded"].terms == terms + 1
    assert not found["folded"].offset
    assert found["usual"] == plan["usual"]
    assert chosen(plan) == [], "the given plan was changed"
    assert chosen(ChooseCentre()(load(usual), planned(usual, **options))) == []


def test_it_lowers_the_error_of_the_output():
    proto = net(20.0)
    x = {"x": weights(1, 4, 10, 10, seed=5)}
    (wanted,) = run(proto, x)

    def error(plan: Plan) -> float:
        (found,) = run(expand(proto, plan)[0], x)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    plan = planned(proto, include=("folded",))
    assert error(ChooseCentre()(load(proto), plan)) < error(plan) / 2


def test_always_takes_every_kernel_of_odd_size():
    proto = net(1.0)
    assert chosen(ChooseCentre(always=True)(load(proto), planned(proto))) == ["folded", "usual"]


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4},
        {"activations": "static", "bits": 8, "layout": "merged"},
        {"activations": "dynamic", "layout": "merged", "terms": 2},
    ],
)
def test_where_a_plan_cannot_have_one_it_stays(options):
    proto = net(20.0)
    plan = planned(proto, **options)
    assert ChooseCentre(always=True)(load(proto), plan) == plan


def test_numbers_that_are_there_are_kept():
    proto = net(20.0)
    plan = SearchScales()(load(proto), planned(proto))
    assert chosen(ChooseCentre()(load(proto), plan)) == []


def test_dynamic_integer_compute_can_have_one():
    proto = net(20.0)
    plan = planned(proto, activations="dynamic", layout="parallel")
    found = ChooseCentre()(load(proto), plan)
    assert chosen(found) == ["folded"]
    after, _ = expand(proto, found)
    (y,) = run(after, {"x": weights(1, 4, 10, 10, seed=5)})
    assert np.isfinite(y).all()
