"""What is wanted of an allocation, and what came out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from onnxq.errors import ConfigError, OnnxqError
from onnxq.meter import Measured
from onnxq.plan import Plan
from onnxq.tolerance import Tolerance

Minimize = Literal["size", "latency", "error"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str, float_bytes: int) -> int:
    """Bytes of `4MB`, `3.5MiB`, `400000`, or `0.2x` of the float model's `float_bytes`.

    Raises:
        ConfigError: the text is none of these, or less than a byte.
    """
    found = _SIZE.fullmatch(text)
    unit = found[2].lower() if found else "?"
    factor = float_bytes if unit == "x" else _UNITS.get(unit)
    size = int(float(found[1]) * factor) if found and factor is not None else 0
    if size < 1:
        raise ConfigError(f"--max-size {text!r}: give a size as 4MB, 3.5MiB or 0.2x")
    return size


@dataclass(frozen=True)
class Goal:
    """What is wanted: the least of one thing, within the bounds that are given.

    Attributes:
        tolerance: largest error.
        max_bytes: largest file.
        max_latency: largest sum over the table of latencies, in its unit.
        minimize: what is made as small as it can be.
    """

    tolerance: Tolerance | None = None
    max_bytes: int | None = None
    max_latency: float | None = None
    minimize: Minimize = "size"

    def __post_init__(self) -> None:
        if self.tolerance is None and self.max_bytes is None and self.max_latency is None:
            raise ConfigError("give --tolerance, --max-size or --max-latency: what must be kept?")
        if self.minimize != "error" and self.tolerance is None:
            raise ConfigError(
                f"--minimize {self.minimize} without --tolerance: any error would do; add "
                "--tolerance, or --minimize error"
            )


@dataclass(frozen=True, eq=False)
class Allocation:
    """A plan and what is known of it.

    Attributes:
        plan: complete, with scales.
        measured: on samples that fitting did not see; None without samples.
        predicted: error energy, the sum over nodes of what each has on its own.
        size: bytes of the file.
        latency: from the table of latencies, or None.
        chosen: how many nodes each candidate was taken for.
        options: the candidate of each unit of the table.
        trials: (size, measured) of every plan that was tried, in order.
        stated: where the sensitivities come from.
    """

    plan: Plan
    measured: Measured | None
    predicted: float
    size: int
    latency: float | None
    chosen: dict[str, int]
    options: tuple[int, ...]
    trials: tuple[tuple[int, Measured], ...]
    stated: str


class Infeasible(OnnxqError):
    """No plan keeps what is wanted; `closest` is the nearest that can be had."""

    def __init__(self, message: str, closest: Allocation) -> None:
        super().__init__(message)
        self.closest = closest
