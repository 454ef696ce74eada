"""Single integers changed for as long as the output error falls.

Second-order rounding settles every weight once, and most rows can then still be made better by
moving single weights to a neighbouring level: greedy coordinate descent on eᵀHe, as in CDQuant
(arXiv 2406.17542), the change that lowers it most first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.hessian import batched, check_damping
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.quantize import half_range

# A row whose best change lowers its error by less than this share of it is done.
SMALLEST_GAIN = 1e-6


def descend(
    q: npt.NDArray[np.int8],
    steps: FloatArray,
    error: FloatArray,
    hessian: FloatArray,
    *,
    bits: int,
    damping: float = 0.01,
    changes: int | None = None,
    full_range: bool = False,
) -> npt.NDArray[np.int8]:
    """Integers whose error eᵀHe is less than, or equal to, that of q.

    q: int8 [out, in] within ±(2^(bits-1) - 1), with full_range from -2^(bits-1) on, one term of a
    series. steps: float [out, in], the scale of every integer. error: float [out, in], target -
    rounded with q. hessian: [in, in], or [groups, in, in] with the rows group after group; damping
    times the mean of its diagonal is added to it. changes: at most so many per row; an eighth of
    `in` if not given.
    Raises ValueError for shapes that do not fit or a negative damping. A group whose hessian is not
    finite keeps its integers.
    """
    if not q.shape == steps.shape == error.shape:
        raise ValueError(f"q, steps and error differ: {q.shape}, {steps.shape}, {error.shape}")
    check_damping(damping)
    h = batched(hessian, error, "hessian")
    rows, highest = len(q) // len(h), half_range(bits)
    lowest = -highest - full_range
    found: npt.NDArray[np.int8] = q.copy()
    for group, one in enumerate(h):
        if not np.isfinite(one).all():
            continue
        diagonal = np.einsum("ii->i", one)
        diagonal += damping * float(diagonal.mean())
        part = slice(group * rows, (group + 1) * rows)
        most = max(1, q.shape[1] // 8) if changes is None else changes
        _descend(
            found[part],
            steps[part].astype(np.float64),
            error[part],
            one,
            limits=(lowest, highest),
            changes=most,
        )
    return found


def _descend(
    q: npt.NDArray[np.int8],
    steps: Float64Array,
    error: FloatArray,
    h: Float64Array,
    *,
    limits: tuple[int, int],
    changes: int,
) -> None:
    """Change q of one group in place."""
    pull = error.astype(np.float64) @ h  # half the slope of eᵀHe
    cost = np.einsum("ri,ri->r", pull, error)
    price = np.square(steps) * np.diagonal(h)
    rows = np.arange(len(q))
    for _ in range(changes):
        # One level up or down, whichever the slope asks for.
        gain = 2 * np.abs(pull[rows]) * steps[rows] - price[rows]
        signs = np.sign(pull[rows])
        changed = q[rows] + signs
        gain[(changed < limits[0]) | (changed > limits[1])] = -np.inf
        best = gain.argmax(axis=1)
        gained = gain[np.arange(len(rows)), best]
        better = gained > SMALLEST_GAIN * cost[rows]
        rows, best, gained = rows[better], best[better], gained[better]
        if not len(rows):
            return
        sign = signs[better, best]
        q[rows, best] += sign.astype(np.int8)
        pull[rows] -= (sign * steps[rows, best])[:, np.newaxis] * h[best]
        cost[rows] -= gained
