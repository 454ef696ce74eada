"""What a candidate makes of an entry, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest
from budgeting import classifier, planned
from small import model, weights

from onnxq.candidates import (
    EFFICIENT,
    INTEGER,
    LEFT_IN_FLOAT,
    TERM_OVERHEAD,
    Unit,
    applicable,
    bits,
    integer,
    products,
    reading,
    stored_bytes,
    units,
    with_columns,
)
from onnxq.passes.search_scales import match_plan
from onnxq.plan import NodePlan, Plan

WIDE = "g (float[N,64] x) => (float[N,16] y) { [fc] y = MatMul (x, w) }"


def test_stored_bytes_hold_the_numbers() -> None:
    loaded, plan = planned(classifier())
    entry, (_, weight) = next(site for site in match_plan(loaded, plan) if site[0].name == "fc1")
    apply = {c.name: c.apply(entry, weight) for c in EFFICIENT}
    size, out = 256 * 64, 64
    expected = {
        "4x1": size // 2 + 4 * out,
        "4x1/64": size // 2 + 2 * out * 4,  # float16
        "4x1/16": size // 2 + 2 * out * 16,
        "8x1": size + 4 * out,
        "4x3": 3 * (size // 2 + 4 * out),
        "8x2": 2 * (size + 4 * out),
    }
    for name, numbers in expected.items():
        made = apply[name]
        assert made is not None
        assert stored_bytes(made, weight) == numbers + made.terms * TERM_OVERHEAD
    assert apply["float"] is not None and stored_bytes(apply["float"], weight) == 4 * size


def test_products() -> None:
    loaded, plan = planned(classifier(), activations="dynamic", terms=2, layout="parallel")
    entry, (_, weight) = next(site for site in match_plan(loaded, plan) if site[0].name == "fc1")
    size = 256 * 64
    assert products(entry, weight) == 2 * size
    assert products(entry.model_copy(update={"activation_terms": 2}), weight) == 3 * size
    every = entry.model_copy(update={"activation_terms": 2, "products": "all"})
    assert products(every, weight) == 4 * size
    assert products(entry.model_copy(update={"activations": "none"}), weight) == 8 * size
    merged = entry.model_copy(update={"activations": "none", "layout": "merged"})
    assert products(merged, weight) == 4 * size


def wide(columns: tuple[int, ...] = (3, 9), **options: object) -> Unit:
    """A MatMul with outlier columns."""
    loaded, plan = planned(
        model(WIDE, {"w": weights(64, 16)}), **{"activations": "dynamic", **options}
    )
    (entry,) = plan.nodes
    if columns:
        entry = NodePlan(**{**entry.model_dump(), "outliers": columns})
    return units(loaded, Plan(nodes=[entry]))[0]


def test_a_candidate_says_how_the_activation_is_read() -> None:
    unit = wide()
    made = {
        one.name: unit.apply(one)
        for one in (bits(8), reading(bits(8), 7, 2), with_columns(bits(4), 8))
    }
    assert list(made) == ["8x1", "8x1·7x2", "4x1+columns"]
    found = {
        name: (e.bits, e.terms, e.activation_bits, e.activation_terms, e.outliers)
        for name, entries in made.items()
        for e in entries or ()
    }
    assert found == {
        "8x1": (8, 1, 8, 1, ()),
        "8x1·7x2": (8, 1, 7, 2, ()),
        "4x1+columns": (4, 1, 8, 1, (3, 9)),
    }


def test_what_the_user_said_of_activations_stays() -> None:
    unit = wide(activation_bits=6, activation_terms=3)
    (entry,) = unit.apply(bits(8)) or ()
    assert (entry.activation_bits, entry.activation_terms) == (6, 3)


@pytest.mark.parametrize("activations", ["none", "static"])
def test_only_dynamic_compute_has_more_of_the_activation(activations: str) -> None:
    unit, every = wide((), activations=activations), integer(columns=8, terms=True)
    found = [every[i].name for i, _ in applicable(unit, every)]
    assert found == [INTEGER[i].name for i, _ in applicable(unit, INTEGER)]
    assert "8x1" in found


def test_columns_are_for_nodes_that_have_some() -> None:
    assert wide(()).apply(with_columns(bits(8), 8)) is None
    assert wide(()).apply(bits(8)) is not None


def test_the_candidates_of_integer_compute() -> None:
    assert integer() == INTEGER
    assert not any(one.reads for one in INTEGER)
    every = integer(columns=8, terms=True, narrow=True)
    assert len({one.name for one in every}) == len(every)
    assert every[-1] is LEFT_IN_FLOAT
    assert {one.columns for one in every} == {0, 8}
    assert bits(7, terms=2) in every and bits(7, terms=2) not in integer(columns=8, terms=True)


def test_columns_are_products_in_float() -> None:
    loaded, plan = planned(model(WIDE, {"w": weights(64, 16)}), activations="dynamic", bits=8)
    entry, (_, weight) = match_plan(loaded, plan)[0]
    with_ = entry.model_copy(update={"outliers": (1, 2, 3)})
    assert products(with_, weight) == 64 * 16 + 4 * 3 * 16
    assert np.isclose(stored_bytes(with_, weight), stored_bytes(entry, weight))
