"""More terms for a series that is there, its own terms left as they are."""

from __future__ import annotations

import numpy as np

from onnxq.kernels_ref.checks import FloatArray
from onnxq.kernels_ref.fixed_ratio import scale_ratio
from onnxq.kernels_ref.granularity import spread
from onnxq.kernels_ref.quantize import half_range
from onnxq.kernels_ref.series import Series, expand, realize


def continue_series(series: Series, w: FloatArray, terms: int) -> Series:
    """A series of w with `terms` terms, of which the first are those of `series`, bit for bit.

    w: float32 or float64 of the series' shape, finite. Where `series` is the beginning of a longer
    fixed_ratio or digit series of w, the result is that series. Otherwise what its terms leave of w
    is a weight of its own: a fixed_ratio series, with scales from that residual's absmax, follows,
    and the whole is of kind joint, whose scales need not relate. With n new terms of X bits, then,
    |w - result| <= absmax(residual) / (2 h (2**X - 2)**(n - 1)), h = 2**(X-1) - 1, per scale.
    Returns `series` itself if it has as many terms. Raises ValueError for fewer terms than it has,
    or a w of another shape.
    """
    known = len(series)
    if terms < known:
        raise ValueError(f"terms is {terms}, but the series has {known}; truncate it instead")
    if terms == known:
        return series
    rest = series.residual(w)
    longer = _longer(series, w, rest, terms)
    if longer is not None:
        return longer
    last = series.terms[-1]
    more = expand(
        "fixed_ratio", rest, bits=last.bits, terms=terms - known, granularity=last.granularity
    )
    return Series((*series.terms, *more.terms), "joint")


def _longer(series: Series, w: FloatArray, rest: FloatArray, terms: int) -> Series | None:
    """The longer series of the same kind, if it begins with these very terms and reaches w.

    It does not where scales were chosen for clipping, or integers otherwise than to nearest.
    """
    last, known = series.terms[-1], len(series)
    if series.kind == "joint":
        return None
    ratio = scale_ratio(last.bits) if series.kind == "fixed_ratio" else 1 << last.bits
    dtype = last.scale.dtype.type
    scales = [term.scale for term in series.terms]
    while len(scales) < terms:
        scales.append(np.asarray(np.maximum(scales[-1] / dtype(ratio), np.finfo(dtype).tiny)))
    h = half_range(last.bits)
    lowest = -h if series.kind == "fixed_ratio" else -h - 1
    steps = [spread(scale, w.shape, last.granularity) for scale in scales[known:]]
    above, below = h * sum(steps) + steps[-1] / 2, lowest * sum(steps) - steps[-1] / 2
    if (rest > above).any() or (rest < below).any():
        return None
    try:
        longer = realize(series.kind, w, scales, bits=last.bits, granularity=last.granularity)
    except ValueError:  # digits as fine as that do not exist
        return None
    pairs = zip(series.terms, longer.terms, strict=False)
    return longer if all(np.array_equal(old.q, new.q) for old, new in pairs) else None
