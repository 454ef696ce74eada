"""Which CPU a file is made for, where the user does not say: the one at hand, by measurement.

What was measured is kept in the user's cache folder (or in `ONNXQ_CACHE`), one file per onnxruntime
and CPU. A file that is missing, damaged, of another version or cannot be written is no error: it is
measured again.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import platformdirs
from pydantic import BaseModel, ConfigDict

from onnxq.comparison import Quartiles
from onnxq.errors import ConfigError
from onnxq.files import write_whole
from onnxq.kernel_probes import (
    PROBED,
    Exactness,
    IntegerOp,
    KernelRatio,
    find_exactness,
    measure_ratios,
    timed,
)
from onnxq.passes.forms import Operator, TypePair, type_pair
from onnxq.plan import Target

_ARM = ("arm64", "aarch64")
_CPUINFO = Path("/proc/cpuinfo")
# Lines of /proc/cpuinfo that tell CPUs apart; virtual machines hide the model but not the flags.
_TELLING = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part"),
)
# 8-bit products whose exactness decides, and the operator that each is computed by.
_DECIDING: tuple[tuple[Operator, Literal["dynamic", "static"], IntegerOp], ...] = (
    ("MatMul", "dynamic", "MatMulInteger"),
    ("Conv", "dynamic", "ConvInteger"),
    ("Conv", "static", "QLinearConv"),
)


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Fact):
    """What a measurement holds for. `cpu_id` tells CPUs of one name apart by their features."""

    onnxruntime: str
    onnx: str
    numpy: str
    cpu: str
    cpu_id: str
    architecture: str
    cores: int


class Found(_Fact):
    """The target, why it was chosen, and what was measured; nothing where it was named."""

    target: Target
    why: str
    machine: Machine
    exactness: tuple[Exactness, ...] = ()
    ratios: tuple[KernelRatio, ...] = ()


class _Measured(_Fact):
    """What the cache holds: facts only; what follows from them is decided anew."""

    format_version: Literal[1] = 1
    machine: Machine
    exactness: tuple[Exactness, ...]
    ratios: tuple[KernelRatio, ...] = ()

    def holds_for(self, machine: Machine) -> bool:
        """Whether this was measured on such a machine, with the probes of this version."""
        of, here = self.machine, machine
        probed = tuple((e.op, TypePair(e.activation, e.weight)) for e in self.exactness)
        ratios = tuple((r.workload, r.op, TypePair(r.activation, r.weight)) for r in self.ratios)
        return (
            (of.onnxruntime, of.cpu_id) == (here.onnxruntime, here.cpu_id)
            and probed == PROBED
            and ratios in ((), timed())
            and all(_is_time(one.ratio) for one in self.ratios)
        )


def _is_time(ratio: Quartiles | None) -> bool:
    return ratio is None or (0 < ratio.low <= ratio.median <= ratio.high < math.inf)


def resolve(target: Target | Literal["auto"] = "auto", *, refresh: bool = False) -> Found:
    """The target itself, or with "auto" that of this machine (some ten milliseconds, then cached).

    Args:
        target: a target, or "auto".
        refresh: measure again what the cache holds.
    """
    machine = this_machine()
    if target != "auto":
        return Found(target=target, why="as asked for", machine=machine)
    known = None if refresh else _read(machine)
    if known is None:
        known = _Measured(machine=machine, exactness=find_exactness())
        _write(known)
    return _found(known, machine)


def measure(*, refresh: bool = False) -> Found:
    """As `resolve("auto")`, with the times of the integer kernels (about a second, then cached)."""
    machine = this_machine()
    known = None if refresh else _read(machine)
    if known is None or not known.ratios:
        exactness = find_exactness() if known is None else known.exactness
        known = _Measured(machine=machine, exactness=exactness, ratios=measure_ratios())
        _write(known)
    return _found(known, machine)


def foreign(targets: Iterable[Target]) -> str | None:
    """What to tell a user whose file is for another CPU than this one, if that spoils measurements.

    Args:
        targets: what integer products of the plan are for.
    """
    if "cpu-vnni" not in targets or resolve("auto").target != "cpu-avx2":
        return None
    return (
        "made for cpu-vnni: on this CPU its 8-bit products saturate, so that errors measured here "
        "are not those of the file there; cpu-avx2 is right on both"
    )


def cache_path() -> Path | None:
    """The file that holds what was measured here; it need not exist. None: there is no home."""
    return _path(this_machine())


def this_machine() -> Machine:
    """The CPU and the versions in use."""
    told = _cpuinfo()
    name = told.get("model name") or platform.processor() or platform.machine()
    identity = "\n".join((platform.machine(), name, *(f"{k}: {v}" for k, v in told.items())))
    return Machine(
        onnxruntime=ort.__version__,
        onnx=onnx.__version__,
        numpy=np.__version__,
        cpu=name,
        cpu_id=f"{zlib.crc32(identity.encode()):08x}",
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
    )


def _cpuinfo() -> dict[str, str]:
    """What Linux tells of the first CPU; empty elsewhere."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines if key.strip() in _TELLING}


def _found(known: _Measured, machine: Machine) -> Found:
    target, why = _choose(known.exactness, machine.architecture)
    return Found(
        target=target, why=why, machine=machine, exactness=known.exactness, ratios=known.ratios
    )


def _choose(exactness: Iterable[Exactness], architecture: str) -> tuple[Target, str]:
    """The fastest target whose products of 8-bit weights are exact, by the probes alone."""
    exact = {(e.op, TypePair(e.activation, e.weight)): e.exact for e in exactness}
    wanted: Target = "cpu-arm" if architecture.lower() in _ARM else "cpu-vnni"
    wrong = []
    for op, activations, kernel in _DECIDING:
        pair = type_pair(op, activations, 8, wanted)
        if exact.get((kernel, pair)) is False:
            wrong.append(f"{kernel} {pair}")
    if wrong:
        return "cpu-avx2", f"{architecture}; with 8-bit weights these saturate: {', '.join(wrong)}"
    pairs = "alike types" if wanted == "cpu-arm" else "uint8·int8 products"
    return wanted, f"{architecture}; {pairs} are exact with 8-bit weights"


def _path(machine: Machine) -> Path | None:
    folder = os.environ.get("ONNXQ_CACHE") or platformdirs.user_cache_dir("onnxq", appauthor=False)
    try:
        home = Path(folder).expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return home / f"kernels-{machine.onnxruntime}-{machine.cpu_id}.json"


def _read(machine: Machine) -> _Measured | None:
    path = _path(machine)
    if path is None:
        return None
    try:
        known = _Measured.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return known if known.holds_for(machine) else None


def _write(known: _Measured) -> None:
    path = _path(known.machine)
    if path is None:
        return
    with contextlib.suppress(OSError, ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: known.model_dump_json(indent=1).encode()})
