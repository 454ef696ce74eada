"""The error measures of many samples, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.errors import _pair, _ratio, cosine, top1_agreement


class ErrorSums:
    """The measures over many samples, fed one after the other, without keeping the samples.

    `sqnr_db`, `mae`, `max_abs_error` and `relative_error` are those of all samples as one tensor;
    `cosine` is the mean over the calls of `add`; `top1_agreement` is the share of rows, for
    tensors [rows, classes], and None for others. Positions that are not finite in the reference
    are left out.
    """

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0
        self._absolute = 0.0
        self._largest = 0.0
        self._count = 0
        self._cosines: list[float] = []
        self._agreeing = 0
        self._rows = 0

    def add(self, reference: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        """Take in one sample or batch.

        Raises:
            ValueError: the shapes differ, or there is nothing to compare.
        """
        _pair(reference, actual)
        if reference.ndim == 2 and reference.shape[1] > 1:
            agreement = top1_agreement(reference, actual, axis=1)
            self._agreeing += round(agreement * len(reference))
            self._rows += len(reference)
        finite = np.isfinite(reference)
        if not finite.any():
            return
        r, difference = _pair(reference[finite], actual[finite])
        self._signal += float(np.sum(np.square(r)))
        self._noise += float(np.sum(np.square(difference)))
        self._absolute += float(np.sum(np.abs(difference)))
        self._largest = max(self._largest, float(np.max(np.abs(difference))))
        self._count += r.size
        self._cosines.append(cosine(reference[finite], actual[finite]))

    @property
    def relative_error(self) -> float:
        """‖actual - reference‖ / ‖reference‖."""
        return _ratio(float(np.sqrt(self._noise)), float(np.sqrt(self._signal)))

    @property
    def sqnr_db(self) -> float:
        """In dB; inf where nothing differs."""
        ratio = self.relative_error
        return float("inf") if ratio == 0.0 else -20.0 * float(np.log10(ratio))

    @property
    def mae(self) -> float:
        """In the units of the tensor."""
        return self._absolute / max(self._count, 1)

    @property
    def max_abs_error(self) -> float:
        """In the units of the tensor."""
        return self._largest

    @property
    def cosine(self) -> float:
        """Mean over the calls of `add`."""
        return float(np.mean(self._cosines)) if self._cosines else 1.0

    @property
    def top1_agreement(self) -> float | None:
        """Share of rows, 0 to 1."""
        return self._agreeing / self._rows if self._rows else None
