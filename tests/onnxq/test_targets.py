"""The target of this machine: what decides it, what is cached, and what `doctor` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxq import doctor, kernel_probes, targets
from onnxq.comparison import Quartiles
from onnxq.kernel_probes import PROBED, Exactness, KernelRatio, find_exactness, measure_ratios
from onnxq.options import Options
from onnxq.passes.forms import TARGETS, TypePair, type_pair
from onnxq.session import CONVOLVES_INT8, runtime_version
from onnxq.targets import cache_path, foreign, measure, resolve

SATURATING = {
    "MatMulInteger": "uint8·int8",
    "QLinearConv": "uint8·int8",
    "ConvInteger": "int8·uint8",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONNXQ_CACHE", str(folder))
    return folder


def exactness(*wrong: str) -> tuple[Exactness, ...]:
    """What the probes say where these operators are inexact in their mixed types."""
    return tuple(
        Exactness(
            op=op,
            activation=pair.activation,
            weight=pair.weight,
            exact=not (op in wrong and SATURATING[op] == str(pair)),
        )
        for op, pair in PROBED
    )


def ratios(factor: float = 0.3) -> tuple[KernelRatio, ...]:
    """Made-up times, the same for each kernel, but no int8·uint8 of QLinear operators."""
    return tuple(
        KernelRatio(
            workload=workload,
            op=op,
            activation=a,
            weight=w,
            ratio=None
            if op.startswith("QLinear") and (a, w) == ("int8", "uint8")
            else Quartiles(low=factor, median=factor, high=factor),
        )
        for workload, ops in {
            "Conv 3×3": ("ConvInteger", "QLinearConv"),
            "Conv 1×1": ("ConvInteger", "QLinearConv"),
            "depthwise Conv 3×3": ("ConvInteger", "QLinearConv"),
            "MatMul": ("MatMulInteger", "QLinearMatMul"),
        }.items()
        for op in ops
        for a in ("int8", "uint8")
        for w in ("int8", "uint8")
    )


class Counted:
    """A measurement that says how often it was made."""

    def __init__(self, result: tuple) -> None:
        self.result, self.calls = result, 0

    def __call__(self, *_: float) -> tuple:
        self.calls += 1
        return self.result


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Counted, Counted]]:
    """Replace the probes, the times and the architecture."""

    def make(
        *wrong: str, architecture: str = "x86_64", factor: float = 0.3
    ) -> tuple[Counted, Counted]:
        probes, times = Counted(exactness(*wrong)), Counted(ratios(factor))
        monkeypatch.setattr(targets, "find_exactness", probes)
        monkeypatch.setattr(targets, "measure_ratios", times)
        monkeypatch.setattr(targets.platform, "machine", lambda: architecture)
        return probes, times

    return make


# --- what decides


@pytest.mark.parametrize("wrong", list(SATURATING))
def test_one_saturating_kernel_is_enough(pretend, wrong):
    pretend(wrong)
    found = resolve()
    assert found.target == "cpu-avx2"
    assert f"{wrong} {SATURATING[wrong]}" in found.why


def test_exact_products_mean_vnni(pretend):
    pretend()
    assert resolve().target == "cpu-vnni"


@pytest.mark.parametrize("architecture", ["arm64", "aarch64", "ARM64"])
def test_arm(pretend, architecture):
    pretend(architecture=architecture)
    assert resolve().target == "cpu-arm"


def test_a_missing_kernel_decides_nothing(monkeypatch):
    """Onnxruntime before 1.24 has no ConvInteger with int8 activations."""
    told = [
        e.model_copy(update={"exact": None}) if e.op == "ConvInteger" else e for e in exactness()
    ]
    monkeypatch.setattr(targets, "find_exactness", lambda: tuple(told))
    monkeypatch.setattr(targets.platform, "machine", lambda: "x86_64")
    assert resolve().target == "cpu-vnni"


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_times_decide_nothing(pretend, factor):
    pretend("MatMulInteger", factor=factor)
    assert measure().target == resolve().target == "cpu-avx2"


@pytest.mark.parametrize("target", TARGETS)
def test_a_named_target_is_taken_as_it_is(pretend, cache, target):
    probes, times = pretend()
    found = resolve(target)
    assert (found.target, found.exactness, found.ratios) == (target, (), ())
    assert probes.calls == times.calls == 0
    assert not cache.exists()


# --- the cache


def test_probes_and_times_are_each_taken_once(pretend):
    probes, times = pretend()
    assert resolve() == resolve()
    assert (probes.calls, times.calls) == (1, 0)
    assert measure() == measure()
    assert (probes.calls, times.calls) == (1, 1)
    assert resolve() == measure()  # what is known is told
    assert (probes.calls, times.calls) == (1, 1)


def test_refresh_measures_again(pretend):
    probes, times = pretend("MatMulInteger")
    assert measure().target == "cpu-avx2"
    probes.result = exactness()
    assert measure(refresh=True).target == resolve().target == "cpu-vnni"
    assert (probes.calls, times.calls) == (2, 2)
    probes.result = exactness("ConvInteger")
    assert resolve(refresh=True).target == "cpu-avx2"


def write_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


def edit(**changes: object) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return do


def other_machine(path: Path) -> None:
    known = json.loads(path.read_text())
    known["machine"]["cpu_id"] = "00000000"
    path.write_text(json.dumps(known))


def fewer_probes(path: Path) -> None:
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "exactness": known["exactness"][1:]}))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        write_bytes(b""),
        write_bytes(b"\xff\x00{"),
        write_bytes(b"[" * 100_000),
        write_bytes(b'{"format_version": 1}'),
        edit(format_version=2),
        edit(exactness="all"),
        edit(unknown=1),
        other_machine,
        fewer_probes,
        a_folder,
        Path.unlink,
    ],
)
def test_a_damaged_cache_is_measured_again(pretend, damage):
    probes, _ = pretend()
    first = resolve()
    damage(cache_path())
    assert resolve() == first
    assert probes.calls == 2


def test_damaged_times_are_measured_again(pretend):
    """The advice would divide by them, or miss them."""
    _, times = pretend()
    first = measure()
    whole = json.loads(cache_path().read_text())
    kept = whole["ratios"]
    for low in (0.0, -1.0, 0.4):  # 0.4: above the median
        whole["ratios"] = [*kept[:-1], {**kept[-1], "ratio": {**kept[-1]["ratio"], "low": low}}]
        cache_path().write_text(json.dumps(whole))
        assert measure() == first
    whole["ratios"] = kept[:1]
    cache_path().write_text(json.dumps(whole))
    assert measure() == first
    assert times.calls == 5


def test_a_cache_that_cannot_be_written_is_no_error(pretend, cache):
    probes, _ = pretend()
    cache.write_text("a file, where the folder should be")
    assert resolve() == resolve()
    assert probes.calls == 2
    assert cache.read_text() == "a file, where the folder should be"


def test_no_home_is_no_error(pretend, monkeypatch):
    pretend()
    monkeypatch.setenv("ONNXQ_CACHE", "~nobody-of-that-name/cache")
    assert cache_path() is None
    assert resolve().target == "cpu-vnni"
    assert measure().ratios


def test_the_cache_is_the_user_s_unless_named(monkeypatch, tmp_path, cache):
    assert cache_path().parent == cache
    monkeypatch.delenv("ONNXQ_CACHE")
    monkeypatch.setattr(targets.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path))
    assert cache_path().parent == tmp_path


@pytest.mark.parametrize("change", ["runtime", "flags"])
def test_the_key_is_the_runtime_and_the_cpu(monkeypatch, tmp_path, change):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name : A CPU\nflags : avx2\ncpu MHz : 1\n\nprocessor : 1\n"
    )
    monkeypatch.setattr(targets, "_CPUINFO", info)
    before = cache_path()
    assert targets.this_machine().cpu == "A CPU"
    info.write_text(info.read_text().replace("MHz : 1", "MHz : 2"))
    assert cache_path() == before
    if change == "runtime":
        monkeypatch.setattr(targets.ort, "__version__", "1.99.0")
    else:
        info.write_text(info.read_text().replace("avx2", "avx2 avx512_vnni"))
    assert cache_path() != before


def test_a_machine_without_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "_CPUINFO", tmp_path / "none")
    assert targets.this_machine().cpu


# --- on this machine


def test_the_target_of_this_machine_is_exact():
    """Nothing is pretended: the pairs chosen for 8-bit weights are exact by the same probes."""
    found = resolve()
    exact = {(e.op, TypePair(e.activation, e.weight)): e.exact for e in found.exactness}
    convolves = runtime_version(None) >= CONVOLVES_INT8
    for op, activations, kernel in [
        ("Conv", "dynamic", "ConvInteger"),
        ("MatMul", "dynamic", "MatMulInteger"),
        ("Conv", "static", "QLinearConv"),
    ]:
        pair = type_pair(op, activations, 8, found.target, convolves_int8=convolves)
        assert exact[kernel, pair] is True


def test_uint8_times_uint8_is_exact_everywhere():
    told = {(e.op, e.activation, e.weight): e.exact for e in find_exactness()}
    for op in ("MatMulInteger", "QLinearConv", "ConvInteger"):
        assert told[op, "uint8", "uint8"] is True


def test_a_probe_sees_saturation(monkeypatch):
    """A kernel that adds pairs in 16 bits, as x86 without VNNI does, is found out."""

    def saturating(_: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        rows, inputs = feed["x"].shape
        total = np.array([2**15 - 1, -(2**15)])[np.arange(16) % 2] * (inputs // 2)
        return [np.broadcast_to(total, (rows, 16)).astype(np.int32)]

    monkeypatch.setattr(kernel_probes, "run", saturating)
    assert kernel_probes.is_exact("MatMulInteger", TypePair("uint8", "int8")) is False


def test_every_kernel_is_timed_or_known_to_be_missing():
    found = measure_ratios(seconds=0.0)  # three rounds
    shown = {(r.workload, r.op, r.activation, r.weight): r.ratio for r in found}
    assert len(shown) == len(found) == 4 * 2 * 4
    for (_, op, activation, weight), ratio in shown.items():
        if ratio is not None:
            assert 0 < ratio.low <= ratio.median <= ratio.high
        elif weight == "int8" or activation == "uint8":
            assert op == "ConvInteger" and runtime_version(None) < CONVOLVES_INT8


# --- doctor


def advice() -> str:
    return "\n".join(doctor.diagnose().advice)


def test_doctor_tells_all_of_it(pretend, cache):
    pretend("MatMulInteger", "QLinearConv", "ConvInteger")
    found = doctor.diagnose()
    assert found.target == "cpu-avx2" and "saturate" in found.why
    assert [name for name, _ in found.facts] == [
        *("onnxq", "onnxruntime", "onnx", "numpy", "Python", "platform", "CPU"),
    ]
    assert all(value for _, value in found.facts)
    assert len(found.kernels) == 8 and found.exactness == exactness(*SATURATING)
    assert Path(found.cache or "").parent == cache
    again = doctor.Diagnosis.model_validate_json(found.model_dump_json())
    assert again == found


def test_doctor_says_which_types_8_bits_take(pretend):
    pretend("MatMulInteger", "QLinearConv", "ConvInteger")
    told = advice()
    assert "dynamic Conv: 8-bit weights run as uint8·uint8 here, since int8·uint8" in told
    assert "dynamic MatMul, static Conv, static MatMul: 8-bit weights run as uint8·uint8" in told


def test_doctor_says_nothing_of_saturation_where_there_is_none(pretend):
    pretend()
    assert "saturate" not in advice()


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [
        (0.3, "Two parallel terms are still faster"),
        (0.7, "layout merged"),
        (1.2, "Float is faster"),
    ],
)
def test_doctor_judges_by_what_was_measured(pretend, factor, verdict):
    pretend(factor=factor)
    told = advice()
    assert verdict in told and f"{factor:.2f} ×" in told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((), "on cpu-vnni: Conv: all (integer convolutions are faster than float); MatMul: all"),
        (("ConvInteger",), "on cpu-avx2: Conv: none (integer convolutions, with the quantizing"),
    ],
)
def test_doctor_says_what_the_default_is_here(pretend, wrong, said):
    pretend(*wrong)
    assert said in advice()
    expected = "auto" if wrong else "dynamic"
    assert Options.checked().resolved_activations == expected


def test_doctor_says_what_an_old_runtime_lacks(pretend, monkeypatch):
    pretend()
    assert all(kernel.present for kernel in doctor.diagnose().support) or (
        runtime_version(None) < CONVOLVES_INT8
    )
    monkeypatch.setattr(doctor, "runtime_version", lambda _: (1, 22))
    found = doctor.diagnose()
    assert [kernel.present for kernel in found.support] == [False, False]
    told = "\n".join(found.advice)
    assert "Cast from INT4 needs onnxruntime 1.23" in told
    assert "ConvInteger with int8 needs onnxruntime 1.24" in told


def test_doctor_without_a_cache(pretend, cache, monkeypatch):
    pretend()
    cache.write_text("a file, where the folder should be")
    assert doctor.diagnose().cache is None
    monkeypatch.setenv("ONNXQ_CACHE", str(cache.with_name("a" * 300)))
    assert doctor.diagnose().cache is None


def test_doctor_measures_again_when_asked(pretend):
    probes, times = pretend()
    doctor.diagnose()
    doctor.diagnose(refresh=True)
    assert (probes.calls, times.calls) == (2, 2)


def test_doctor_warns_when_the_machine_was_busy(pretend):
    _, times = pretend()
    assert "busy" not in advice()
    times.result = tuple(
        r.model_copy(update={"ratio": r.ratio and Quartiles(low=0.3, median=0.4, high=2.0)})
        for r in times.result
    )
    told = "\n".join(doctor.diagnose(refresh=True).advice)
    assert "busy" in told and "--refresh" in told


def test_a_file_for_another_cpu_is_said_to_be_measured_wrongly(pretend):
    pretend(*SATURATING)
    assert "made for cpu-vnni: on this CPU" in (foreign({"cpu-vnni"}) or "")
    assert foreign({"cpu-avx2"}) is None and foreign(set()) is None
