"""The algebra of linear branches: convolutions and per-channel affines, in sequence and in sum.

A `LinearMap` is what a Conv with constant weights computes, in float64:

    y[o, i] = bias[o] + Σ_c Σ_k kernel[o, c, k] · x0[c, i·stride + k·dilation − pad_begin]

x0 being x with zeros around it. `kernel` is None for a per-channel affine y = scale · x + bias,
which identity, BatchNormalization, Mul, Add and Pad are. Sequences and sums of such maps are such
maps again wherever no border would come out differently; where it would, `Unfoldable` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# A folded kernel larger than this is never what anybody wants.
_LARGEST = 1 << 26


class Unfoldable(ValueError):
    """The maps do not combine into one; the text says why."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One linear map.

    Attributes:
        kernel: float64 [out, in / groups, *spatial], or None for a per-channel affine.
        scale: float64 () or [channels]; only for an affine.
        bias: float64 () or [out].
        groups: as in Conv.
        strides, dilations, begin, end: one per spatial axis; an affine has none until it pads.
    """

    kernel: Array | None
    scale: Array
    bias: Array
    groups: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @property
    def padded(self) -> bool:
        """Whether zeros are put around the input."""
        return any(self.begin) or any(self.end)

    def padded_along(self, axis: int) -> bool:
        """Whether zeros are put around the input along one spatial axis."""
        return bool(self.begin) and bool(self.begin[axis] or self.end[axis])

    def one_to_one(self, axis: int) -> bool:
        """Whether, along one spatial axis, every position is read, and read alone."""
        return self.kernel is None or (self.kernel.shape[2 + axis] == 1 and self.strides[axis] == 1)

    @property
    def unit_stride(self) -> bool:
        """Whether no position is skipped."""
        return all(s == 1 for s in self.strides)

    @property
    def keeps_zero(self) -> bool:
        """Whether zero input gives zero output."""
        return not np.any(self.bias)

    @property
    def parameters(self) -> int:
        """Number of kernel values."""
        return 0 if self.kernel is None else int(self.kernel.size)


def affine(scale: Array | float, bias: Array | float) -> LinearMap:
    """Y = scale · x + bias, each () or [channels]."""
    return LinearMap(None, np.asarray(scale, np.float64), np.asarray(bias, np.float64))


def convolution(
    kernel: Array,
    bias: Array | None,
    *,
    groups: int,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    begin: tuple[int, ...],
    end: tuple[int, ...],
) -> LinearMap:
    """What a Conv computes."""
    offset = np.zeros(()) if bias is None else np.asarray(bias, np.float64)
    # the dilation of a single tap means nothing: 1 makes equal maps look equal
    real = tuple(d if k > 1 else 1 for d, k in zip(dilations, kernel.shape[2:], strict=True))
    one = np.ones(())
    return LinearMap(kernel.astype(np.float64), one, offset, groups, strides, real, begin, end)


def average_pool(
    channels: int,
    shape: tuple[int, ...],
    *,
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    begin: tuple[int, ...],
    end: tuple[int, ...],
) -> LinearMap:
    """AveragePool that counts its padding, as a depthwise kernel of equal values."""
    kernel = np.full((channels, 1, *shape), 1.0 / math.prod(shape))
    return convolution(
        kernel,
        None,
        groups=channels,
        strides=strides,
        dilations=dilations,
        begin=begin,
        end=end,
    )


def padding(begin: tuple[int, ...], end: tuple[int, ...]) -> LinearMap:
    """Zeros around the spatial axes."""
    ones = tuple(1 for _ in begin)
    return LinearMap(None, np.ones(()), np.zeros(()), 1, ones, ones, begin, end)


def channels_out(m: LinearMap) -> int | None:
    """Output channels, where the map says how many."""
    if m.kernel is not None:
        return int(m.kernel.shape[0])
    sizes = [a.size for a in (m.scale, m.bias) if a.ndim]
    return max(sizes) if sizes else None


def sequence(first: LinearMap, then: LinearMap) -> LinearMap:
    """The map that computes then(first(x)).

    Zeros that `then` puts around first(x) are zeros around x only along an axis on which `first`
    reads one position per output, and only if `first` has no bias.

    Raises:
        Unfoldable: no single Conv computes it, borders included.
    """
    if then.padded and not first.keeps_zero:
        raise Unfoldable("a bias ahead of padding: the border would come out differently")
    for axis in range(len(then.begin)):
        if then.padded_along(axis) and not first.one_to_one(axis):
            raise Unfoldable(
                "padding after a kernel or a stride: the border would come out differently"
            )
    if first.kernel is None and then.kernel is None:
        return _affines(first, then)
    if then.kernel is None:
        return _then_affine(first, then)
    if first.kernel is None:
        return _affine_first(first, then)
    return _kernels(first, then)


def _affines(first: LinearMap, then: LinearMap) -> LinearMap:
    known = channels_out(first)
    if known is not None:
        _same_channels(known, then)
    begin, end = _added(first.begin, then.begin), _added(first.end, then.end)
    ones = tuple(1 for _ in begin)
    scale, bias = first.scale * then.scale, first.bias * then.scale + then.bias
    return LinearMap(None, scale, bias, 1, ones, ones, begin, end)


def _then_affine(first: LinearMap, then: LinearMap) -> LinearMap:
    assert first.kernel is not None
    out = first.kernel.shape[0]
    _same_channels(out, then)
    scale = np.broadcast_to(then.scale, (out,))
    kernel = first.kernel * scale.reshape(-1, *(1 for _ in first.kernel.shape[1:]))
    padded = replace(first, begin=_added(first.begin, then.begin), end=_added(first.end, then.end))
    return replace(padded, kernel=kernel, bias=first.bias * then.scale + then.bias)


def _affine_first(first: LinearMap, then: LinearMap) -> LinearMap:
    """Every case in which `first` pads or adds before `then` reads."""
    assert then.kernel is not None
    inputs = then.kernel.shape[1] * then.groups
    _same_channels(inputs, first)
    scale = np.broadcast_to(first.scale, (inputs,))
    per_output = _per_output(scale, then)
    spatial = tuple(1 for _ in then.kernel.shape[2:])
    kernel = then.kernel * per_output.reshape(*per_output.shape, *spatial)
    bias = then.bias
    if not first.keeps_zero:
        moved = _per_output(np.broadcast_to(first.bias, (inputs,)), then)
        taps = then.kernel.reshape(*then.kernel.shape[:2], -1).sum(axis=2)
        bias = bias + (taps * moved).sum(axis=1)
    return replace(
        then,
        kernel=kernel,
        bias=bias,
        begin=_added(first.begin, then.begin),
        end=_added(first.end, then.end),
    )


def _per_output(values: Array, m: LinearMap) -> Array:
    """Values per input channel as [out, in / groups], aligned with the kernel."""
    assert m.kernel is not None
    out = m.kernel.shape[0]
    grouped = values.reshape(m.groups, 1, -1)
    per = np.broadcast_to(grouped, (m.groups, out // m.groups, grouped.shape[2]))
    return per.reshape(out, -1)


def _kernels(first: LinearMap, then: LinearMap) -> LinearMap:
    """Tap t of `then` reads tap u of `first` at x0[i·s1·s2 + t·d2·s1 + u·d1 − pads].

    ⌊⌊n/s1⌋/s2⌋ = ⌊n/(s1·s2)⌋, so that the output size is right as well.
    """
    assert first.kernel is not None
    assert then.kernel is not None
    if first.kernel.ndim != then.kernel.ndim:
        raise Unfoldable("the kernels have different ranks")
    if first.kernel.shape[0] != then.kernel.shape[1] * then.groups:
        raise Unfoldable("the channels do not match")
    one, two = first.kernel.shape[2:], then.kernel.shape[2:]
    apart_one = first.dilations
    apart_two = tuple(d * s for d, s in zip(then.dilations, first.strides, strict=True))
    steps, shape = [], []
    for k1, d1, k2, d2 in zip(one, apart_one, two, apart_two, strict=True):
        steps.append(math.gcd(d1 * (k1 > 1), d2 * (k2 > 1)) or 1)
        shape.append(((k1 - 1) * d1 + (k2 - 1) * d2) // steps[-1] + 1)
    groups = math.gcd(first.groups, then.groups)
    inputs = first.kernel.shape[1] * first.groups
    out = then.kernel.shape[0]
    if out * inputs // groups * math.prod(shape) > _LARGEST:
        raise Unfoldable("the folded kernel would be very large")
    # [g, mid/g, in/g, taps] and [g, out/g, mid/g, taps]
    a = regroup(first.kernel, first.groups, groups)
    a = a.reshape(groups, -1, inputs // groups, *one)
    b = regroup(then.kernel, then.groups, groups)
    b = b.reshape(groups, out // groups, -1, *two)
    kernel = np.zeros((groups, out // groups, inputs // groups, *shape))
    # a single tap may be nearer than the grid, which means nothing
    along_one = tuple(max(d // step, 1) for d, step in zip(apart_one, steps, strict=True))
    along_two = tuple(max(d // step, 1) for d, step in zip(apart_two, steps, strict=True))
    if math.prod(one) < math.prod(two):  # one product per tap of the smaller kernel
        for tap in np.ndindex(*one):
            product = np.einsum("gom...,gmi->goi...", b, a[_all_at(tap)], optimize=True)
            kernel[_taps(tap, along_one, two, along_two)] += product
    else:
        for tap in np.ndindex(*two):
            product = np.einsum("gom,gmi...->goi...", b[_all_at(tap)], a, optimize=True)
            kernel[_taps(tap, along_two, one, along_one)] += product
    bias = then.bias
    if not first.keeps_zero:
        mid = first.kernel.shape[0]
        moved = np.broadcast_to(first.bias, (mid,)).reshape(groups, -1)
        summed = b.reshape(*b.shape[:3], -1).sum(axis=3)
        bias = bias + np.einsum("gom,gm->go", summed, moved).reshape(-1)
    return LinearMap(
        kernel.reshape(out, inputs // groups, *shape),
        np.ones(()),
        bias,
        groups,
        tuple(s * t for s, t in zip(first.strides, then.strides, strict=True)),
        tuple(step if k > 1 else 1 for step, k in zip(steps, shape, strict=True)),
        _added(first.begin, then.begin),
        _added(first.end, then.end),
    )


def _taps(
    at: tuple[int, ...], apart: tuple[int, ...], count: tuple[int, ...], step: tuple[int, ...]
) -> Any:
    """Where `count` taps, `step` apart, fall on the grid, the first one at `at` · `apart`."""
    starts = [i * d for i, d in zip(at, apart, strict=True)]
    return _all_at(
        tuple(
            slice(begin, begin + (k - 1) * s + 1, s)
            for begin, k, s in zip(starts, count, step, strict=True)
        )
    )


def _all_at(where: tuple[Any, ...]) -> Any:
    """An index of the last axes, all of the first ones."""
    return (..., *where)


def regroup(kernel: Array, groups: int, fewer: int) -> Array:
    """The same map with fewer groups: zeros between channels that did not meet.

    Raises:
        Unfoldable: `fewer` does not divide `groups`.
    """
    if groups % fewer:
        raise Unfoldable(f"{groups} groups are no multiple of {fewer}")
    if groups == fewer:
        return kernel
    out, per_group = kernel.shape[:2]
    inner = groups // fewer
    wide = np.zeros((fewer, inner, out // groups, inner, per_group, *kernel.shape[2:]))
    blocks = kernel.reshape(fewer, inner, out // groups, per_group, *kernel.shape[2:])
    for i in range(inner):
        wide[:, i, :, i] = blocks[:, i]
    return wide.reshape(out, inner * per_group, *kernel.shape[2:])


def add(a: LinearMap, b: LinearMap) -> LinearMap:
    """The map that computes a(x) + b(x).

    Raises:
        Unfoldable: the two have other strides or output sizes, or one would broadcast.
    """
    if a.kernel is None and b.kernel is None:
        if a.begin != b.begin or a.end != b.end:
            raise Unfoldable("the sum of tensors that are padded differently has no kernel")
        known = channels_out(a)
        if known is not None:
            _same_channels(known, b)
        return replace(a, scale=a.scale + b.scale, bias=a.bias + b.bias)
    if a.kernel is None:
        a, b = b, a
    assert a.kernel is not None
    if b.kernel is None:
        b = _dirac(b, a)
    assert b.kernel is not None
    if a.kernel.shape[0] != b.kernel.shape[0] or (
        a.kernel.shape[1] * a.groups != b.kernel.shape[1] * b.groups
    ):
        raise Unfoldable("the branches have different channels")
    if a.strides != b.strides:
        raise Unfoldable("the branches have different strides")
    groups = math.gcd(a.groups, b.groups)
    frame = _Frame.of(a, b)
    kernel = frame.place(a, groups) + frame.place(b, groups)
    return LinearMap(
        kernel,
        np.ones(()),
        a.bias + b.bias,
        groups,
        a.strides,
        frame.dilations,
        frame.begin,
        frame.end,
    )


def _dirac(m: LinearMap, like: LinearMap) -> LinearMap:
    """A per-channel affine as a kernel with one tap, in the groups of `like`."""
    assert like.kernel is not None
    channels, per_group = like.kernel.shape[:2]
    if per_group * like.groups != channels:
        raise Unfoldable("an identity branch beside a Conv that changes the number of channels")
    if not like.unit_stride:
        raise Unfoldable("an identity branch beside a Conv with stride")
    _same_channels(channels, m)
    rank = like.kernel.ndim - 2
    kernel = np.zeros((channels, per_group, *(1 for _ in range(rank))))
    rows = np.arange(channels)
    kernel.reshape(channels, per_group)[rows, rows % per_group] = m.scale
    none = (0,) * rank
    ones = (1,) * rank
    return LinearMap(
        kernel, np.ones(()), m.bias, like.groups, ones, ones, m.begin or none, m.end or none
    )


@dataclass(frozen=True)
class _Frame:
    """The common kernel grid of two maps."""

    shape: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, a: LinearMap, b: LinearMap) -> _Frame:
        assert a.kernel is not None
        assert b.kernel is not None
        shape, dilations, begin, end = [], [], [], []
        for axis, (ka, kb) in enumerate(zip(a.kernel.shape[2:], b.kernel.shape[2:], strict=True)):
            da, db = a.dilations[axis], b.dilations[axis]
            (pa, ea), (pb, eb) = (a.begin[axis], a.end[axis]), (b.begin[axis], b.end[axis])
            if pa + ea - (ka - 1) * da != pb + eb - (kb - 1) * db:
                raise Unfoldable("the branches have outputs of different size")
            # the coarsest grid that holds the taps of both
            step = math.gcd(da * (ka > 1), db * (kb > 1), pa - pb) or 1
            first = max(pa, pb)
            reach = max((ka - 1) * da - pa, (kb - 1) * db - pb)
            shape.append((reach + first) // step + 1)
            dilations.append(step if shape[-1] > 1 else 1)
            begin.append(first)
            end.append(max(ea, eb))
        return cls(tuple(shape), tuple(dilations), tuple(begin), tuple(end))

    def place(self, m: LinearMap, groups: int) -> Array:
        """The kernel of `m` on this grid, in `groups` groups."""
        assert m.kernel is not None
        inputs = m.kernel.shape[1] * m.groups
        if m.kernel.shape[0] * inputs // groups * math.prod(self.shape) > _LARGEST:
            raise Unfoldable("the folded kernel would be very large")
        kernel = regroup(m.kernel, m.groups, groups)
        placed = np.zeros((*kernel.shape[:2], *self.shape))
        where: list[slice] = []
        for axis, taps in enumerate(kernel.shape[2:]):
            start = (self.begin[axis] - m.begin[axis]) // self.dilations[axis]
            apart = max(m.dilations[axis] // self.dilations[axis], 1)
            where.append(slice(start, start + (taps - 1) * apart + 1, apart))
        placed[_all_at(tuple(where))] = kernel
        return placed


def negate(m: LinearMap) -> LinearMap:
    """The map that computes −m(x)."""
    if m.kernel is None:
        return replace(m, scale=-m.scale, bias=-m.bias)
    return replace(m, kernel=-m.kernel, bias=-m.bias)


def _added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if not a or not b:
        return a or b
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _same_channels(channels: int, m: LinearMap) -> None:
    """A map of one channel beside several would broadcast: refused."""
    known = channels_out(m)
    if known not in (None, channels):
        raise Unfoldable(f"{known} values for {channels} channels")
