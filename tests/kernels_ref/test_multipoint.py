"""Rows with different numbers of terms, and how many each gets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxq.kernels_ref import InputMoments, PerAxis, PerBlock, PerTensor, expand
from onnxq.kernels_ref.multipoint import (
    channel_errors,
    greedy_scales,
    most_gained,
    point_errors,
    points_for_budget,
    points_for_tolerance,
)
from onnxq.kernels_ref.partial import WHOLE, Coverage, partial_scales, realize_partial

SETTINGS = settings(deadline=None, max_examples=60)
KINDS = ("fixed_ratio", "digit", "joint")
RNG = np.random.default_rng(0)
W = (RNG.standard_normal((8, 36)) * RNG.geometric(0.4, (8, 36))).astype(np.float32)
SETS = st.lists(st.integers(1, 3), min_size=8, max_size=8).map(lambda p: np.array(p, np.int8))


PER_ROW = PerAxis(0)


def made(kind, coverage, granularity=PER_ROW, *, bits=4, terms=3, w=W):
    offset, scales = partial_scales(
        kind, w, coverage, bits=bits, terms=terms, granularity=granularity
    )
    return realize_partial(kind, w, scales, coverage, offset, bits=bits, granularity=granularity)


class TestParts:
    @SETTINGS
    @given(points=SETS, kind=st.sampled_from(KINDS), blocks=st.booleans())
    def test_each_row_is_as_if_it_were_alone(self, points, kind, blocks):
        granularity = PerBlock(1, 16) if blocks else PerAxis(0)
        found = made(kind, Coverage(points), granularity)
        for row, count in enumerate(points):
            own = W[row : row + 1]
            alone = expand(kind, own, bits=4, terms=int(count), granularity=granularity)
            for i in range(3):
                q = found.terms[i].q[row : row + 1]
                want = alone.terms[i].q if i < count else np.zeros_like(q)
                np.testing.assert_array_equal(q, want)
                if i < count:
                    scale = found.terms[i].scale[row : row + 1]
                    np.testing.assert_array_equal(scale, alone.terms[i].scale)

    @SETTINGS
    @given(points=SETS)
    def test_every_row_is_covered_by_its_terms(self, points):
        terms = made("joint", Coverage(points)).terms
        for i, term in enumerate(terms):
            rows = np.arange(8) if term.rows is None else term.rows
            assert rows.tolist() == np.flatnonzero(points > i).tolist()

    @SETTINGS
    @given(points=SETS, row=st.integers(0, 7), kind=st.sampled_from(("digit", "joint")))
    def test_a_point_more_never_makes_the_error_larger(self, points, row, kind):
        more = points.copy()
        more[row] = min(more[row] + 1, 3)
        before = channel_errors(W, made(kind, Coverage(points)).dequantize())
        after = channel_errors(W, made(kind, Coverage(more)).dequantize())
        assert after[row] <= before[row]
        others = np.arange(8) != row
        np.testing.assert_array_equal(after[others], before[others])

    def test_scales_go_on_where_there_are_no_terms(self):
        """The digits of all rows can be summed as integers of the last scale."""
        points = np.array([1, 2, 3, 1, 2, 3, 1, 1], np.int8)
        terms = made("digit", Coverage(points)).terms
        for coarse, fine in itertools.pairwise(terms):
            np.testing.assert_array_equal(coarse.scale, 16 * fine.scale)

    def test_the_same_points_for_all_are_a_plain_series(self):
        found = made("joint", Coverage(np.full(8, 3, np.int8)))
        plain = expand("joint", W, bits=4, terms=3, granularity=PerAxis(0))
        np.testing.assert_array_equal(found.dequantize(), plain.dequantize())
        assert [term.rows for term in found.terms] == [None] * 3

    @pytest.mark.parametrize("kind", KINDS)
    def test_centre(self, kind):
        columns = np.arange(4, 36, 9)
        w = np.random.default_rng(1).standard_normal((8, 36)).astype(np.float32)
        w[:, columns] *= 20
        found = made(kind, Coverage(centre=columns), terms=2, w=w)
        outside = np.setdiff1d(np.arange(36), columns)
        assert not found.terms[0].q[:, outside].any()
        plain = expand(kind, w, bits=4, terms=1, granularity=PerAxis(0))
        assert (
            channel_errors(w, found.dequantize()) < channel_errors(w, plain.dequantize()) / 4
        ).all()

    def test_offset_and_points(self):
        points = np.array([1, 2, 1, 1, 2, 1, 2, 1], np.int8)
        found = made("digit", Coverage(points, offset=True), terms=2, bits=2)
        alone = [
            made("digit", Coverage(offset=True), terms=int(p), bits=2, w=W[r : r + 1])
            for r, p in enumerate(points)
        ]
        want = np.concatenate([one.dequantize() for one in alone])
        np.testing.assert_array_equal(found.dequantize(), want)
        # the same sums in another order
        want = W - found.dequantize()
        np.testing.assert_allclose(found.residual(W), want, rtol=0, atol=1e-5 * np.abs(W).max())

    @pytest.mark.parametrize(
        ("coverage", "granularity", "message"),
        [
            (Coverage(np.ones(7, np.int8)), PerAxis(0), r"give integers \[8\]"),
            (Coverage(np.ones(8)), PerAxis(0), r"give integers \[8\]"),
            (Coverage(np.zeros(8, int)), PerAxis(0), "1 to 3 terms"),
            (Coverage(np.full(8, 4)), PerAxis(0), "1 to 3 terms"),
            (Coverage(np.ones(8, int)), PerTensor(), "a scale per row"),
            (Coverage(offset=True), PerBlock(1, 16), "one scale per row"),
            (Coverage(centre=np.arange(4), offset=True), PerAxis(0), "combined"),
        ],
    )
    def test_refuses(self, coverage, granularity, message):
        with pytest.raises(ValueError, match=message):
            made("digit", coverage, granularity)

    def test_an_offset_goes_with_digits(self):
        with pytest.raises(ValueError, match="digits"):
            made("joint", Coverage(offset=True))


class TestErrors:
    def test_against_outputs(self):
        """On samples, the squared output error as a share of the squared output."""
        x = RNG.standard_normal((500, 36)) * np.linspace(0.1, 2, 36)
        moments = InputMoments(1, 36)
        moments.add(x, x)
        rounded = expand("joint", W, bits=3, terms=1, granularity=PerAxis(0)).dequantize()
        want = np.square(x @ (W - rounded).T.astype(float)).sum(0) / np.square(x @ W.T).sum(0)
        np.testing.assert_allclose(channel_errors(W, rounded, moments.hessian), want, rtol=1e-5)

    def test_groups(self):
        x = RNG.standard_normal((2, 300, 36))
        moments = InputMoments(2, 36)
        moments.add(x, x)
        rounded = expand("joint", W, bits=3, terms=1, granularity=PerAxis(0)).dequantize()
        for group in range(2):
            rows = slice(4 * group, 4 * group + 4)
            one = channel_errors(W[rows], rounded[rows], moments.hessian[group])
            np.testing.assert_allclose(
                channel_errors(W, rounded, moments.hessian)[rows], one, rtol=1e-9
            )

    def test_dead_and_broken_channels(self):
        w = np.array([[0, 0], [0, 0], [1, 0]], np.float32)
        other = np.array([[0, 0], [1, 0], [1, 0]], np.float32)
        assert channel_errors(w, other).tolist() == [0, np.inf, 0]
        assert channel_errors(w, other, np.full((2, 2), np.nan)).tolist() == [0, np.inf, 0]

    def test_falls_with_every_term(self):
        errors = point_errors("joint", W, WHOLE, bits=3, terms=4, granularity=PerAxis(0))
        assert errors.shape == (8, 4)
        assert (np.diff(errors, axis=1) <= 0).all()

    def test_greedy_is_worse_than_joint(self):
        kinds = {}
        for bits in (2, 3, 4):
            scales = greedy_scales(W, bits=bits, terms=2, granularity=PerAxis(0))
            greedy = realize_partial("joint", W, scales, WHOLE, bits=bits, granularity=PerAxis(0))
            joint = expand("joint", W, bits=bits, terms=2, granularity=PerAxis(0))
            kinds[bits] = [
                channel_errors(W, found.dequantize()).mean() for found in (greedy, joint)
            ]
        assert all(joint < greedy for greedy, joint in kinds.values())


ERRORS = arrays(np.float64, st.tuples(st.integers(1, 6), st.just(3)), elements=st.floats(0, 1)).map(
    lambda e: -np.sort(-e, axis=1)
)


class TestTolerance:
    @SETTINGS
    @given(errors=ERRORS, tolerance=st.floats(0, 1))
    def test_the_fewest_that_are_enough(self, errors, tolerance):
        points = points_for_tolerance(errors, tolerance)
        reached = errors[np.arange(len(errors)), points - 1]
        assert (reached <= np.maximum(tolerance, errors[:, -1])).all()
        fewer = points > 1
        before = errors[np.arange(len(errors)), np.maximum(points - 2, 0)]
        assert (before[fewer] > np.maximum(tolerance, errors[:, -1])[fewer]).all()

    def test_refuses(self):
        with pytest.raises(ValueError, match="tolerance"):
            points_for_tolerance(np.ones((2, 2)), -1)
        with pytest.raises(ValueError, match="shape"):
            points_for_tolerance(np.ones(2), 1)


class TestBudget:
    @SETTINGS
    @given(errors=st.lists(ERRORS, min_size=1, max_size=3), budget=st.floats(0, 40))
    def test_is_kept_and_used(self, errors, budget):
        costs = [1.0, 2.5, 4.0][: len(errors)]
        points = points_for_budget(errors, costs, budget)
        spent = sum(c * float((p - 1).sum()) for c, p in zip(costs, points, strict=True))
        assert spent <= budget
        for e, p, cost in zip(errors, points, costs, strict=True):
            for row, n in zip(e, p, strict=True):
                # what would help does not fit any more
                steps = [m - n for m in range(n + 1, 4) if row[m - 1] < row[n - 1]]
                assert not steps or min(steps) * cost > budget - spent - 1e-9

    def test_the_largest_fall_per_cost_comes_first(self):
        dear, cheap = np.array([[1.0, 0.1]]), np.array([[0.5, 0.1], [0.2, 0.1]])
        points = points_for_budget([dear, cheap], [10.0, 1.0], 2.0)
        assert [p.tolist() for p in points] == [[1], [2, 2]]
        points = points_for_budget([dear, cheap], [10.0, 1.0], 12.0)
        assert [p.tolist() for p in points] == [[2], [2, 2]]

    def test_two_terms_where_one_brings_little(self):
        points = points_for_budget([np.array([[1.0, 0.99, 0.0]])], [1.0], 2.0)
        assert points[0].tolist() == [3]

    @SETTINGS
    @given(errors=ERRORS)
    def test_as_good_as_any_for_equal_costs_where_gains_shrink(self, errors):
        """Then greedy is best: against all ways to spend three more terms."""
        gains = -np.sort(-errors[:, 1:], axis=1)
        errors = np.cumsum(gains[:, ::-1], axis=1)[:, ::-1]
        errors = np.concatenate([errors, np.zeros((len(errors), 1))], axis=1)
        (points,) = points_for_budget([errors], [1.0], 3.0)
        rows = np.arange(len(errors))
        best = min(
            errors[rows, list(p)].sum()
            for p in itertools.product(range(3), repeat=len(errors))
            if sum(p) <= 3
        )
        assert errors[rows, points - 1].sum() <= best + 1e-12

    def test_refuses_a_free_term(self):
        with pytest.raises(ValueError, match="positive"):
            points_for_budget([np.ones((1, 2))], [0.0], 1.0)


class TestSetup:
    """What a node with further terms costs beside them."""

    def test_many_small_gains_are_not_worth_it(self):
        """Ten channels spread over ten nodes pay ten times; in one node once."""
        spread = [np.array([[1.0, 0.0]])] * 10
        together = np.tile([[1.0, 0.0]], (10, 1))
        points = points_for_budget([*spread, together], [1.0] * 11, 20.0, setup=10.0)
        assert [p.max() for p in points] == [1] * 10 + [2]
        assert (points[-1] == 2).all()

    @given(
        errors=st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=5), min_size=1, max_size=5),
        setup=st.floats(0.1, 20),
        budget=st.floats(0, 100),
    )
    @SETTINGS
    def test_the_budget_is_kept(self, errors, setup, budget):
        tables = [np.stack([first, np.zeros(len(first))], axis=1) for first in errors]
        costs = [1.0 + i for i in range(len(tables))]
        points = points_for_budget(tables, costs, budget, setup)
        spent = sum(
            cost * int((p - 1).sum()) + setup * bool((p > 1).any())
            for cost, p in zip(costs, points, strict=True)
        )
        assert spent <= budget * (1 + 1e-9)

    def test_no_node_is_worth_it(self):
        assert points_for_budget([np.array([[1.0, 0.0]])], [1.0], 5.0, setup=10.0)[0].tolist() == [
            1
        ]


def test_most_gained_are_those_with_the_largest_error_of_their_own():
    """Loud rows err most though all err alike relative to themselves."""
    w = W.copy()
    w[[2, 5]] *= 100
    options = {"bits": 4, "terms": 2, "granularity": PerAxis(0)}
    assert np.flatnonzero(most_gained("digit", w, count=2, **options)).tolist() == [2, 5]
    assert not most_gained("digit", w, count=0, **options).any()
