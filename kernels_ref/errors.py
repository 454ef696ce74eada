"""How far a quantized tensor is from the float one.

All take (reference, actual) of one shape and any real dtype, accumulate in float64, and raise
ValueError where the shapes differ or there is nothing to compare. NaN in either gives NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


def sqnr_db(reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """Signal to quantization noise, 10 log10(Σ reference² / Σ (actual - reference)²), in dB.

    inf where the two are identical (also if both are zero); -inf for a zero reference otherwise.
    """
    r, difference = _pair(reference, actual)
    ratio = _ratio(_norm(difference), _norm(r))
    if ratio == 0.0:
        return float("inf")
    return -20.0 * float(np.log10(ratio))


def mae(reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """Mean of |actual - reference|, in the units of the tensor."""
    return float(np.mean(np.abs(_pair(reference, actual)[1])))


def max_abs_error(reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """Largest |actual - reference|, in the units of the tensor."""
    return float(np.max(np.abs(_pair(reference, actual)[1])))


def relative_error(reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """‖actual - reference‖ / ‖reference‖; 0 where identical, inf for a zero reference otherwise."""
    r, difference = _pair(reference, actual)
    return _ratio(_norm(difference), _norm(r))


def cosine(reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> float:
    """Cosine of the angle between the two as flat vectors, within [-1, 1].

    1 where both are zero, 0 where only one is: a zero vector points nowhere.
    """
    r, _ = _pair(reference, actual)
    a = np.asarray(actual, dtype=np.float64)
    r_unit, a_unit = _unit(r), _unit(a)
    if not r_unit.any() or not a_unit.any():
        return float(r_unit.any() == a_unit.any())
    return float(np.clip(np.vdot(r_unit, a_unit), -1.0, 1.0))


def top1_agreement(reference: npt.NDArray[Any], actual: npt.NDArray[Any], axis: int = -1) -> float:
    """Share of positions, 0 to 1, at which both have their (first) largest value along `axis`.

    Raises ValueError also where the tensors have no such axis.
    """
    r, _ = _pair(reference, actual)
    if not -r.ndim <= axis < r.ndim:
        raise ValueError(f"axis is {axis}, but the tensors have {r.ndim} axes")
    same = np.argmax(r, axis=axis) == np.argmax(np.asarray(actual), axis=axis)
    return float(np.mean(same))


def _pair(
    reference: npt.NDArray[Any], actual: npt.NDArray[Any]
) -> tuple[Float64Array, Float64Array]:
    """(reference, actual - reference) in float64."""
    r, a = np.asarray(reference), np.asarray(actual)
    if r.shape != a.shape:
        raise ValueError(f"reference has shape {r.shape}, actual {a.shape}; compare equal shapes")
    if r.size == 0:
        raise ValueError(f"the tensors have shape {r.shape} and no elements to compare")
    r64 = r.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as documented
        return r64, a.astype(np.float64) - r64


def _norm(values: Float64Array) -> float:
    """The Euclidean norm, also where the squares would overflow or underflow."""
    peak = float(np.max(np.abs(values)))
    if peak == 0.0 or not np.isfinite(peak):
        return peak
    return peak * float(np.sqrt(np.sum(np.square(values / peak))))


def _unit(values: Float64Array) -> Float64Array:
    norm = _norm(values)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, as documented
        return values / norm if norm else values


def _ratio(noise: float, signal: float) -> float:
    if noise == 0.0:
        return 0.0
    return noise / signal if signal else float("inf")
