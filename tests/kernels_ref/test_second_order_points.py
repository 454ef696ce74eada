"""Second-order rounding of rows with different numbers of terms."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.kernels_ref import PerAxis, PerBlock, round_second_order
from onnxq.kernels_ref.offset import spanning_scales
from onnxq.kernels_ref.partial import Coverage, partial_scales, restore_partial

KINDS = ("fixed_ratio", "digit", "joint")
POINTS = np.array([1, 3, 2, 1, 2, 3, 1, 1], np.int8)
RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 40)) * RNG.geometric(0.4, (8, 40))


def moments(groups: int | None = None) -> np.ndarray:
    x = RNG.standard_normal((groups or 1, 200, 40)) @ RNG.standard_normal((groups or 1, 40, 40))
    found = np.matmul(x.swapaxes(1, 2), x)
    return found if groups else found[0]


@pytest.mark.parametrize("groups", [None, 2, 8])
@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_as_if_it_had_no_other_terms(kind, block_size, groups):
    h = moments(groups)
    granularity = PerAxis(0) if block_size is None else PerBlock(1, block_size)
    _, scales = partial_scales(kind, W, Coverage(POINTS), bits=4, terms=3, granularity=granularity)
    options = {"bits": 4, "kind": kind, "block_size": block_size}
    found = round_second_order(W, scales, h, points=POINTS, **options)
    for row, count in enumerate(POINTS):
        own = h if groups is None else h[row * groups // 8]
        part = slice(row, row + 1)
        alone = round_second_order(W[part], [s[part] for s in scales[:count]], own, **options)
        for i, term in enumerate(found.terms):
            wanted = alone.terms[i] if i < count else np.zeros((1, 40))
            np.testing.assert_array_equal(term[part], wanted)
    restore_partial(  # raises where a term has integers outside of its rows
        kind, found.terms, scales, Coverage(POINTS), shape=W.shape, bits=4, granularity=granularity
    )


def test_digits_in_the_full_range():
    h = moments()
    points = np.minimum(POINTS, 2)
    scales = [np.empty(8), np.empty(8)]
    for count in (1, 2):
        rows = points == count
        made = spanning_scales(W[rows], bits=4, terms=count)
        for i in range(2):
            scales[i][rows] = made[i] if i < count else made[-1] / 16
    options = {"bits": 4, "kind": "digit", "full_range": True}
    found = round_second_order(W, scales, h, points=points, **options)
    for row, count in enumerate(points):
        part = slice(row, row + 1)
        alone = round_second_order(W[part], [s[part] for s in scales[:count]], h, **options)
        for i, term in enumerate(alone.terms):
            np.testing.assert_array_equal(found.terms[i][part], term)
        assert count == 2 or not found.terms[1][row].any()


def test_all_of_them_is_the_same_as_none_given():
    h = moments()
    for kind in KINDS:
        _, scales = partial_scales(kind, W, Coverage(), bits=3, terms=2, granularity=PerAxis(0))
        one, other = (
            round_second_order(W, scales, h, bits=3, kind=kind, points=points)
            for points in (None, np.full(8, 2, np.int8))
        )
        for a, b in zip(one.terms, other.terms, strict=True):
            np.testing.assert_array_equal(a, b)


def test_points_that_do_not_fit():
    with pytest.raises(ValueError, match="a row has 1 to 1 terms"):
        round_second_order(
            W, [np.ones(8)], moments(), bits=4, kind="digit", points=np.full(8, 2, np.int8)
        )
