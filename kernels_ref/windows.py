"""The sliding windows that all convolutions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ConvGeometry:
    """The attributes of an ONNX Conv, complete and checked against its inputs."""

    pads: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    group: int

    @classmethod
    def check(
        cls,
        x: npt.NDArray[Any],
        w: npt.NDArray[Any],
        *,
        pads: Sequence[int] | None,
        strides: Sequence[int] | None,
        dilations: Sequence[int] | None,
        group: int,
    ) -> ConvGeometry:
        """Fill in the defaults; ValueError where shapes and attributes do not fit together."""
        if x.ndim != w.ndim or not 3 <= x.ndim <= 5:
            raise ValueError(
                f"x has shape {x.shape} and w {w.shape}; give [N, C, *space] and "
                f"[M, C/group, *kernel] with the same 1 to 3 space axes"
            )
        if group < 1 or w.shape[0] % group or x.shape[1] != w.shape[1] * group:
            raise ValueError(
                f"group {group} does not fit x of shape {x.shape} and w of shape {w.shape}; "
                f"it must divide M, and C must be group times w.shape[1]"
            )
        rank = x.ndim - 2
        flat = _attribute(pads, 2 * rank, 0, "pads", at_least=0)
        result = cls(
            pads=tuple(zip(flat[:rank], flat[rank:], strict=True)),
            strides=_attribute(strides, rank, 1, "strides", at_least=1),
            dilations=_attribute(dilations, rank, 1, "dilations", at_least=1),
            group=group,
        )
        result._check_extent(x.shape[2:], w.shape[2:])
        return result

    def spans(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """How many elements a dilated kernel covers along each space axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True))

    def _check_extent(self, space: tuple[int, ...], kernel: tuple[int, ...]) -> None:
        padded = tuple(n + sum(p) for n, p in zip(space, self.pads, strict=True))
        if any(span > n for span, n in zip(self.spans(kernel), padded, strict=True)):
            raise ValueError(
                f"the dilated kernel covers {self.spans(kernel)}, but the padded input is only "
                f"{padded}; pad more or use a smaller kernel"
            )


def convolve(x: npt.NDArray[Any], w: npt.NDArray[Any], geometry: ConvGeometry) -> npt.NDArray[Any]:
    """The convolution of zero-padded x [N, C, *space] with w [M, C/group, *kernel] -> [N, M, *out].

    One matrix product per group over the unrolled windows, in the dtype of x and w.
    """
    group = geometry.group
    windows = _windows(x, w.shape[2:], geometry)  # [N, C, *out, *kernel]
    rank = w.ndim - 2
    batch, channels, *out = windows.shape[: 2 + rank]
    split = windows.reshape(batch, group, channels // group, *windows.shape[2:])
    # -> [N, group, *out, C/group, *kernel], the last axes in the order of w's
    order = (0, 1, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    columns = split.transpose(order).reshape(batch, group, int(np.prod(out)), -1)
    kernels = w.reshape(group, w.shape[0] // group, -1).transpose(0, 2, 1)
    y = np.matmul(columns, kernels)  # [N, group, prod(out), M/group]
    return np.ascontiguousarray(y.transpose(0, 1, 3, 2)).reshape(batch, w.shape[0], *out)


def _windows(
    x: npt.NDArray[Any], kernel: tuple[int, ...], geometry: ConvGeometry
) -> npt.NDArray[Any]:
    rank = len(kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *geometry.pads])
    axes = tuple(range(2, 2 + rank))
    view = np.lib.stride_tricks.sliding_window_view(padded, geometry.spans(kernel), axis=axes)
    steps = (*geometry.strides, *geometry.dilations)
    steps = geometry.strides + geometry.dilations
    # tuple(...), as a starred subscript is not Python 3.10.
    every = tuple(slice(None, None, step) for step in steps)
    return view[(slice(None), slice(None)) + every]  # noqa: RUF005


def _attribute(
    values: Sequence[int] | None, count: int, default: int, name: str, *, at_least: int
) -> tuple[int, ...]:
    if values is None:
        return (default,) * count
    result = tuple(int(v) for v in values)
    if len(result) != count or min(result) < at_least:
        raise ValueError(f"{name} is {list(result)}; give {count} whole numbers >= {at_least}")
    return result
