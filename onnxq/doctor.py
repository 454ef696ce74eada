"""What onnxq finds on this machine, and what follows from it, in words."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from onnxq.comparison import Quartiles
from onnxq.kernel_probes import Exactness, IntegerOp, Workload
from onnxq.passes.forms import SAFE_BITS, Operator, TypePair, type_pair
from onnxq.passes.gains import GAINS
from onnxq.plan import Target
from onnxq.session import CASTS_INT4, CONVOLVES_INT8, runtime_version
from onnxq.targets import Found, cache_path, measure

_KERNELS: tuple[tuple[str, tuple[int, int], str], ...] = (
    ("Cast from INT4", CASTS_INT4, "4-bit weights are stored as two in a uint8"),
    ("ConvInteger with int8", CONVOLVES_INT8, "Convs use uint8 activations, which is slower"),
)


class _Use(NamedTuple):
    """What a plan can ask for, the kernel that computes it, and what that is timed by."""

    name: str
    op: Operator
    activations: Literal["dynamic", "static"]
    kernel: IntegerOp
    workloads: tuple[Workload, ...]


_USES = (
    _Use("dynamic Conv", "Conv", "dynamic", "ConvInteger", ("Conv 3×3", "Conv 1×1")),
    _Use("dynamic MatMul", "MatMul", "dynamic", "MatMulInteger", ("MatMul",)),
    _Use("static Conv", "Conv", "static", "QLinearConv", ("Conv 3×3", "Conv 1×1")),
    _Use("static MatMul", "MatMul", "static", "QLinearMatMul", ("MatMul",)),
)
_DEPTHWISE = _Use(
    "depthwise Conv", "DepthwiseConv", "static", "QLinearConv", ("depthwise Conv 3×3",)
)


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KernelRow(_Fact):
    """One line of the table: times over float's, by activation · weight; None: no such kernel."""

    workload: Workload
    op: IntegerOp
    uint8_int8: Quartiles | None
    uint8_uint8: Quartiles | None
    int8_uint8: Quartiles | None
    int8_int8: Quartiles | None


class KernelSupport(_Fact):
    """A kernel that older onnxruntime lacks. `instead` says what is done without it."""

    kernel: str
    since: str
    present: bool
    instead: str


class Diagnosis(_Fact):
    """What `doctor` found; every field is a line or a table when printed.

    `facts` are the versions, the platform and the CPU, as (what, value). `kernels` holds times with
    one thread. `cache` is where the measurement is kept, None if nowhere.
    """

    facts: tuple[tuple[str, str], ...]
    target: Target
    why: str
    exactness: tuple[Exactness, ...]
    kernels: tuple[KernelRow, ...]
    support: tuple[KernelSupport, ...]
    cache: str | None
    advice: tuple[str, ...]


def diagnose(refresh: bool = False) -> Diagnosis:
    """Measure this machine (about a second; once, then cached) and say what it means for a plan.

    Args:
        refresh: measure again what the cache holds.
    """
    found = measure(refresh=refresh)
    path = cache_path()
    support = tuple(_support())
    return Diagnosis(
        facts=tuple(_facts(found)),
        target=found.target,
        why=found.why,
        exactness=found.exactness,
        kernels=tuple(_kernel_rows(found)),
        support=support,
        cache=str(path) if path is not None and _is_there(path) else None,
        advice=tuple(_advice(found, support)),
    )


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long, or the folder may not be looked into
        return False


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    machine = found.machine
    yield "onnxq", version("onnxq")
    yield "onnxruntime", machine.onnxruntime
    yield "onnx", machine.onnx
    yield "numpy", machine.numpy
    yield "Python", platform.python_version()
    yield "platform", platform.platform()
    yield "CPU", f"{machine.cpu} ({machine.architecture}, {machine.cores} cores)"


def _kernel_rows(found: Found) -> Iterator[KernelRow]:
    rows: dict[tuple[Workload, IntegerOp], dict[str, Quartiles | None]] = {}
    for one in found.ratios:
        pairs = rows.setdefault((one.workload, one.op), {})
        pairs[f"{one.activation}_{one.weight}"] = one.ratio
    for (workload, op), pairs in rows.items():
        yield KernelRow(workload=workload, op=op, **pairs)


def _support() -> Iterator[KernelSupport]:
    installed = runtime_version(None)
    for kernel, since, instead in _KERNELS:
        yield KernelSupport(
            kernel=kernel,
            since=".".join(map(str, since)),
            present=installed >= since,
            instead=instead,
        )


def _advice(found: Found, support: tuple[KernelSupport, ...]) -> Iterator[str]:
    for kernel in support:
        if not kernel.present:
            yield (
                f"{kernel.kernel} needs onnxruntime {kernel.since}: {kernel.instead}; "
                f"`--min-runtime {kernel.since}` writes files for newer ones"
            )
    if _was_busy(found):
        yield (
            "The machine was busy while it was measured, so the times are uncertain: repeat it "
            "with --refresh when it is idle"
        )
    yield from _saturation(found)
    for use in _USES:
        yield _speed(found, use)
    yield _depthwise(found)
    yield _default(found.target)


def _default(target: Target) -> str:
    """What is computed in integers where the user does not say, by the table."""
    gains = [gain for gain in GAINS if target in gain.targets]
    texts = [f"{gain.op}: {gain.condition} ({gain.reason})" for gain in gains]
    return f"In integers by default (--activations auto) on {target}: {'; '.join(texts)}"


def _was_busy(found: Found) -> bool:
    """Whether the times of the same kernel differ by half, for half of the kernels."""
    spread = [
        (one.ratio.high - one.ratio.low) / one.ratio.median
        for one in found.ratios
        if one.ratio is not None
    ]
    return bool(spread) and median(spread) > 0.5


def _saturation(found: Found) -> Iterator[str]:
    changed: dict[tuple[TypePair, TypePair], list[str]] = {}
    for use in _USES:
        safe, full = _pair(found, use, SAFE_BITS), _pair(found, use, 8)
        if safe != full:
            changed.setdefault((safe, full), []).append(use.name)
    for (safe, full), names in changed.items():
        yield (
            f"{', '.join(names)}: 8-bit weights run as {full} here, since {safe} would saturate; "
            f"up to {SAFE_BITS} bits run as {safe}"
        )


def _speed(found: Found, use: _Use) -> str:
    """How long one product takes, and how many of them float leaves time for."""
    texts, slowest = [], 0.0
    for bits in (8, SAFE_BITS):
        pair = _pair(found, use, bits)
        times = [_time(found, workload, use.kernel, pair) for workload in use.workloads]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return f"{use.name}: this onnxruntime has no {use.kernel} for {pair}"
        shown = " and ".join(
            f"{time:.2f} × ({workload})"
            for time, workload in zip(known, use.workloads, strict=True)
        )
        texts.append(f"with {bits}-bit weights {shown}")
        slowest = max(known)
    verdict = _verdict(use, slowest)
    return f"{use.name}, one product against float: {'; '.join(texts)}. {verdict}"


def _verdict(use: _Use, slowest: float) -> str:
    if slowest >= 1:
        return "Float is faster here"
    if use.activations == "static":
        return "Faster than float"
    if slowest >= 0.5:
        return (
            "Two parallel terms are slower than float: layout merged makes one product of them "
            "(of 8 bits at most)"
        )
    return "Two parallel terms are still faster than float"


def _depthwise(found: Found) -> str:
    dynamic = [
        time
        for pair in (TypePair("int8", "uint8"), TypePair("uint8", "uint8"))
        if (time := _time(found, "depthwise Conv 3×3", "ConvInteger", pair)) is not None
    ]
    static = _time(found, "depthwise Conv 3×3", "QLinearConv", _pair(found, _DEPTHWISE, 8))
    texts = [f"dynamic {min(dynamic):.2f} × float's time, and so left in float"] if dynamic else []
    texts += [f"static {static:.2f} ×"] if static is not None else []
    return f"depthwise Conv: {'; '.join(texts) or 'no integer kernel'}"


def _pair(found: Found, use: _Use, bits: int) -> TypePair:
    convolves = runtime_version(None) >= CONVOLVES_INT8
    return type_pair(use.op, use.activations, bits, found.target, convolves_int8=convolves)


def _time(found: Found, workload: Workload, op: IntegerOp, pair: TypePair) -> float | None:
    for one in found.ratios:
        here = TypePair(one.activation, one.weight)
        if (one.workload, one.op, here) == (workload, op, pair):
            return None if one.ratio is None else one.ratio.median
    return None
