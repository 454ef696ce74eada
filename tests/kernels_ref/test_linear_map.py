"""The algebra of linear maps against applying them one after the other, in float64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref.integer import conv
from onnxq.kernels_ref.linear_map import (
    LinearMap,
    Unfoldable,
    add,
    affine,
    average_pool,
    channels_out,
    convolution,
    negate,
    padding,
    regroup,
    sequence,
)

# Values are small integers (over 16, for the pools), so that float64 holds every sum exactly: the
# folded map must agree to the last bit, and no tolerance can hide a border.
CHANNELS = 4


def evaluate(m: LinearMap, x: np.ndarray) -> np.ndarray | None:
    """m(x) by its definition, with `kernels_ref.conv`; None if no window fits."""
    rank = x.ndim - 2
    shape = (-1, *(1,) * rank)
    if m.kernel is None:
        around = zip(m.begin, m.end, strict=True)
        padded = np.pad(x, [(0, 0), (0, 0), *around]) if m.begin else x
        return padded * m.scale.reshape(shape) + m.bias.reshape(shape)
    for n, k, d, b, e in zip(
        x.shape[2:], m.kernel.shape[2:], m.dilations, m.begin, m.end, strict=True
    ):
        if n + b + e < (k - 1) * d + 1:
            return None
    y = conv(
        x,
        m.kernel,
        pads=[*m.begin, *m.end],
        strides=m.strides,
        dilations=m.dilations,
        group=m.groups,
    )
    return y + m.bias.reshape(shape)


def integers(draw: st.DrawFn, *shape: int) -> np.ndarray:
    seed = draw(st.integers(0, 2**20))
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float64)


@st.composite
def maps(draw: st.DrawFn, rank: int, channels: int) -> LinearMap:
    """A map of `channels` channels."""

    def each(*options: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(options)) for _ in range(rank))

    kind = draw(st.sampled_from(["conv", "conv", "conv", "affine", "pool", "pad"]))
    if kind == "affine":
        scale = integers(draw, *draw(st.sampled_from([(), (channels,)])))
        return affine(scale, integers(draw, *draw(st.sampled_from([(), (channels,)]))))
    if kind == "pad":
        return padding(each(0, 1, 2), each(0, 1))
    begin, end = (each(0, 0, 1, 2), each(0, 0, 1, 2)) if draw(st.booleans()) else ((0,) * rank,) * 2
    strides, dilations = each(1, 1, 1, 2, 3), each(1, 1, 2, 3)
    if kind == "pool":
        shape = each(1, 2, 4)
        return average_pool(
            channels, shape, strides=strides, dilations=dilations, begin=begin, end=end
        )
    out = draw(st.sampled_from([2, 4, 8]))
    group = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0 and out % g == 0]))
    bias = draw(st.sampled_from([None, 0, 1]))
    return convolution(
        integers(draw, out, channels // group, *each(1, 1, 2, 3)),
        None if bias is None else integers(draw, out) * bias,
        groups=group,
        strides=strides,
        dilations=dilations,
        begin=begin,
        end=end,
    )


@st.composite
def partners(draw: st.DrawFn, a: LinearMap, rank: int) -> LinearMap:
    """A map that often has the output size of `a`."""
    if a.kernel is None or draw(st.integers(0, 5)) == 0:
        return draw(maps(rank, CHANNELS))
    if draw(st.integers(0, 3)) == 0:
        return affine(integers(draw, CHANNELS), integers(draw))
    shape, dilations, begin, end = [], [], [], []
    for k, d, b, e in zip(a.kernel.shape[2:], a.dilations, a.begin, a.end, strict=True):
        shape.append(draw(st.sampled_from([1, 1, 2, 3])))
        dilations.append(draw(st.sampled_from([1, 2, 3])) if shape[-1] > 1 else 1)
        total = b + e - (k - 1) * d + (shape[-1] - 1) * dilations[-1]
        begin.append(draw(st.integers(0, max(total, 0))))
        end.append(max(total - begin[-1], 0))
    out = a.kernel.shape[0]
    group = draw(st.sampled_from([1, 2]))
    return convolution(
        integers(draw, out, CHANNELS // group, *shape),
        integers(draw, out),
        groups=group,
        strides=a.strides,
        dilations=tuple(dilations),
        begin=tuple(begin),
        end=tuple(end),
    )


def exhaust(strategy: st.SearchStrategy, check: object, examples: int) -> None:
    settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(check))()


@st.composite
def chains(draw: st.DrawFn) -> tuple[LinearMap, LinearMap, np.ndarray]:
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    first = draw(maps(rank, CHANNELS))
    then = draw(maps(rank, channels_out(first) or CHANNELS))
    size = [draw(st.integers(4, 9 if rank < 3 else 6)) for _ in range(rank)]
    return first, then, integers(draw, 2, CHANNELS, *size)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[LinearMap, LinearMap, np.ndarray]:
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    a = draw(maps(rank, CHANNELS))
    b = draw(partners(a, rank))
    size = [draw(st.integers(4, 9 if rank < 3 else 6)) for _ in range(rank)]
    a, b = draw(st.permutations([a, b]))
    return a, b, integers(draw, 2, CHANNELS, *size)


def test_sequence_applies_one_after_the_other():
    seen = Counter()

    def check(case):
        first, then, x = case
        try:
            whole = sequence(first, then)
        except Unfoldable:
            seen["left alone"] += 1
            return
        middle = evaluate(first, x)
        want = None if middle is None else evaluate(then, middle)
        if want is None:
            return
        seen["folded"] += 1
        got = evaluate(whole, x)
        np.testing.assert_array_equal(got, want)

    exhaust(chains(), check, 400)
    assert min(seen["folded"], seen["left alone"]) > 40


def test_add_sums():
    seen = Counter()

    def check(case):
        a, b, x = case
        try:
            whole = add(a, b)
        except Unfoldable:
            seen["left alone"] += 1
            return
        parts = evaluate(a, x), evaluate(b, x)
        if parts[0] is None or parts[1] is None:
            return
        assert parts[0].shape == parts[1].shape, "a sum that would broadcast was folded"
        seen["folded"] += 1
        np.testing.assert_array_equal(evaluate(whole, x), parts[0] + parts[1])
        np.testing.assert_array_equal(evaluate(negate(whole), x), -parts[0] - parts[1])

    exhaust(pairs(), check, 400)
    assert min(seen["folded"], seen["left alone"]) > 40


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
@pytest.mark.parametrize("fewer", [1, 2, 3, 4, 12])
def test_regroup_is_exact(groups, fewer):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((24, 12 // groups, 3, 2))
    if groups % fewer:
        with pytest.raises(Unfoldable, match="no multiple"):
            regroup(kernel, groups, fewer)
        return
    wide = regroup(kernel, groups, fewer)
    assert wide.shape == (24, 12 // fewer, 3, 2)
    assert np.count_nonzero(wide) == np.count_nonzero(kernel)
    x = rng.integers(-3, 4, (1, 12, 5, 5)).astype(np.float64)
    kernel = np.round(kernel * 4)
    np.testing.assert_array_equal(
        conv(x, regroup(kernel, groups, fewer), group=fewer), conv(x, kernel, group=groups)
    )


def conv2d(*shape, pad=0, end=None, stride=1, dilation=1, groups=1, bias=None):
    kernel = np.random.default_rng(math.prod(shape)).standard_normal(shape)
    return convolution(
        kernel,
        None if bias is None else np.full(shape[0], float(bias)),
        groups=groups,
        strides=(stride,) * 2,
        dilations=(dilation,) * 2,
        begin=(pad,) * 2,
        end=(pad if end is None else end,) * 2,
    )


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        (conv2d(4, 4, 1, 1, bias=1), conv2d(4, 4, 3, 3, pad=1), "a bias ahead of padding"),
        (affine(1.0, np.ones(4)), conv2d(4, 4, 3, 3, pad=1), "a bias ahead of padding"),
        (affine(1.0, np.ones(4)), padding((1, 1), (1, 1)), "a bias ahead of padding"),
        (conv2d(4, 4, 3, 3, pad=1), conv2d(4, 4, 3, 3, pad=1), "padding after a kernel"),
        (conv2d(4, 4, 1, 1, stride=2), conv2d(4, 4, 3, 3, pad=1), "or a stride"),
        (conv2d(4, 4, 3, 3), padding((0, 1), (0, 0)), "padding after a kernel"),
        (conv2d(4, 4, 1, 1), conv2d(4, 2, 1, 1), "channels do not match"),
        (conv2d(1, 4, 1, 1), affine(np.ones(4), 0.0), "4 values for 1 channels"),
        (affine(np.ones(1), 0.0), affine(np.ones(4), 0.0), "4 values for 1 channels"),
        (affine(np.ones(1), 0.0), conv2d(4, 4, 1, 1), "1 values for 4 channels"),
    ],
)
def test_sequence_refuses(first, then, reason):
    with pytest.raises(Unfoldable, match=reason):
        sequence(first, then)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (conv2d(4, 4, 3, 3, stride=2), conv2d(4, 4, 3, 3), "different strides"),
        (conv2d(4, 4, 3, 3), conv2d(4, 4, 1, 1), "different size"),
        (conv2d(4, 4, 3, 3, dilation=2), conv2d(4, 4, 3, 3), "different size"),
        (conv2d(4, 4, 3, 3), conv2d(1, 4, 3, 3), "different channels"),
        (conv2d(8, 4, 1, 1), affine(1.0, 0.0), "changes the number of channels"),
        (conv2d(4, 4, 1, 1, stride=2), affine(1.0, 0.0), "Conv with stride"),
        (conv2d(4, 4, 1, 1), padding((1, 0), (0, 0)), "different size"),
        (padding((1, 0), (0, 0)), affine(1.0, 0.0), "padded differently"),
        (conv2d(4, 4, 1, 1), affine(np.ones(1), 0.0), "1 values for 4 channels"),
    ],
)
def test_add_refuses(a, b, reason):
    for pair in ((a, b), (b, a)):
        with pytest.raises(Unfoldable, match=reason):
            add(*pair)


def test_a_kernel_beyond_all_use_is_refused():
    """A depthwise Conv into a pointwise one of 2^14 channels: 2^28 weights, never allocated."""
    many = 1 << 14

    def pointwise(inputs: int, groups: int) -> LinearMap:
        kernel = np.broadcast_to(1.0, (many, inputs, 1))
        one, none = (1,), (0,)
        return LinearMap(kernel, np.ones(()), np.zeros(()), groups, one, one, none, none)

    with pytest.raises(Unfoldable, match="very large"):
        sequence(pointwise(1, many), pointwise(many, 1))
    with pytest.raises(Unfoldable, match="very large"):
        add(pointwise(1, many), pointwise(many, 1))


def test_dilated_branches_meet_on_the_coarsest_grid():
    """3 taps 2 apart and 5 taps 1 apart: 5 taps. 3 taps 2 apart and 1 in the middle: 3 taps."""
    dilated = conv2d(2, 2, 3, 3, pad=2, dilation=2)
    dense = conv2d(2, 2, 5, 5, pad=2)
    both = add(dilated, dense)
    assert both.kernel.shape == (2, 2, 5, 5)
    assert both.dilations == (1, 1)
    np.testing.assert_array_equal(
        both.kernel[:, :, ::2, ::2] - dense.kernel[:, :, ::2, ::2] != 0, 1
    )
    middle = add(dilated, conv2d(2, 2, 1, 1))
    assert middle.kernel.shape == (2, 2, 3, 3)
    assert middle.dilations == (2, 2)


def test_factorised_kernels_compose_per_axis():
    """3×1 with its padding, then 1×3 with its own: one 3×3, padded alike."""
    column = convolution(
        np.arange(1.0, 4.0).reshape(1, 1, 3, 1),
        None,
        groups=1,
        strides=(1, 1),
        dilations=(1, 1),
        begin=(1, 0),
        end=(1, 0),
    )
    row = convolution(
        np.arange(4.0, 7.0).reshape(1, 1, 1, 3),
        None,
        groups=1,
        strides=(1, 1),
        dilations=(1, 1),
        begin=(0, 1),
        end=(0, 1),
    )
    whole = sequence(column, row)
    np.testing.assert_array_equal(whole.kernel[0, 0], np.outer([1, 2, 3], [4, 5, 6]))
    assert (whole.begin, whole.end) == ((1, 1), (1, 1))
