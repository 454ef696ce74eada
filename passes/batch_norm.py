"""Reading a BatchNormalization node."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.fold import batch_norm_affine
from onnxq.model import values

Array = npt.NDArray[Any]


def in_training_mode(norm: gs.Node) -> bool:
    """Whether the node computes statistics of its input, or hands on running ones."""
    return bool(norm.attrs.get("training_mode", 0)) or len([o for o in norm.outputs if o.name]) > 1


def affine_of(norm: gs.Node) -> tuple[Array, Array]:
    """(factor, offset), float64 [channels], of a node whose parameters are constant.

    Raises:
        ValueError: a parameter is not finite, or variance + epsilon not positive.
    """
    gamma, beta, mean, variance = (values(t) for t in norm.inputs[1:5])
    return batch_norm_affine(gamma, beta, mean, variance, float(norm.attrs.get("epsilon", 1e-5)))
