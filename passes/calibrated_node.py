"""Planning the numbers of one node from its inputs: clip, rounding, bias, affine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref import (
    ClipMeasure,
    OutputSamples,
    Series,
    descend,
    fit_affine,
    keep_if_better,
    least_squares_target,
    restore,
    round_second_order,
    search_clip,
    spread,
)
from onnxq.kernels_ref.partial import Coverage, realize_partial
from onnxq.passes.channel_terms import of_each, spanning, terms_per_channel, unclipped_scales
from onnxq.passes.node_samples import NodeSamples, Numbers
from onnxq.passes.rounded_clip import search_rounded_clip
from onnxq.passes.stored_scales import storable
from onnxq.plan import NodePlan

Array = npt.NDArray[Any]
Rounding = Literal["second_order", "nearest"]
Affine = Literal["mae", "mse", "none"]

ALL = slice(None)
CLIP_ROWS = 1024
# Output channels by which one number for all of them is chosen.
CHOICE_ROWS = 96
# How strongly weights that aim at the float output are held to the float weights, as a share of
# the inputs' mean square: what held-out samples call for lies anywhere between. Without them, 0.3.
TARGET_DAMPINGS = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
USUAL_TARGET_DAMPING = 0.3
# The same for what the weights that are rounded last make up for.
DAMPINGS = (0.05, 0.01, 1e-3, 1e-4)
USUAL_DAMPING = 0.01


@dataclass(frozen=True)
class NodeSettings:
    """Which steps are taken.

    Attributes:
        measure: of the clip ratios: the output's mae or mse; absmax does not clip.
        rounding: second_order aims at the float model's output, with what earlier nodes got wrong.
        affine: the measure of the slope and offset fitted at last.
        bias_correction: whether the mean output is made right.
        descent: whether single integers are changed after second-order rounding.
    """

    measure: ClipMeasure = "mse"
    rounding: Rounding = "second_order"
    affine: Affine = "none"
    bias_correction: bool = True
    descent: bool = True


def plan_node(
    samples: NodeSamples, entry: NodePlan, plain: Series, settings: NodeSettings
) -> Numbers:
    """The numbers of one node; `samples` has its held-out ones taken in afterwards.

    Each step is kept only where the mean absolute error of the node's output on held-out samples
    does not grow: rounding, against `plain`, the series without data; the bias; and the affine, per
    channel. What is kept is fitted again on all samples, and then the scales are clipped: every
    ratio is also another rounding, and the best would not be the best for other moments.
    """
    wanted = Wanted.of(samples, settings)
    pull = _target_damping(samples, settings, wanted)
    target = wanted.target(pull)
    grid = Grid.first(target, plain, entry)
    damping = _damping(samples, wanted, target, grid, entry=entry, settings=settings)
    rounded = _rounded(samples, target, grid, entry, settings, damping=damping)
    found, first = wanted.corrected(rounded), wanted.corrected(plain)
    zero = np.zeros(len(target))
    chosen = found if samples.held.error(found) <= samples.held.error(first) else first
    keep_bias = samples.held.error(chosen) <= samples.held.error(replace(chosen, bias=zero))
    samples.take_in_held_out()
    wanted = Wanted.of(samples, settings)
    first = wanted.corrected(plain)
    if chosen is found:
        target = wanted.target(pull)
        rounded = _rounded_at_last(samples, target, grid.points, entry, settings, damping=damping)
        found = wanted.corrected(rounded)
        chosen = found if samples.held.error(found) <= samples.held.error(first) else first
    else:
        chosen = first
    if not keep_bias:
        chosen = replace(chosen, bias=zero)
    return chosen if settings.affine == "none" else _affine(samples, chosen, settings.affine)


def shift_only(samples: NodeSamples, series: Series, settings: NodeSettings) -> Numbers:
    """The numbers of a node whose series is given: its bias alone, if held-out samples agree."""
    without = Numbers(series, np.zeros(len(samples.matrix)))
    found = Wanted.of(samples, settings).corrected(series)
    return found if samples.held.error(found) <= samples.held.error(without) else without


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the levels of a series lie: its scales, and its offset [out] if it has one.

    `points`, int [out], are the numbers of the channels' terms where these differ.
    """

    scales: tuple[Array, ...]
    offset: Array | None = None
    points: Array | None = None

    @classmethod
    def first(cls, target: Array, plain: Series, entry: NodePlan) -> Grid:
        """The one that roundings are compared on: that of `plain`, or absmax."""
        points = terms_per_channel(plain)
        if plain.offset is None:
            return cls(unclipped_scales(target, entry, points), points=points)
        return cls(tuple(np.asarray(term.scale) for term in plain.terms), plain.offset, points)

    def some(self, rows: slice) -> Grid:
        """The grid of some output channels."""
        scales = tuple(scale[rows] for scale in self.scales)
        offset, points = (None if a is None else a[rows] for a in (self.offset, self.points))
        return Grid(scales, offset, points)

    def without_offset(self, target: Array) -> Array:
        """What the terms are to make of a target [out, in]."""
        return target if self.offset is None else target - self.offset[:, np.newaxis]


@dataclass(frozen=True, eq=False)
class Wanted:
    """Which outputs a node aims at: those of the float model, with what is added to them.

    Attributes:
        hessian, cross: moments of the inputs, about the means where the bias makes up for them.
        extra: Σ d x̂ᵀ of what is wanted beside the float model's products, [out, in]; or None.
        shift: the mean of d, [out]; or 0.
    """

    samples: NodeSamples
    settings: NodeSettings
    hessian: Array
    cross: Array
    extra: Array | None
    shift: Array | float

    @classmethod
    def of(cls, samples: NodeSamples, settings: NodeSettings) -> Wanted:
        """What the samples taken in by now want."""
        hessian, cross = _moments(samples, settings)
        found = samples.extra()
        if found is None:
            return cls(samples, settings, hessian, cross, None, 0.0)
        extra, shift = found
        if settings.bias_correction:
            mean = np.repeat(samples.moments.mean_hat, len(shift) // len(hessian), axis=0)
            extra = extra - samples.moments.count * shift[:, np.newaxis] * mean
        return cls(samples, settings, hessian, cross, extra, shift)

    def target(self, damping: float, rows: slice = ALL) -> Array:
        """What is rounded, float32 [out, in], or some rows of it."""
        samples = self.samples
        if self.settings.rounding == "nearest" or samples.exact_prefix:
            return samples.matrix[rows]
        extra = None if self.extra is None else self.extra[rows]
        found = least_squares_target(
            samples.matrix[rows], self.hessian, self.cross, damping, extra=extra
        )
        return found.astype(np.float32)

    def bias(self, matrix: Array, rows: slice = ALL) -> Array:
        """What makes the mean of the outputs of these weights right, float64 [out]."""
        if not self.settings.bias_correction:
            return np.zeros(len(matrix))
        shift = self.shift[rows] if isinstance(self.shift, np.ndarray) else self.shift
        return self.samples.moments.bias_shift(self.samples.matrix[rows], matrix) + shift

    def some_rows(self) -> slice:
        """Enough output channels to choose one number for all of them by."""
        out = len(self.samples.matrix)
        return slice(None, None, -(-out // CHOICE_ROWS)) if len(self.hessian) == 1 else ALL

    def corrected(self, series: Series) -> Numbers:
        """The series with that bias."""
        return Numbers(series, self.bias(series.dequantize()))


def _target_damping(samples: NodeSamples, settings: NodeSettings, wanted: Wanted) -> float:
    """The one of TARGET_DAMPINGS whose weights, not rounded, err least on held-out samples."""
    if not samples.judges or settings.rounding == "nearest" or samples.exact_prefix:
        return USUAL_TARGET_DAMPING
    errors: dict[int, float] = {}
    rows = wanted.some_rows()
    held = samples.held.some(rows)

    def error(i: int) -> float:
        if i not in errors:
            target = wanted.target(TARGET_DAMPINGS[i], rows)
            errors[i] = held.off(target, wanted.bias(target, rows))
        return errors[i]

    here, last = TARGET_DAMPINGS.index(0.1), len(TARGET_DAMPINGS) - 1
    step = 1 if error(here + 1) < error(here) else -1
    while 0 <= here + step <= last and error(here + step) < error(here):
        here += step
    return TARGET_DAMPINGS[here]


def _damping(
    samples: NodeSamples,
    wanted: Wanted,
    target: Array,
    grid: Grid,
    *,
    entry: NodePlan,
    settings: NodeSettings,
) -> float:
    """The one of DAMPINGS whose rounding, without clipping, errs least on held-out samples."""
    if not samples.judges or settings.rounding == "nearest":
        return USUAL_DAMPING
    rows = wanted.some_rows()
    held, some, grid = samples.held.some(rows), target[rows], grid.some(rows)

    def error(damping: float) -> float:
        matrix = _rounded(samples, some, grid, entry, settings, damping=damping).dequantize()
        return held.off(matrix, wanted.bias(matrix, rows))

    return min(DAMPINGS, key=error)


def _moments(samples: NodeSamples, settings: NodeSettings) -> tuple[Array, Array]:
    """About the means where the bias will make up for them."""
    moments = samples.moments
    return moments.centred() if settings.bias_correction else (moments.hessian, moments.cross)


def _rounded_at_last(
    samples: NodeSamples,
    target: Array,
    points: Array | None,
    entry: NodePlan,
    settings: NodeSettings,
    *,
    damping: float,
) -> Series:
    """With the clip ratios that are best for this target; then single integers are changed."""
    grid = _clipped(samples, target, points, entry, settings, damping=damping)
    series = _rounded(samples, target, grid, entry, settings, damping=damping)
    if settings.rounding == "nearest" or not settings.descent:
        return series
    out = len(target)
    last = np.full(out, len(series) - 1) if points is None else points.astype(np.intp) - 1
    scales = [spread(term.scale, target.shape, term.granularity) for term in series.terms]
    changed = descend(
        of_each([term.q.astype(np.int8, copy=False) for term in series.terms], last),
        of_each([np.broadcast_to(scale, target.shape) for scale in scales], last),
        target - series.dequantize(),
        _moments(samples, settings)[0],
        bits=entry.bits,
        damping=damping,
        full_range=grid.offset is not None,
    )
    terms = (
        replace(term, q=np.where((last == i)[:, np.newaxis], changed, term.q))
        for i, term in enumerate(series.terms)
    )
    return replace(series, terms=tuple(terms))


def _clipped(
    samples: NodeSamples,
    target: Array,
    points: Array | None,
    entry: NodePlan,
    settings: NodeSettings,
    *,
    damping: float,
) -> Grid:
    scales = unclipped_scales(target, entry, points)
    by_rounding = settings.rounding == "second_order" and entry.block_size is None
    unclipped = settings.measure == "absmax" or (points is not None and not by_rounding)
    if unclipped and not (by_rounding and entry.offset):
        return Grid(scales, points=points)
    hessian, _ = _moments(samples, settings)
    judge = None
    if settings.measure == "mae":
        step = -(-samples.fit.x_hat.shape[1] // CLIP_ROWS)
        x = samples.fit.x_hat[:, ::step]
        centre = x.mean(axis=1, keepdims=True) if settings.bias_correction else np.float32(0)
        judge = OutputSamples(x - centre)
    if by_rounding:
        if entry.offset:
            scales = spanning(target, entry, points)
        found, offset = search_rounded_clip(
            target,
            scales,
            hessian,
            bits=entry.bits,
            kind=entry.series,
            damping=damping,
            with_offset=entry.offset,
            samples=judge,
            points=points,
        )
        return Grid(found, offset, points)
    found = search_clip(
        target,
        scales,
        bits=entry.bits,
        kind=entry.series,
        block_size=entry.block_size,
        measure=settings.measure,
        hessian=hessian,
        samples=judge,
    )
    return Grid(storable(found, entry))


def _rounded(
    samples: NodeSamples,
    target: Array,
    grid: Grid,
    entry: NodePlan,
    settings: NodeSettings,
    *,
    damping: float,
) -> Series:
    granularity = entry.matrix_granularity()
    if settings.rounding == "nearest":
        return realize_partial(
            entry.series,
            target,
            grid.scales,
            Coverage(grid.points),
            bits=entry.bits,
            granularity=granularity,
        )
    rounded = round_second_order(
        grid.without_offset(target),
        grid.scales,
        _moments(samples, settings)[0],
        bits=entry.bits,
        kind=entry.series,
        block_size=entry.block_size,
        damping=damping,
        full_range=grid.offset is not None,
        points=grid.points,
    )
    series = restore(
        entry.series,
        rounded.terms,
        grid.scales,
        shape=target.shape,
        bits=entry.bits,
        granularity=granularity,
    )
    return replace(series, offset=grid.offset)


def _affine(samples: NodeSamples, numbers: Numbers, measure: Literal["mae", "mse"]) -> Numbers:
    """QPRep: γ goes into the scales, β into the bias."""
    gamma, beta = fit_affine(samples.fit.outputs(numbers), samples.fit.wanted, measure=measure)
    gamma, beta = keep_if_better(
        gamma, beta, samples.held.outputs(numbers), samples.held.wanted, measure=measure
    )
    return numbers.affine(gamma, beta)
