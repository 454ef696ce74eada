"""Errors of a model's outputs over samples, each with how much it varies from sample to sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from onnxq.flips import Distances, Noise, expected_flips
from onnxq.kernels_ref import cosine

Array = npt.NDArray[Any]

_TINY = 1e-300


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
    the share of samples with another class, `changed` the share expected of samples like these, and
    `top1` by how much the accuracy falls, all 0 to 1.

    With labels, `top1` and `changed` are counted. Without, they are expected (see `flips`): the
    float model's own probabilities stand for labels (a change from a class of 0.5 to one of 0.4
    costs 0.1), and each class close behind the first overtakes it with the probability that normal
    noise of the size that quantization puts on these differences makes up for its margin. Where
    outputs are neither logits nor probabilities, changes are counted, and each costs 1.
    """

    samples: int
    energy: Estimate
    mae: Estimate
    angle: Estimate
    top1: Estimate | None = None
    disagreement: Estimate | None = None
    changed: Estimate | None = None

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
    """Takes in the outputs of both models, sample by sample.

    Args:
        beside: margins of further samples, which weights were rounded to: see `add_fitted`.
    """

    def __init__(self, beside: Sequence[Distances] = ()) -> None:
        self._feeds = 0
        self._outputs: dict[int, tuple[_Ratio, _Ratio, _Ratio]] = {}
        self._top1 = _Ratio()
        self._changed = _Ratio()
        self._classifies = self._counts = False
        self._distances: list[Distances] = list(beside)
        self._noise: list[Noise] = []
        self._fitted: list[Noise] = []

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

    def add_fitted(self, noise: Noise) -> None:
        """The noise on one of the samples beside."""
        self._fitted.append(noise)

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
        found = Distances.of(wanted) if label is None else None
        if label is not None:
            self._top1.add(float(np.sum(own == label)) - float(np.sum(other == label)), len(wanted))
        elif found is None:
            self._top1.add(float(np.sum(own != other)), len(wanted))
        if found is None:
            self._counts = True
        else:
            self._distances.append(found)
            self._noise.append(found.noise(wanted, got))

    def measured(self) -> Measured:
        """What was found so far; at least one output must have been added."""
        columns = [
            [r.estimate() for r in ratios] for ratios in zip(*self._outputs.values(), strict=True)
        ]
        energy, mae, angle = (max(c, key=lambda e: e.value) for c in columns)
        found = Measured(samples=self._feeds, energy=energy, mae=mae, angle=angle)
        return found.model_copy(update=self._of_classes()) if self._classifies else found

    def _of_classes(self) -> dict[str, Estimate]:
        counted = self._changed.estimate()
        if self._counts:
            return {"top1": self._top1.estimate(), "disagreement": counted, "changed": counted}
        flips = expected_flips(self._distances, self._noise, self._fitted)
        (lost, lost_spread), (changed, changed_spread) = flips.lost, flips.changed
        return {
            "top1": Estimate(value=lost, spread=lost_spread),
            "disagreement": counted,
            "changed": Estimate(value=changed, spread=changed_spread),
        }


def is_error_output(output: Any) -> bool:
    """Whether an output is a tensor of numbers, whose error can be stated."""
    return isinstance(output, np.ndarray) and output.dtype.kind in "fiub" and output.size > 0


def is_classifier(output: Array) -> bool:
    """Whether an output can be [samples, classes]."""
    return output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind == "f"
