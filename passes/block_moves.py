"""What is tried on one node when the end of its block is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref import fit_affine
from onnxq.model import is_constant, values
from onnxq.passes.node_samples import Numbers

Array = npt.NDArray[Any]
Move = Callable[[Numbers], Numbers]

# All scales of a node at once.
FACTORS = (1.01, 0.99, 1.03, 0.97)
AFFINE_ROWS = 16384


def moves(channels: tuple[Array, Array] | None, own: Array | float) -> Iterator[Move]:
    """The candidates for one node.

    Args:
        own: the node's own bias, [out] or 0; it is no part of the numbers.
        channels: (found, wanted), float [n, out], at the end of the block, if its channels may be
            those of the node: then its affine is fitted there, too.
    """
    if channels is not None:
        step = -(-len(channels[0]) // AFFINE_ROWS)
        found, wanted = (rows[::step] for rows in channels)
        if np.isfinite(found).all() and np.isfinite(wanted).all():
            gamma, beta = fit_affine(found, wanted, measure="mse")
            shift = np.mean(wanted - found, axis=0, dtype=np.float64)
            yield partial(Numbers.affine, gamma=gamma, beta=beta + (gamma - 1) * own)
            yield partial(Numbers.affine, gamma=np.ones_like(shift), beta=shift)
    for factor in FACTORS:
        yield partial(Numbers.affine, gamma=np.float64(factor), beta=(factor - 1) * own)


def own_bias(node: gs.Node) -> Array | float:
    """The bias that a Conv has of its own, [out], or 0."""
    if node.op == "Conv" and len(node.inputs) > 2 and is_constant(node.inputs[2]):
        return np.asarray(values(node.inputs[2]), np.float64)
    return 0.0
