"""One memory layout for every granularity: rows of elements that share a scale, in cached tiles.

The searches read each weight dozens of times. A tile of 128 KiB (float32) and its two work
buffers stay in a core's second-level cache, which is worth a factor of five over whole-array
passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerTensor,
    positive_axis,
    scale_shape,
)

TILE_ELEMENTS = 1 << 15
# Below this length numpy spends more on starting each row's inner loop than on its elements.
SHORT_ROW = 256


def as_rows(x: npt.NDArray[Any], granularity: Granularity) -> npt.NDArray[Any]:
    """View x as a matrix [scales, elements per scale], copied only where it must be.

    Blocks that do not divide the axis are padded with zeros, which change neither a range that
    includes zero nor a squared error.
    """
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    axis = positive_axis(granularity.axis, x.ndim)
    if isinstance(granularity, PerAxis):
        return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    moved = np.moveaxis(x, axis, -1)
    padding = -x.shape[axis] % _block_length(x.shape[axis], granularity)
    if padding:
        moved = np.pad(moved, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return moved.reshape(-1, _block_length(x.shape[axis], granularity))


def from_rows(
    rows: npt.NDArray[Any], shape: tuple[int, ...], granularity: Granularity
) -> npt.NDArray[Any]:
    """The inverse of `as_rows`: a C-contiguous array of `shape`."""
    if isinstance(granularity, PerTensor):
        return rows.reshape(shape)
    axis = positive_axis(granularity.axis, len(shape))
    others = shape[:axis] + shape[axis + 1 :]
    if isinstance(granularity, PerAxis):
        return np.ascontiguousarray(np.moveaxis(rows.reshape(shape[axis], *others), 0, axis))
    padded = rows.reshape(*others, -1)[..., : shape[axis]]
    return np.ascontiguousarray(np.moveaxis(padded, -1, axis))


def as_row_params(param: npt.NDArray[Any], granularity: Granularity) -> npt.NDArray[Any]:
    """A scale array flattened to one value per row of `as_rows`."""
    if isinstance(granularity, PerBlock):
        param = np.moveaxis(param, positive_axis(granularity.axis, param.ndim), -1)
    return param.reshape(-1)


def from_row_params(
    flat: npt.NDArray[Any], shape: tuple[int, ...], granularity: Granularity
) -> npt.NDArray[Any]:
    """The inverse of `as_row_params`: an array of the `scale_shape` of a tensor of `shape`."""
    expected = scale_shape(shape, granularity)
    if not isinstance(granularity, PerBlock):
        return flat.reshape(expected)
    axis = positive_axis(granularity.axis, len(shape))
    others = expected[:axis] + expected[axis + 1 :]
    moved = flat.reshape(*others, expected[axis])
    return np.ascontiguousarray(np.moveaxis(moved, -1, axis))


@dataclass(frozen=True)
class Tile:
    """A piece of a row matrix small enough to stay in cache.

    Short rows are worked on transposed, [elements, rows], so that numpy's inner loop runs over
    many rows.
    """

    rows: slice
    cols: slice
    transposed: bool

    @property
    def element_axis(self) -> int:
        """The axis of a loaded tile along which the elements of one row lie."""
        return 0 if self.transposed else 1

    def load(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A contiguous copy of the tile, ready to be changed in place."""
        piece = matrix[self.rows, self.cols]
        return np.array(piece.T if self.transposed else piece, order="C")

    def store(self, values: npt.NDArray[Any], matrix: npt.NDArray[Any]) -> None:
        """Write a tile of whole numbers back, cast to the matrix's integer type."""
        if self.transposed:
            # Cast first: transposing one byte per element is cheaper than transposing four.
            values = values.astype(matrix.dtype).T
        np.copyto(matrix[self.rows, self.cols], values, casting="unsafe")

    def params(self, per_row: FloatArray) -> FloatArray:
        """One value per row of the matrix, broadcastable against the loaded tile."""
        mine = per_row[self.rows]
        return mine[np.newaxis, :] if self.transposed else mine[:, np.newaxis]


def row_groups(rows: int, length: int) -> Iterator[slice]:
    """Slices of rows that together fill about one tile (a single row where it is longer)."""
    step = max(1, TILE_ELEMENTS // length)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def tiles_of(group: slice, length: int) -> Iterator[Tile]:
    """The tiles of one row group: one, or several along a row longer than a tile."""
    for start in range(0, length, TILE_ELEMENTS):
        stop = min(start + TILE_ELEMENTS, length)
        yield Tile(group, slice(start, stop), transposed=length < SHORT_ROW)


def tiles(matrix: npt.NDArray[Any]) -> Iterator[Tile]:
    """Tiles that cover a row matrix, each element once, in the order they lie in memory."""
    rows, length = matrix.shape
    if matrix.strides[0] < matrix.strides[1]:
        # The view of a [K, N] weight with one scale per column: take runs of its own rows.
        for group in row_groups(rows, 1):
            step = max(1, TILE_ELEMENTS // (group.stop - group.start))
            for start in range(0, length, step):
                yield Tile(group, slice(start, min(start + step, length)), transposed=True)
        return
    for group in row_groups(rows, length):
        yield from tiles_of(group, length)


def _block_length(length: int, granularity: PerBlock) -> int:
    """The stored block length: a block longer than the axis is not padded up to its size."""
    return min(granularity.block_size, length)
