"""Folding of affine maps into weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def batch_norm_affine(
    gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float
) -> tuple[Array, Array]:
    """The per-channel affine that a BatchNormalization in inference mode is: y = a·x + c.

    Args:
        gamma, beta, mean, variance: [channels] each.
        epsilon: as in the ONNX operator.

    Returns:
        (a, c), float64 [channels]: a = gamma / sqrt(variance + epsilon), c = beta - mean·a.

    Raises:
        ValueError: variance + epsilon is not positive, or a parameter is NaN or infinite.
    """
    g, b, m, v = (np.asarray(array, np.float64) for array in (gamma, beta, mean, variance))
    if not all(np.isfinite(array).all() for array in (g, b, m, v)):
        raise ValueError("a parameter of the batch norm is NaN or infinite")
    if not np.all(v + epsilon > 0):
        raise ValueError("variance + epsilon of the batch norm is not positive")
    factor = g / np.sqrt(v + epsilon)
    return factor, b - m * factor


def fold_output_affine(
    weight: Array, bias: Array | None, factor: Array, offset: Array, *, axis: int
) -> tuple[Array, Array]:
    """Weight and bias of `factor · (weight ∗ x + bias) + offset`.

    Args:
        weight: any shape, output channels along `axis`.
        bias: [out] or None for zero.
        factor, offset: [out].

    Returns:
        (weight', bias') in the dtype of `weight`, computed in float64.

    Raises:
        ValueError: the channel counts differ.
    """
    out = weight.shape[axis]
    if factor.shape != (out,) or offset.shape != (out,):
        raise ValueError(
            f"affine has {factor.shape} and {offset.shape} entries, the weight {out} output "
            f"channels (axis {axis} of {weight.shape}): give one per output channel"
        )
    shape = [1] * weight.ndim
    shape[axis] = out
    scaled = weight.astype(np.float64) * factor.reshape(shape)
    shifted = offset if bias is None else np.asarray(bias, np.float64) * factor + offset
    return scaled.astype(weight.dtype), shifted.astype(weight.dtype)
