"""The second moments of a node's inputs, summed over calibration samples in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import AnyArray, FloatArray, check_float
from onnxq.kernels_ref.windows import ConvGeometry, _windows

Float64Array = npt.NDArray[np.float64]

# Samples are multiplied in pieces: of this many elements (16 MiB in float32), of so few rows that
# the rounding errors of a float32 sum stay at 1e-6 of it.
PIECE_ELEMENTS, PIECE_ROWS = 1 << 22, 8192


class InputMoments:
    """Σ x̂ x̂ᵀ and Σ x x̂ᵀ of a node, x̂ being its inputs after quantized nodes and x the float ones.

    A grouped convolution has one set per group; everything else has groups = 1. Memory is that of
    the moments, 8 * groups * inputs**2 bytes each, whatever the number of samples.

    Products are of the inputs' dtype and of at most PIECE_ROWS rows, about a point near the mean:
    float32 takes half the time, and a mean that is large beside the spread costs no digits. Sums
    are float64.

    Attributes:
        count: rows taken in per group.
    """

    def __init__(self, groups: int, inputs: int) -> None:
        if groups < 1 or inputs < 1:
            raise ValueError(f"groups is {groups} and inputs {inputs}; both must be at least 1")
        self.count = 0
        self._products: Float64Array = np.zeros((groups, inputs, inputs))
        # None as long as x and x̂ have been the same: then they are those of x̂.
        self._cross: Float64Array | None = None
        # Everything is summed about this point, float64 [groups, inputs]; None before there is one.
        self._point: Float64Array | None = None
        self._sum_hat: Float64Array = np.zeros((groups, inputs))
        self._sum: Float64Array = np.zeros((groups, inputs))

    @property
    def hessian(self) -> Float64Array:
        """Float64 [groups, inputs, inputs], Σ x̂ x̂ᵀ: a sum, not a mean. A new array."""
        return self._about_zero(self._products, self._sum_hat)

    @property
    def cross(self) -> Float64Array:
        """Float64 [groups, inputs, inputs], Σ x x̂ᵀ; equal to the Hessian where x was always x̂."""
        products = self._products if self._cross is None else self._cross
        return self._about_zero(products, self._sum)

    @property
    def mean_hat(self) -> Float64Array:
        """Mean of x̂, float64 [groups, inputs]; 0 before the first sample."""
        return self._mean(self._sum_hat)

    @property
    def mean(self) -> Float64Array:
        """Mean of x, float64 [groups, inputs]; 0 before the first sample."""
        return self._mean(self._sum)

    def add(self, x_hat: FloatArray, x: FloatArray) -> None:
        """Take in n rows: float32 or float64 [groups, n, inputs], or [n, inputs] for one group.

        Give the same object twice where there is nothing quantized before the node: the second
        product is then left out. NaN and infinity are taken in and show in the moments.
        Raises ValueError for another shape or dtype.
        """
        same = x is x_hat
        x_hat = self._checked(x_hat, "x_hat")
        x = x_hat if same else self._checked(x, "x")
        if x.shape != x_hat.shape:
            raise ValueError(f"x has shape {x.shape}, but x_hat {x_hat.shape}; they must agree")
        if not same and self._cross is None:
            self._cross = self._products.copy()
        groups, rows, inputs = x_hat.shape
        step = max(1, min(PIECE_ROWS, PIECE_ELEMENTS // (groups * inputs)))
        if self._point is None and rows:
            self._point = x_hat[:, :step].mean(axis=1).astype(np.float64)
        for start in range(0, rows, step):
            hat = self._shifted(x_hat[:, start : start + step])
            self._add_piece(hat, hat if same else self._shifted(x[:, start : start + step]))
        self.count += rows

    def centred(self) -> tuple[Float64Array, Float64Array]:
        """(hessian, cross) about the means: what counts where the bias is fitted afterwards.

        Two new arrays, or one twice.
        """
        mean = self._sum_hat / max(self.count, 1)
        hessian = self._products - _outer(self._sum_hat, mean)
        if self._cross is None:
            return hessian, hessian
        return hessian, self._cross - _outer(self._sum, mean)

    def about(self, point: Float64Array) -> Float64Array:
        """The hessian about a point [groups, inputs]: what counts where a bias was fitted there."""
        if self._point is None:
            return np.array(self._products)
        rest = np.asarray(point, np.float64) - self._point
        shift = _outer(self._sum_hat - self.count * rest, rest)
        return np.asarray(self._products - _outer(rest, self._sum_hat) - shift)

    def bias_shift(self, w: FloatArray, w_hat: FloatArray) -> Float64Array:
        """W·mean(x) - Ŵ·mean(x̂): added to the bias, it makes the mean output right.

        w, w_hat: [out, inputs], rows group after group; returns float64 [out].
        """
        groups, inputs = self._sum.shape
        split = (groups, -1, inputs)
        wanted = np.matmul(w.reshape(split).astype(np.float64), self.mean[:, :, np.newaxis])
        actual = np.matmul(w_hat.reshape(split).astype(np.float64), self.mean_hat[:, :, np.newaxis])
        return np.asarray((wanted - actual).reshape(-1))

    def _checked(self, x: FloatArray, name: str) -> FloatArray:
        check_float(x, name)
        groups, inputs = self._sum.shape
        if x.ndim == 2 and groups == 1:
            x = x[np.newaxis]
        if x.ndim != 3 or x.shape[::2] != (groups, inputs):
            raise ValueError(f"{name} has shape {x.shape}; give [{groups}, n, {inputs}]")
        return x

    def _add_piece(self, hat: FloatArray, other: FloatArray) -> None:
        if self._cross is not None:
            self._cross += np.matmul(other.transpose(0, 2, 1), hat)
        # numpy takes half the time for a product of an array with its own transpose.
        self._products += np.matmul(hat.transpose(0, 2, 1), hat)
        self._sum_hat += hat.sum(axis=1, dtype=np.float64)
        self._sum += other.sum(axis=1, dtype=np.float64)

    def _shifted(self, x: FloatArray) -> FloatArray:
        assert self._point is not None
        return np.asarray(x - self._point[:, np.newaxis].astype(x.dtype))

    def _mean(self, total: Float64Array) -> Float64Array:
        return np.asarray(total / max(self.count, 1) + (0 if self._point is None else self._point))

    def _about_zero(self, products: Float64Array, total: Float64Array) -> Float64Array:
        """Σ a bᵀ of what was summed about the point, a with the sum `total`, b being x̂."""
        if self._point is None:
            return np.array(products)
        rest = total + self.count * self._point
        return np.asarray(products + _outer(self._point, self._sum_hat) + _outer(rest, self._point))


def conv_patches(
    x: FloatArray,
    kernel_shape: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
    limit: int | None = None,
    rng: np.random.Generator | None = None,
) -> AnyArray:
    """The windows a Conv multiplies with its weight, as the rows of a matrix per group.

    x: [N, C, *space], 1 to 3 space axes, padded with zeros; attributes as in ONNX Conv. Returns
    [groups, positions, C/groups * prod(kernel_shape)] of x's dtype, columns in the order of
    `w.reshape(M, -1)`. limit: at most so many positions, drawn without repetition by `rng`
    (default: a generator seeded with 0), in their own order; generators in the same state draw
    the same positions. Raises ValueError for attributes that do not fit.
    """
    shape = (groups, x.shape[1] // max(groups, 1), *kernel_shape)
    geometry = ConvGeometry.check(
        x,
        np.broadcast_to(x.dtype.type(0), shape),
        pads=pads,
        strides=strides,
        dilations=dilations,
        group=groups,
    )
    # [N, C, *out, *kernel] -> [N, *out, C, *kernel], still a view
    windows = np.moveaxis(_windows(x, tuple(kernel_shape), geometry), 1, x.ndim - 1)
    places, inner = windows.shape[: x.ndim - 1], windows.shape[x.ndim - 1 :]
    total = int(np.prod(places))
    if limit is not None and limit < total:
        if limit < 1:
            raise ValueError(f"limit is {limit}; give at least 1 position, or None for all")
        draw = np.random.default_rng(0) if rng is None else rng
        chosen = np.sort(draw.choice(total, size=limit, replace=False))
        rows = windows[np.unravel_index(chosen, places)]
    else:
        rows = windows.reshape(total, *inner)
    split = rows.reshape(len(rows), groups, -1).transpose(1, 0, 2)
    return np.ascontiguousarray(split)


def _outer(a: Float64Array, b: Float64Array) -> Float64Array:
    return np.asarray(a[:, :, np.newaxis] * b[:, np.newaxis, :])
