import numpy as np
import pytest

from onnxq.kernels_ref import (
    PerAxis,
    PerBlock,
    round_second_order,
    round_second_order_clipped,
    series_scales,
    spread,
)

RATIOS = (1.0, 0.8, 0.6, 0.45)


def granularity_of(block_size):
    return PerAxis(0) if block_size is None else PerBlock(1, block_size)


def cost(w, terms, scales, h, block_size):
    granularity = granularity_of(block_size)
    parts = zip(terms, scales, strict=True)
    error = w - sum(q * spread(s, w.shape, granularity) for q, s in parts)
    return np.einsum("oi,ij,oj->o", error, h, error)


def problem(seed=0, out=10, inputs=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, 12)) @ rng.standard_normal((12, inputs))
    return rng.standard_t(4, (out, inputs)), x.T @ x + np.eye(inputs)


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize(("kind", "bits", "terms"), [("fixed_ratio", 3, 1), ("digit", 2, 2)])
def test_every_row_has_the_best_ratio_of_all(kind, bits, terms, block_size):
    w, h = problem()
    scales = series_scales(kind, w, bits=bits, terms=terms, granularity=granularity_of(block_size))
    options = {"bits": bits, "kind": kind, "block_size": block_size}
    rounded, best = round_second_order_clipped(w, scales, h, ratios=RATIOS, **options)
    tried = [[scale * ratio for scale in scales] for ratio in RATIOS]
    alone = [round_second_order(w, trial, h, **options).terms for trial in tried]
    costs = np.stack(
        [cost(w, q, trial, h, block_size) for q, trial in zip(alone, tried, strict=True)]
    )
    chosen = costs.argmin(axis=0)
    assert len(set(chosen)) > 1
    for row, ratio in enumerate(chosen):
        for i in range(terms):
            np.testing.assert_array_equal(rounded.terms[i][row], alone[ratio][i][row])
            np.testing.assert_array_equal(best[i][row], tried[ratio][i][row])


def test_no_ratio_but_one_changes_nothing():
    w, h = problem(1)
    w = w.astype(np.float32)
    scales = series_scales("joint", w, bits=3, terms=2, granularity=PerAxis(0))
    rounded, best = round_second_order_clipped(w, scales, h, bits=3, kind="joint", ratios=())
    expected = round_second_order(w, scales, h, bits=3, kind="joint")
    assert rounded.plain_rows == expected.plain_rows
    for i in range(2):
        np.testing.assert_array_equal(rounded.terms[i], expected.terms[i])
        np.testing.assert_array_equal(best[i], scales[i])
        assert best[i].dtype == np.float32


def test_without_usable_moments_scales_stay_and_the_reason_is_told():
    w, h = problem(2)
    scales = series_scales("fixed_ratio", w, bits=3, terms=1, granularity=PerAxis(0))
    rounded, best = round_second_order_clipped(w, scales, h * np.nan, bits=3, kind="fixed_ratio")
    assert "not finite" in rounded.fallback
    assert rounded.plain_rows == len(w)
    np.testing.assert_array_equal(best[0], scales[0])


def test_refuses_ratios_that_are_not_positive():
    w, h = problem(3)
    with pytest.raises(ValueError, match="ratios are"):
        round_second_order_clipped(
            w, [np.ones(10)], h, bits=3, kind="fixed_ratio", ratios=[0.5, -1.0]
        )
