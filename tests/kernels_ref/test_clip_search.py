import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import (
    CLIP_RATIOS,
    OutputSamples,
    PerAxis,
    PerBlock,
    realize,
    search_clip,
    series_scales,
)

KINDS = ("fixed_ratio", "digit", "joint")


def granularity_of(block_size):
    return PerAxis(0) if block_size is None else PerBlock(1, block_size)


def rounded(kind, w, scales, bits, block_size=None):
    granularity = granularity_of(block_size)
    return realize(kind, w, scales, bits=bits, granularity=granularity).dequantize()


def output_error(measure, w, w_hat, x, wanted=None):
    """Per channel, with the outputs computed in full."""
    error = (x @ w.T if wanted is None else wanted) - x @ w_hat.T
    return (np.abs(error) if measure == "mae" else np.square(error)).mean(axis=0)


def data(measure, x):
    return {"samples": OutputSamples(x)} if measure == "mae" else {"hessian": x.T @ x}


@pytest.mark.parametrize("measure", ["mae", "mse"])
@pytest.mark.parametrize(("kind", "terms"), [("fixed_ratio", 1), ("joint", 2), ("digit", 2)])
def test_per_channel_it_is_the_best_ratio_of_all(measure, kind, terms):
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, (8, 30))
    x = rng.standard_normal((40, 10)) @ rng.standard_normal((10, 30))
    scales = series_scales(kind, w, bits=2, terms=terms, granularity=PerAxis(0))
    found = search_clip(w, scales, bits=2, kind=kind, measure=measure, **data(measure, x))
    errors = np.stack(
        [
            output_error(measure, w, rounded(kind, w, [s * ratio for s in scales], 2), x)
            for ratio in CLIP_RATIOS
        ]
    )
    best = np.array(CLIP_RATIOS)[errors.argmin(axis=0)]
    assert len(set(best)) > 1
    for before, after in zip(scales, found, strict=True):
        np.testing.assert_array_equal(after, before * best)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.sampled_from(["mae", "mse"]),
    st.sampled_from([None, 3, 8]),
    st.integers(2, 4),
)
def test_the_output_error_never_grows(seed, kind, measure, block_size, bits):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 10)).astype(np.float32)
    x = rng.standard_normal((15, 10))
    scales = series_scales(kind, w, bits=bits, terms=2, granularity=granularity_of(block_size))
    found = search_clip(
        w, scales, bits=bits, kind=kind, block_size=block_size, measure=measure, **data(measure, x)
    )
    w = w.astype(np.float64)
    before = output_error(measure, w, rounded(kind, w, scales, bits, block_size), x)
    after = output_error(measure, w, rounded(kind, w, found, bits, block_size), x)
    # Costs are compared up to roundings of sums of some hundred products below 100.
    assert np.all(after <= before + 1e4 * np.finfo(np.float64).eps)
    for old, new in zip(scales, found, strict=True):
        assert new.dtype == np.float32
        assert new.shape == old.shape
    if kind == "digit":
        for coarse, fine in itertools.pairwise(found):
            np.testing.assert_array_equal(coarse, np.ldexp(fine, bits))


@pytest.mark.parametrize("block_size", [None, 20])
@pytest.mark.parametrize("measure", ["mae", "mse"])
def test_an_outlier_that_no_input_meets_is_clipped_away(measure, block_size):
    rng = np.random.default_rng(1)
    w, x = rng.uniform(-1, 1, (6, 60)), rng.standard_normal((200, 60))
    w[:, 2], x[:, 2] = 5.0, 0.0
    scales = series_scales(
        "fixed_ratio", w, bits=4, terms=1, granularity=granularity_of(block_size)
    )
    options = {"bits": 4, "kind": "fixed_ratio", "block_size": block_size, "measure": measure}
    (found,) = search_clip(w, scales, **data(measure, x), **options)
    before = output_error(measure, w, rounded("fixed_ratio", w, scales, 4, block_size), x)
    after = output_error(measure, w, rounded("fixed_ratio", w, [found], 4, block_size), x)
    ratio = (found / scales[0]).reshape(6, -1)[:, 0]
    assert np.all(ratio <= 0.6)
    # Rounding errors go with the step, squared ones with its square.
    assert after.sum() < 0.7 * before.sum()
    # The twin: where inputs do meet it, it stays.
    x[:, 2] = 5 * rng.standard_normal(200)
    (kept,) = search_clip(w, scales, **data(measure, x), **options)
    assert np.all((kept / scales[0]).reshape(6, -1)[:, 0] > 0.6)


def test_mae_aims_at_the_wanted_outputs():
    # All weights should be half as large as they are: a smaller scale with saturated levels.
    x = np.random.default_rng(2).standard_normal((30, 4))
    w, scales = np.ones((1, 4)), [np.array([1.0])]
    samples = OutputSamples(x, wanted=0.5 * (x @ w.T))
    (found,) = search_clip(w, scales, bits=2, kind="fixed_ratio", measure="mae", samples=samples)
    assert found[0] == 0.5


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("measure", ["mae", "mse"])
def test_groups_are_searched_as_if_alone(measure, block_size):
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((6, 9)), rng.standard_normal((3, 20, 9))
    wanted = rng.standard_normal((20, 6))
    scales = series_scales("joint", w, bits=3, terms=2, granularity=granularity_of(block_size))
    options = {"bits": 3, "kind": "joint", "block_size": block_size, "measure": measure}
    h = np.einsum("gni,gnj->gij", x, x)
    whole = search_clip(w, scales, hessian=h, samples=OutputSamples(x, wanted), **options)
    for group in range(3):
        mine = slice(2 * group, 2 * group + 2)
        alone = search_clip(
            w[mine],
            [s[mine] for s in scales],
            hessian=h[group],
            samples=OutputSamples(x[group], wanted[:, mine]),
            **options,
        )
        for got, expected in zip(whole, alone, strict=True):
            np.testing.assert_array_equal(got[mine], expected)


def test_absmax_keeps_the_scales_and_needs_no_data():
    w = np.ones((2, 3))
    scales = series_scales("joint", w, bits=3, terms=2, granularity=PerAxis(0))
    found = search_clip(w, scales, bits=3, kind="joint", measure="absmax")
    for got, expected in zip(found, scales, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "kl"}, "measure is 'kl'"),
        ({"measure": "mse"}, "needs the hessian"),
        ({"measure": "mae"}, "needs samples"),
        ({"measure": "mse", "hessian": np.eye(2)}, "hessian has shape"),
        ({"measure": "mae", "samples": OutputSamples(np.ones((5, 2)))}, "samples.x has shape"),
        (
            {"measure": "mae", "samples": OutputSamples(np.ones((5, 3)), np.ones((5, 3)))},
            "samples.wanted has shape",
        ),
        ({"measure": "mse", "hessian": np.eye(3), "ratios": [0.5, 0.0]}, "ratios are"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        search_clip(np.ones((2, 3)), [np.ones(2)], bits=4, kind="fixed_ratio", **options)
