"""The centre tap of a kernel as a 1×1 convolution of its own (the split of CFWS)."""

from __future__ import annotations

from onnxq.kernels_ref.checks import FloatArray, check_float


def split_centre(w: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Split w into (centre [out, in, 1, 1], rest), rest being w with zeros at its centre.

    w: float32 or float64 [out, in, kh, kw], kh and kw odd; both parts have its dtype, and the
    centre put back gives w exactly. In a kernel folded from branches the centre tap carries the
    1×1 and identity branches and is far larger than the rest: apart, each has its own scale.
    Raises ValueError for another rank or dtype, an even kernel, or one of a single tap.
    """
    check_float(w, "w")
    if w.ndim != 4 or not (w.shape[2] % 2 and w.shape[3] % 2) or w.shape[2:] == (1, 1):
        raise ValueError(
            f"w has shape {w.shape}; give [out, in, kh, kw] with odd kh and kw, not both 1"
        )
    y, x = w.shape[2] // 2, w.shape[3] // 2
    centre = w[:, :, y : y + 1, x : x + 1].copy()
    rest = w.copy()
    rest[:, :, y, x] = 0
    return centre, rest
