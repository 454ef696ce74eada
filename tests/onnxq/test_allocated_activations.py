"""Allocation says how a node reads its activation, where that is what a tolerance needs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from budgeting import planned
from small import model, weights

import onnxq
from onnxq.allocate import Goal, Infeasible, allocate
from onnxq.candidates import INTEGER, Candidate, integer
from onnxq.feeds import Feed
from onnxq.sensitivity import Table
from onnxq.tolerance import Tolerance
from onnxq.trial import Trial

COLUMNS = (7, 30)


def uneven() -> onnx.ModelProto:
    """far reads x, of which two columns reach 50 times as far as the others; near reads a Tanh.

    The weights have next to nothing in these columns, so that the others are what counts.
    """
    quiet = weights(64, 64, seed=1, scale=0.1)
    quiet[list(COLUMNS)] *= 0.02
    return model(
        """g (float[N,64] x) => (float[N,64] y) {
            [far] a = MatMul (x, v)
            t = Tanh (a)
            [near] y = MatMul (t, w)
        }""",
        {"v": quiet, "w": weights(64, 64, seed=2, scale=0.1)},
    )


def samples(count: int, seed: int = 5) -> list[Feed]:
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((count, 8, 64)).astype(np.float32)
    made[..., list(COLUMNS)] *= 50
    return [{"x": one} for one in made]


def quantized(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    return tuple(one for one in candidates if one.quantized)


def latency(table: Table) -> np.ndarray:
    """What a product takes, a third of it for columns, and a half for a second activation term."""
    costs = {"columns": 1 / 3, "7x2": 1.5, "8x2": 1.5}
    made = table.products.copy()
    for option, candidate in enumerate(table.candidates):
        _, _, reads = candidate.name.replace("+", "·").partition("·")
        there = np.isfinite(made[:, option])
        made[there, option] = 64 * 64 * (1 + costs.get(reads, 0))
    return np.where(np.isfinite(made), made / (2 * 64 * 64), np.inf)


def test_columns_where_weights_alone_do_not_reach_it() -> None:
    """Activations of one 8-bit term leave far several percent, whatever its weight."""
    loaded, plan = planned(uneven(), activations="dynamic", layout="parallel")
    goal, feeds = Goal(Tolerance.parse("error=2%")), samples(12)
    with pytest.raises(Infeasible, match="error=2% cannot be kept"):
        allocate(loaded, plan, feeds, goal, candidates=quantized(INTEGER))
    found = allocate(loaded, plan, feeds, goal, candidates=quantized(integer(columns=4)))
    outliers = {node.name: node.outliers for node in found.plan.nodes}
    assert outliers["far"] == COLUMNS and outliers["near"] == ()
    with Trial(loaded, samples(40, seed=6)) as trial:
        unseen = trial(found.plan)[0]
    # what is kept at one standard error above the mean, four more on others
    assert found.measured is not None
    loss = goal.tolerance.loss  # type: ignore[union-attr]
    assert loss(unseen).value <= 0.02**2 + 4 * loss(found.measured).spread


def test_terms_where_one_of_eight_bits_does_not_reach_it() -> None:
    loaded, plan = planned(uneven(), activations="dynamic", layout="parallel")
    goal, feeds = Goal(Tolerance.parse("error=0.3%"), minimize="latency"), samples(12)
    with pytest.raises(Infeasible):
        allocate(
            loaded,
            plan,
            feeds,
            goal,
            candidates=quantized(integer(columns=4)),
            latency=latency,
        )
    every = quantized(integer(columns=4, terms=True))
    found = allocate(loaded, plan, feeds, goal, candidates=every, latency=latency)
    assert all(node.activation_terms == 2 for node in found.plan.nodes)
    assert found.measured is not None and goal.tolerance is not None
    assert goal.tolerance.met(found.measured, deviations=1)


def test_the_cheaper_way_where_both_reach_it() -> None:
    """near needs neither: its activation has no columns that reach far."""
    loaded, plan = planned(uneven(), activations="dynamic", layout="parallel")
    goal, feeds = Goal(Tolerance.parse("error=2%"), minimize="latency"), samples(12)
    every = quantized(integer(columns=4, terms=True))
    found = allocate(loaded, plan, feeds, goal, candidates=every, latency=latency)
    reads = {n.name: (n.activation_terms, n.outliers) for n in found.plan.nodes}
    assert reads == {"far": (1, COLUMNS), "near": (1, ())}
    without = quantized(integer(terms=True))
    found = allocate(loaded, plan, feeds, goal, candidates=without, latency=latency)
    assert {n.name: n.activation_terms for n in found.plan.nodes} == {"far": 2, "near": 1}


@pytest.mark.parametrize(("text", "columns"), [("error=50%", ()), ("error=7%", COLUMNS)])
def test_quantize_keeps_what_allocation_decided(text: str, columns: tuple[int, ...]) -> None:
    """No columns are taken out afterwards: the tolerance is kept without."""
    rows = np.concatenate([feed["x"] for feed in samples(8)])
    settings = {"activations": "dynamic", "effort": "fast", "calibration": {"x": rows}}
    made = onnxq.quantize(uneven(), tolerance=text, **settings)
    assert {n.name: n.outliers for n in made.plan.nodes} == {"far": columns, "near": ()}
    none = onnxq.quantize(uneven(), tolerance="error=10%", outliers=0, **settings)
    assert not any(node.outliers for node in none.plan.nodes)
