"""Second moments as Hessians: checked, decomposed, and solved for the best target."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.moments import Float64Array

# Where the given damping does not do, it is raised from at least the first to at most the last.
FIRST_RAISE, LARGEST_DAMPING = 1e-6, 1e12


def least_squares_target(
    w: FloatArray,
    hessian: FloatArray,
    cross: FloatArray,
    damping: float = 0.01,
    *,
    extra: FloatArray | None = None,
) -> Float64Array:
    """The weights that reproduce W x from x̂ best: argmin Σ ‖W x - W' x̂‖² + λ ‖W' - W‖².

    w: [out, in]; hessian Σ x̂ x̂ᵀ and cross Σ x x̂ᵀ: [in, in], or [groups, in, in] with w's rows
    group after group; λ = damping * mean(diag(hessian)). Where the samples say nothing, w stays.
    extra: Σ d x̂ᵀ, [out, in], if W x + d is to be reproduced.
    Returns float64 [out, in]; w itself for a group whose moments are not finite.
    Raises ValueError for shapes that do not fit or a negative damping.
    """
    h = batched(hessian, w, "hessian")
    difference = batched(cross, w, "cross") - h
    check_damping(damping)
    target = w.astype(np.float64).reshape(len(h), -1, w.shape[1])
    more = np.zeros(w.shape) if extra is None else extra
    if more.shape != w.shape:
        raise ValueError(f"extra has shape {more.shape} and the weight {w.shape}; give one shape")
    more = more.astype(np.float64).reshape(target.shape)
    for group, one in enumerate(h):
        if not (np.isfinite(one).all() and np.isfinite(difference[group]).all()):
            continue
        wanted = difference[group].T @ target[group].T + more[group].T
        change = _solve(one, wanted, damping)
        if change is not None and np.isfinite(change).all():
            target[group] += change.T
    return target.reshape(w.shape)


def factor_all(
    h: Float64Array, damping: float, act_order: bool
) -> tuple[Float64Array, npt.NDArray[np.intp], Float64Array]:
    """(L / diag(L) of the damped, reordered Hessians, the order, the damping; inf where none did).

    The order is that of the columns' rounding from last to first.
    """
    groups, inputs, _ = h.shape
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    if act_order:
        order = np.argsort(diagonal, axis=1, kind="stable")
    else:
        order = np.tile(np.arange(inputs)[::-1], (groups, 1))
    factors: Float64Array = np.empty_like(h)
    used = np.empty(groups)
    for group, permutation in enumerate(order):
        one = h[group][np.ix_(permutation, permutation)]
        one /= _unit(one)
        factors[group], used[group] = _factor(one, damping)
    return factors, order, used


def _factor(h: Float64Array, damping: float) -> tuple[Float64Array, float]:
    """L / diag(L) of h + damping * I with the least damping that works; h is overwritten."""
    # Without a view on the diagonal, adding to it would need another matrix.
    diagonal = np.einsum("ii->i", h)
    undamped = diagonal.copy()
    # A pivot this small is a rounding error of the decomposition, and what it divides is noise.
    noise = len(h) * np.finfo(np.float64).eps
    while damping <= LARGEST_DAMPING:
        diagonal[:] = undamped + damping
        try:
            factor = np.asarray(np.linalg.cholesky(h), dtype=np.float64)
        except np.linalg.LinAlgError:
            factor = np.zeros((1, 1))
        pivots = np.diagonal(factor).copy()
        if pivots.min() ** 2 > noise * diagonal.max():
            factor /= pivots
            return factor, damping
        damping = max(10.0 * damping, FIRST_RAISE)
    return np.eye(len(h)), np.inf


def _solve(h: Float64Array, right: Float64Array, damping: float) -> Float64Array | None:
    unit = _unit(h)
    # Directions below this are rounding errors of the sums; undamped they would be blown up.
    damping = max(damping, len(h) * float(np.finfo(np.float64).eps))
    while damping <= LARGEST_DAMPING:
        damped = h / unit
        np.einsum("ii->i", damped)[:] += damping
        try:
            return np.asarray(np.linalg.solve(damped, right / unit))
        except np.linalg.LinAlgError:
            damping = max(10.0 * damping, FIRST_RAISE)
    return None


def _unit(h: Float64Array) -> float:
    """The mean of the diagonal, or 1 where there is nothing to scale by."""
    mean = float(np.mean(np.diagonal(h)))
    return mean if mean >= np.finfo(np.float64).tiny else 1.0


def batched(matrix: FloatArray, w: FloatArray, name: str) -> Float64Array:
    """A float64 copy [groups, in, in]; ValueError where it does not fit w [out, in]."""
    batch = matrix[np.newaxis] if matrix.ndim == 2 else matrix
    if w.ndim != 2 or batch.ndim != 3 or batch.shape[1:] != (w.shape[1],) * 2:
        raise ValueError(
            f"{name} has shape {matrix.shape} and the weight {w.shape}; give [out, in] and "
            f"[in, in] or [groups, in, in]"
        )
    if w.shape[0] % len(batch):
        raise ValueError(f"{w.shape[0]} output channels do not divide into {len(batch)} groups")
    return batch.astype(np.float64)


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping is finite and not negative."""
    if not (np.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping is {damping}; give a finite number >= 0, such as 0.01")
