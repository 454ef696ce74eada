"""How far the outputs may be from the float model's, as the user says it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from onnxq.errors import ConfigError
from onnxq.meter import Estimate, Measured

Kind = Literal["top1", "agreement", "sqnr", "mae", "cosine", "error"]

_FORM = re.compile(r"\s*([a-z0-9]+)\s*=\s*([-+0-9.eE]+?)\s*(pt|%|dB|)\s*", re.IGNORECASE)


class _Rule(NamedTuple):
    unit: str
    example: str
    limit: Callable[[float], float]  # of the stated number, as a bound on the loss
    loss: Callable[[Measured], Estimate | None]
    power: float  # loss ~ (error energy) ** power, as errors get small


_RULES: dict[str, _Rule] = {
    "top1": _Rule("pt", "top1=0.5pt", lambda x: x / 100, lambda m: m.top1, 1.0),
    "agreement": _Rule("%", "agreement=99%", lambda x: 1 - x / 100, lambda m: m.changed, 0.5),
    "sqnr": _Rule("db", "sqnr=30dB", lambda x: 10 ** (-x / 10), lambda m: m.energy, 1.0),
    "mae": _Rule("%", "mae=1%", lambda x: x / 100, lambda m: m.mae, 0.5),
    "cosine": _Rule("", "cosine=0.999", lambda x: 1 - x, lambda m: m.angle, 1.0),
    "error": _Rule("%", "error=1%", lambda x: (x / 100) ** 2, lambda m: m.energy, 1.0),
}


class Tolerance(BaseModel):
    """A bound on one measure of the error, kept if the worst output keeps it.

    top1       points by which the accuracy may fall (see `Measured.top1`)
    agreement  percent of samples that must keep their class (see `Measured.changed`)
    sqnr       dB of signal to quantization noise
    mae        mean |difference|, in percent of mean |float output|
    cosine     of float and quantized output, averaged over samples
    error      ‖difference‖ in percent of ‖float output‖
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    number: float

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """`top1=0.5pt`, `agreement=99%`, `sqnr=30dB`, `mae=1%`, `cosine=0.999` or `error=1%`.

        Raises:
            ConfigError: the text is none of these, or the number makes no sense.
        """
        found = _FORM.fullmatch(text)
        name = found[1].lower() if found else text.partition("=")[0].strip().lower()
        rule = _RULES.get(name)
        if rule is None:
            forms = ", ".join(rule.example for rule in _RULES.values())
            raise ConfigError(f"--tolerance {text!r}: give one of {forms}")
        try:
            number = float(found[2]) if found else math.nan
        except ValueError:
            number = math.nan
        unit = found[3].lower() if found else ""
        if unit not in ("", rule.unit) or (not unit and rule.unit) or not math.isfinite(number):
            raise ConfigError(f"--tolerance {text!r}: write it as {rule.example}")
        limit = rule.limit(number)
        if not 0 < limit < 1:
            raise ConfigError(
                f"--tolerance {text!r}: {number:g} {_WHY[name]}; for example {rule.example}"
            )
        return cls.model_validate({"kind": name, "number": number})

    def __str__(self) -> str:
        unit = {"db": "dB"}.get(_RULES[self.kind].unit, _RULES[self.kind].unit)
        return f"{self.kind}={self.number:g}{unit}"

    @property
    def limit(self) -> float:
        """The largest loss that keeps it."""
        return _RULES[self.kind].limit(self.number)

    @property
    def power(self) -> float:
        """How the loss grows with the energy of the error: as energy ** power."""
        return _RULES[self.kind].power

    @property
    def energy(self) -> float:
        """The error energy at which it is just kept, for estimates where nothing can be run.

        Exact for error and sqnr. cosine: of an error at right angles to the output. mae: taking
        both as equally distributed. top1, agreement: there is no such relation; the loss is taken
        to be the energy, which holds within a factor of ten on the models of docs/budgets.md.
        """
        if self.kind == "cosine":
            return 2 * self.limit
        return self.limit**2 if self.kind == "mae" else self.limit

    def loss(self, measured: Measured) -> Estimate:
        """The measure that is bounded, turned so that less is better; 0 is exact.

        Raises:
            ConfigError: the model is no classifier, and the tolerance is for one.
        """
        found = _RULES[self.kind].loss(measured)
        if found is None:
            raise ConfigError(
                f"--tolerance {self}: the first output is not [samples, classes]; "
                "use sqnr, mae, cosine or error"
            )
        return found

    def met(self, measured: Measured, deviations: float = 0.0) -> bool:
        """Whether it is kept, also if the loss is so many standard errors higher."""
        return self.loss(measured).upper(deviations) <= self.limit

    def shown(self, measured: Measured) -> str:
        """What was measured, in the words of the tolerance."""
        value = self.loss(measured).value
        return {
            "top1": f"top1 {100 * value:+.2f}pt lost",
            "agreement": f"agreement {100 * (1 - value):.2f}%",
            "sqnr": f"sqnr {measured.sqnr_db:.2f}dB",
            "mae": f"mae {100 * value:.3g}%",
            "cosine": f"cosine {1 - value:.6f}",
            "error": f"error {100 * math.sqrt(value):.3g}%",
        }[self.kind]


_WHY = {
    "top1": "points must be more than 0 and less than 100",
    "agreement": "percent must be more than 0 and less than 100",
    "sqnr": "dB must be more than 0",
    "mae": "percent must be more than 0 and less than 100",
    "cosine": "must be more than 0 and less than 1",
    "error": "percent must be more than 0 and less than 100",
}
