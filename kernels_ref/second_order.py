"""Rounding that lets the weights not yet rounded make up for those already rounded.

The error of a node's output is eᵀHe per output channel, e = target - rounded and H the second
moments of its inputs. With H = L Lᵀ it is Σ_k (L_kk e_k + Σ_{j>k} L_jk e_j)²: taking the columns
from the last to the first, each is rounded at the value that makes its square zero. This is the
rounding of GPTQ (arXiv 2210.17323; optimal brain surgeon) in the form of LDLQ (arXiv 2307.13304,
which proves the two equal). It needs no inverse of H: faster and safer, for the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, IntArray, check_float
from onnxq.kernels_ref.digit import _float_at_most, _split, wide_dtype, wide_half_range
from onnxq.kernels_ref.granularity import PerAxis, PerBlock
from onnxq.kernels_ref.hessian import batched, check_damping, factor_all, least_squares_target
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.offset import offset_range
from onnxq.kernels_ref.partial import Coverage, realize_partial
from onnxq.kernels_ref.quantize import half_range
from onnxq.kernels_ref.series import SeriesKind

__all__ = ["Prepared", "Rounded", "least_squares_target", "round_second_order"]

Int8Terms = tuple[npt.NDArray[np.int8], ...]

# Columns whose feedback is applied one by one; that of all others comes as one matrix product.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Rounded:
    """The integers of a series, and how they came about.

    Attributes:
        terms: int8 [out, in] each, most significant first.
        damping: what was added to the Hessian's diagonal, as a share of its mean: the largest of
            all groups.
        plain_rows: output channels that kept plain rounding, as it was not worse for them.
        fallback: why some or all groups have been rounded plainly; None where none had to be.
    """

    terms: Int8Terms
    damping: float
    plain_rows: int
    fallback: str | None


def round_second_order(
    target: FloatArray,
    scales: Sequence[FloatArray],
    hessian: FloatArray,
    *,
    bits: int,
    kind: SeriesKind,
    block_size: int | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    full_range: bool = False,
    points: IntArray | None = None,
) -> Rounded:
    """Round target to a series with the given scales so that eᵀHe is small.

    target: float [out, in], finite. scales: one array per term, [out], or [out, blocks] with
    block_size. hessian: [in, in], or [groups, in, in] with the rows of target group after group
    (all groups of a depthwise convolution are worked on at once). Each column is rounded to the
    whole series: later terms take up what the first ones leave, and the other columns only the
    rest. act_order: the columns with the largest inputs first. damping: share of the mean
    diagonal added to it, raised tenfold until the Cholesky decomposition holds. full_range: use all
    2**bits integers, as a series with an offset does; the caller takes the offset off the target.
    points: int [out], how many of the terms each row has (partial.py); all of them if not given.

    A row keeps plain rounding (`realize`) where its eᵀHe, undamped, is not larger. Inputs that were
    always zero are rounded plainly; so is a group whose Hessian is not finite, with the reason.
    Raises ValueError as `realize`, and for shapes that do not fit or a negative damping.
    """
    return Prepared.of(target, hessian, damping, act_order).round(
        target,
        scales,
        bits=bits,
        kind=kind,
        block_size=block_size,
        full_range=full_range,
        points=points,
    )


@dataclass(frozen=True, eq=False)
class Prepared:
    """Hessians [groups, in, in] decomposed once, for any number of roundings."""

    h: Float64Array
    factors: Float64Array
    order: npt.NDArray[np.intp]
    used: Float64Array
    usable: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        target: FloatArray,
        hessian: FloatArray,
        damping: float = 0.01,
        act_order: bool = True,
    ) -> Prepared:
        """Check and decompose; arguments and errors as in `round_second_order`."""
        check_float(target, "target")
        h = batched(hessian, target, "hessian")
        check_damping(damping)
        usable = np.isfinite(h).all(axis=(1, 2))
        if not usable.all():
            h[~usable] = 0.0
        factors, order, used = factor_all(h, damping, act_order)
        return cls(h, factors, order, used, usable & np.isfinite(used))

    def round(
        self,
        target: FloatArray,
        scales: Sequence[FloatArray],
        *,
        bits: int,
        kind: SeriesKind,
        block_size: int | None = None,
        full_range: bool = False,
        points: IntArray | None = None,
    ) -> Rounded:
        """Round once; arguments and errors as in `round_second_order`.

        target may be another than the one of `of`, also with more rows in each group.
        """
        values = target.astype(np.float64)
        series = realize_partial(
            kind,
            values,
            scales,
            Coverage(points, offset=full_range),
            np.zeros(len(values)) if full_range else None,
            bits=bits,
            granularity=PerAxis(0) if block_size is None else PerBlock(1, block_size),
        )
        own = [term.scale for term in series.terms]
        rounder = _Rounder(
            own,
            kind,
            bits,
            block_size=block_size,
            groups=len(self.h),
            full_range=full_range,
            points=points,
        )
        terms, error = rounder.run(values, self.factors, self.order)
        plain_cost = _squared(values - series.dequantize(), self.h)
        plain = ~(_squared(error, self.h) < plain_cost)  # also where a cost is not a number
        pairs = zip(
            (term.q.astype(np.int8, copy=False) for term in series.terms), terms, strict=True
        )
        return Rounded(
            terms=tuple(np.where(plain[:, np.newaxis], near, fed) for near, fed in pairs),
            damping=float(np.max(self.used, initial=0.0, where=np.isfinite(self.used))),
            plain_rows=int(plain.sum()),
            fallback=_reason(self.usable, self.h),
        )


class _Rounder:
    """Rounds columns of all groups at once; works transposed, [groups, in, rows of a group]."""

    def __init__(
        self,
        scales: Sequence[FloatArray],
        kind: SeriesKind,
        bits: int,
        *,
        block_size: int | None,
        groups: int,
        full_range: bool,
        points: IntArray | None,
    ) -> None:
        self.bits, self.terms, self.block_size = bits, len(scales), block_size
        self.digits = kind == "digit"
        rows = len(scales[0])
        counts = np.full(rows, len(scales)) if points is None else np.asarray(points, np.intp)
        # A digit series is one wide integer until the end: one term with a larger range, which
        # ends with the row's own last digit.
        self.shift = bits * (len(scales) - counts)[:, np.newaxis]
        self.dtype = wide_dtype(bits, len(scales)) if self.digits else np.dtype(np.int8)
        if self.digits:
            steps = [np.stack(scales)[counts - 1, np.arange(rows)]]
            limits = [_limits(bits, n, full_range) for n in range(1, len(scales) + 1)]
            self.limits = [np.array(limits)[counts - 1].T]
        else:
            steps, h = list(scales), half_range(bits)
            # what a row does not have is 0
            self.limits = [np.outer((-h - full_range, h), counts > i) for i in range(len(scales))]
        # [groups, blocks, rows]; one block where scales are per channel
        self.scales = [s.reshape(groups, rows // groups, -1).swapaxes(1, 2) for s in steps]
        self.limits = [pair.reshape(2, groups, -1).astype(np.float64) for pair in self.limits]

    def run(
        self, target: Float64Array, factors: Float64Array, order: npt.NDArray[np.intp]
    ) -> tuple[Int8Terms, Float64Array]:
        """The terms and target - rounded, both [out, in] in the order of target."""
        groups, inputs = order.shape
        by_group = target.reshape(groups, -1, inputs).swapaxes(1, 2)
        t = np.take_along_axis(by_group, order[:, :, np.newaxis], axis=1)
        error: Float64Array = np.empty_like(t)
        levels = [np.empty(t.shape, dtype=self.dtype) for _ in self.scales]
        for stop in range(inputs, 0, -BLOCK):
            start = max(0, stop - BLOCK)
            block = t[:, start:stop].copy()
            if stop < inputs:
                later = factors[:, stop:, start:stop].transpose(0, 2, 1)
                block += np.matmul(later, error[:, stop:])
            near = np.ascontiguousarray(factors[:, start:stop, start:stop].transpose(0, 2, 1))
            for k in reversed(range(start, stop)):
                value, i = block[:, k - start], k - start
                if k + 1 < stop:
                    value += np.matmul(near[:, i : i + 1, i + 1 :], error[:, k + 1 : stop])[:, 0]
                rest = self._peel(value, order[:, k], [level[:, k] for level in levels])
                # t - rounded, with rounded = value - rest
                error[:, k] = t[:, k] - value + rest
        restored = [_restored(level, order, target.shape) for level in levels]
        parts = (
            _split(restored[0] << self.shift.astype(self.dtype), self.bits, self.terms)
            if self.digits
            else restored
        )
        terms = tuple(part.astype(np.int8) for part in parts)
        return terms, np.asarray(_restored(error, order, target.shape))

    def _peel(
        self,
        value: Float64Array,
        columns: npt.NDArray[np.intp],
        targets: list[npt.NDArray[np.int8]],
    ) -> Float64Array:
        """Write the integers of one column per group, value [groups, rows]; return what is left."""
        blocks = columns // self.block_size if self.block_size else np.zeros_like(columns)
        rest: Float64Array = value.copy()
        for steps, target, limits in zip(self.scales, targets, self.limits, strict=True):
            scale = steps[np.arange(len(blocks)), blocks]
            level = np.rint(rest / scale)
            level.clip(*limits, out=level)
            target[...] = level
            level *= scale
            rest -= level
        return rest


def _limits(bits: int, terms: int, full_range: bool) -> tuple[float, float]:
    """The (lowest, highest) wide integer of so many digits."""
    highest = float(_float_at_most(wide_half_range(bits, terms), np.dtype(np.float64)))
    return (float(offset_range(bits, terms)[0]) if full_range else -highest), highest


def _squared(error: Float64Array, h: Float64Array) -> Float64Array:
    """The error eᵀHe per row; error [out, in], h [groups, in, in]."""
    split = error.reshape(len(h), -1, error.shape[1])
    return np.asarray(np.einsum("gri,gri->gr", np.matmul(split, h), split).reshape(-1))


def _restored(
    values: npt.NDArray[Any], order: npt.NDArray[np.intp], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """An array [groups, in, rows] in the given order, as [out, in] in the natural one."""
    result = np.empty_like(values)
    np.put_along_axis(result, order[:, :, np.newaxis], values, axis=1)
    return np.asarray(np.ascontiguousarray(result.swapaxes(1, 2)).reshape(shape))


def _reason(usable: npt.NDArray[np.bool_], h: Float64Array) -> str | None:
    if not usable.all():
        count = int((~usable).sum())
        return (
            f"the second moments of the inputs are not finite or not positive definite "
            f"in {count} of {len(usable)} groups; these were rounded to nearest"
        )
    if not h.any():
        return "all inputs were zero in the samples; rounded to nearest"
    return None
