"""Errors of a model's outputs over samples, each with how much it varies from sample to sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from onnxq.kernels_ref import cosine

Array = npt.NDArray[Any]

_TINY = 1e-300
_SUMS_TO_ONE = 1e-3
_FAINT = 1e-6  # probabilities below it are all alike
RUNNERS_UP = 4  # classes that may overtake the first


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Estimate(_Value):
    """A mean over samples, and its standard error (0 where there is one sample only)."""

    value: float
    spread: float = 0.0

    def upper(self, deviations: float) -> float:
        """The value, so many standard errors above."""
        return self.value + deviations * self.spread


class Measured(_Value):
    """How far outputs are from the float model's; each is that of the worst output.

    `energy` is Σ(difference²) / Σ(float²), `mae` Σ|difference| / Σ|float|, `angle` 1 − cosine,
    averaged over samples. For models whose first output is [samples, classes], `disagreement` is
    the share of samples with another class, and `top1` by how much the accuracy falls, both 0 to 1.

    With labels, `top1` is counted. Without, it is expected: the float model's own probabilities
    stand for labels (a change from a class of 0.5 to one of 0.4 costs 0.1), and each class close
    behind the first overtakes it with the probability that normal noise of the size that
    quantization puts on these differences makes up for its margin. That needs far fewer samples
    than counting: half a point is one in 200. Where outputs are neither logits nor probabilities,
    a changed class costs 1.
    """

    samples: int
    energy: Estimate
    mae: Estimate
    angle: Estimate
    top1: Estimate | None = None
    disagreement: Estimate | None = None

    @property
    def relative_error(self) -> float:
        """‖difference‖ / ‖float‖."""
        return float(np.sqrt(self.energy.value))

    @property
    def sqnr_db(self) -> float:
        """In dB; inf where nothing differs."""
        value = self.energy.value
        return float("inf") if value == 0 else -10.0 * float(np.log10(value))


class _Ratio:
    """Σ numerators / Σ denominators over samples."""

    def __init__(self) -> None:
        self._parts: list[tuple[float, float]] = []

    def add(self, numerator: float, denominator: float) -> None:
        self._parts.append((numerator, denominator))

    def estimate(self) -> Estimate:
        """The ratio, and its standard error by the delta method."""
        numerators, denominators = np.array(self._parts, np.float64).T
        total = float(denominators.sum())
        if not np.isfinite(numerators).all():
            return Estimate(value=float("inf"))
        if total <= _TINY:
            return Estimate(value=float("inf") if numerators.any() else 0.0)
        value = float(numerators.sum()) / total
        count = len(numerators)
        if count == 1:
            return Estimate(value=value)
        rest = numerators - value * denominators
        return Estimate(
            value=value,
            spread=float(np.sqrt(np.sum(rest**2) * count / (count - 1))) / total,
        )


class Meter:
    """Takes in the outputs of both models, sample by sample."""

    def __init__(self) -> None:
        self._feeds = 0
        self._outputs: dict[int, tuple[_Ratio, _Ratio, _Ratio]] = {}
        self._top1 = _Ratio()
        self._changed = _Ratio()
        self._classifies = False
        self._runners: list[_Runners | None] = []

    def add(self, wanted: Sequence[Any], got: Sequence[Any], label: Array | None = None) -> None:
        """One run: outputs of the float and of the quantized model, and classes [samples]."""
        self._feeds += 1
        for i, (w, g) in enumerate(zip(wanted, got, strict=True)):
            if is_error_output(w):
                self._add_output(i, w, np.asarray(g))
        first = wanted[0] if wanted else None
        if isinstance(first, np.ndarray) and is_classifier(first):
            self._classifies = True
            self._add_classes(first, np.asarray(got[0]), label)

    def _add_output(self, index: int, wanted: Array, got: Array) -> None:
        finite = np.isfinite(wanted)
        w = wanted[finite].astype(np.float64)
        g = got[finite].astype(np.float64)
        if not w.size:
            return
        energy, mae, angle = self._outputs.setdefault(index, (_Ratio(), _Ratio(), _Ratio()))
        if not np.isfinite(g).all():
            for ratio in (energy, mae, angle):
                ratio.add(float("inf"), 1.0)
            return
        difference = g - w
        energy.add(float(difference @ difference), float(w @ w))
        mae.add(float(np.sum(np.abs(difference))), float(np.sum(np.abs(w))))
        angle.add(1.0 - cosine(w, g), 1.0)

    def _add_classes(self, wanted: Array, got: Array, label: Array | None) -> None:
        own, other = np.argmax(wanted, axis=1), np.argmax(got, axis=1)
        self._changed.add(float(np.sum(own != other)), len(wanted))
        if label is not None:
            self._top1.add(float(np.sum(own == label)) - float(np.sum(other == label)), len(wanted))
        else:
            self._runners.append(_Runners.of(wanted, got))

    def measured(self) -> Measured:
        """What was found so far; at least one output must have been added."""
        columns = [
            [r.estimate() for r in ratios] for ratios in zip(*self._outputs.values(), strict=True)
        ]
        energy, mae, angle = (max(c, key=lambda e: e.value) for c in columns)
        return Measured(
            samples=self._feeds,
            energy=energy,
            mae=mae,
            angle=angle,
            top1=self._top1_estimate() if self._classifies else None,
            disagreement=self._changed.estimate() if self._classifies else None,
        )

    def _top1_estimate(self) -> Estimate:
        """Counted with labels, else expected."""
        from scipy.special import ndtr  # noqa: PLC0415 - slow to import, for every command

        if not self._runners:
            return self._top1.estimate()
        if any(part is None for part in self._runners):
            return self._changed.estimate()
        parts = [part for part in self._runners if part is not None]
        differences = np.concatenate([part.differences for part in parts])
        if not np.isfinite(differences).all():
            return Estimate(value=float("inf"))
        deviation = max(float(np.sqrt(np.mean(np.square(differences)))), _TINY)
        expected = _Ratio()
        for part in parts:
            likely = ndtr(-part.margins / deviation)
            cost = np.minimum(np.sum(likely * part.gaps, axis=1), part.gaps.max(axis=1))
            expected.add(float(cost.sum()), len(cost))
        return expected.estimate()


class _Runners(NamedTuple):
    """The classes that come after the first, float64 [samples, RUNNERS_UP] each.

    Attributes:
        margins: how far their logits lie below the first class's.
        differences: what quantization adds to these margins.
        gaps: how much less likely they are.
    """

    margins: Array
    differences: Array
    gaps: Array

    @classmethod
    def of(cls, wanted: Array, got: Array) -> _Runners | None:
        """Of two outputs [samples, classes]; None where they are no logits or probabilities."""
        logits = [np.nan_to_num(output.astype(np.float64)) for output in (wanted, got)]
        if not np.isfinite(got).all():
            logits[1] = np.full(got.shape, np.nan)
        if logits[0].min() >= 0 and logits[0].max() <= 1 + _SUMS_TO_ONE:
            if not np.allclose(logits[0].sum(axis=1), 1, atol=_SUMS_TO_ONE):
                return None
            logits = [np.log(np.maximum(output, _FAINT)) for output in logits]
        order = np.argsort(-logits[0], axis=1, kind="stable")[:, : RUNNERS_UP + 1]
        exact, found = (np.take_along_axis(output, order, axis=1) for output in logits)
        likely = np.exp(exact - exact[:, :1])
        likely /= np.exp(logits[0] - exact[:, :1]).sum(axis=1, keepdims=True)
        margins = exact[:, :1] - exact[:, 1:]
        return cls(
            margins,
            found[:, :1] - found[:, 1:] - margins,
            likely[:, :1] - likely[:, 1:],
        )


def is_error_output(output: Any) -> bool:
    """Whether an output is a tensor of numbers, whose error can be stated."""
    return isinstance(output, np.ndarray) and output.dtype.kind in "fiub" and output.size > 0


def is_classifier(output: Array) -> bool:
    """Whether an output can be [samples, classes]."""
    return output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind == "f"
