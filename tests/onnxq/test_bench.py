"""`bench`: how runs are taken in turns, what is measured, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
from command import DEMO, DIGITS, contents, refused, works, write
from command import onnxq as command

import onnxq
from onnxq import benchmarking, comparison, measure_process
from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.errors import ConfigError, ModelError, ValidationError

QUICK = ("--runs", 3, "--warmup", 0)
MIB = 2**20


# --- turns and ratios, with a clock of our own


class Machine:
    """Things to run that take the time we say, and the order in which they were run."""

    def __init__(self, *durations: Callable[[int], float]) -> None:
        self.now = 100.0
        self.order: list[int] = []
        self.runs = [self._make(i, duration) for i, duration in enumerate(durations)]

    def _make(self, index: int, duration: Callable[[int], float]) -> Callable[[], None]:
        calls = count()

        def call() -> None:
            self.order.append(index)
            self.now += duration(next(calls))

        return call

    def times(self, **kwargs: Any) -> np.ndarray:
        options = {"warmup": 0, "rounds": 4, "seconds": 1e9, **kwargs}
        return time_in_turns(self.runs, clock=lambda: self.now, **options)


def test_times_go_to_their_model_whatever_the_order() -> None:
    machine = Machine(lambda n: 1.0 + n, lambda n: 10.0 + n, lambda n: 100.0 + n)
    times = machine.times()
    assert machine.order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert times.tolist() == [[1 + n, 10 + n, 100 + n] for n in range(4)]


@pytest.mark.parametrize("models", [1, 2, 5])
def test_each_begins_equally_often(models: int) -> None:
    machine = Machine(*[lambda _: 1.0] * models)
    machine.times(rounds=2 * models)
    rounds = np.reshape(machine.order, (2 * models, models))
    assert sorted(rounds[:, 0].tolist()) == sorted([*range(models)] * 2)
    assert (np.sort(rounds, axis=1) == np.arange(models)).all()


def test_warm_up_is_run_and_not_timed() -> None:
    machine = Machine(lambda n: 1000.0 if n < 5 else 1.0, lambda n: 1000.0 if n < 5 else 2.0)
    times = machine.times(warmup=5, seconds=100)
    assert machine.order[:10] == [0, 1] * 5
    assert times.tolist() == [[1.0, 2.0]] * 4
    assert len(machine.order) == 10 + 8


@pytest.mark.parametrize(
    ("seconds", "rounds", "taken"),
    [
        (1000, 50, 50),
        (30.5, 50, 11),  # the round that is under way is finished
        (30, 50, 10),
        (0.001, 50, 3),  # a median needs some
        (0.001, 2, 2),
    ],
)
def test_the_cap_on_seconds(seconds: float, rounds: int, taken: int) -> None:
    machine = Machine(lambda _: 1.0, lambda _: 2.0)
    assert machine.times(seconds=seconds, rounds=rounds).shape == (taken, 2)


def test_progress_of_the_rounds() -> None:
    seen: list[tuple[str, int, int]] = []
    Machine(lambda _: 1.0).times(rounds=2, progress=lambda *state: seen.append(state))
    assert seen == [("rounds", 1, 2), ("rounds", 2, 2)]


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down tenfold half-way changes no ratio."""
    machine = Machine(lambda n: 1.0 if n < 6 else 10.0, lambda n: 3.0 if n < 6 else 30.0)
    times = machine.times(rounds=11)
    assert paired_ratios(times).tolist() == [[1.0, 3.0]] * 11
    assert quartiles(times[:, 1]).high == 30
    spread = quartiles(paired_ratios(times)[:, 1])
    assert (spread.low, spread.median, spread.high) == (3, 3, 3)


def test_the_median_ratio_is_not_the_ratio_of_medians() -> None:
    times = np.array([[1.0, 2.0], [2.0, 10.0], [10.0, 10.0]])
    assert quartiles(paired_ratios(times)[:, 1]).median == 2.0
    assert np.median(times[:, 1]) / np.median(times[:, 0]) == 5.0


def test_quartiles() -> None:
    spread = quartiles(np.array([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert (spread.low, spread.median, spread.high) == (2, 3, 4)
    spread = quartiles(np.array([1.0, 2.0]))
    assert (spread.low, spread.median, spread.high) == (1.25, 1.5, 1.75)


def test_a_clock_that_stands_still() -> None:
    assert paired_ratios(np.zeros((2, 2))).tolist() == [[1, 1], [1, 1]]


def test_compare_uses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []

    def fake(runs: list[Callable[[], object]], **options: Any) -> np.ndarray:
        called.append({"runs": len(runs), **options})
        return np.array([[1.0, 2.0], [2.0, 10.0], [10.0, 10.0]])

    monkeypatch.setattr(comparison, "time_in_turns", fake)
    assert onnxq.compare(DEMO, DEMO).latency_ratio == 2.0
    assert called == [{"runs": 2, "warmup": 1, "rounds": 30, "seconds": 4.0}]


# --- the result


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    return write(small.conv_model(), tmp_path / "conv.onnx")


def _open(folder: Path, *, weight: int = 3, name: str = "open.onnx") -> Path:
    """x [N, 4], s [2], m [N, M] -> y [N, weight]; s and m are not used for y."""
    text = f"""g (float[N,4] x, float[2] s, float[N,M] m) => (float[N,{weight}] y, float[2] t,
        float[N,M] n) {{ y = MatMul (x, w) t = Neg (s) n = Neg (m) }}"""
    return write(small.model(text, {"w": small.weights(4, weight)}), folder / name)


def test_json(tmp_path: Path, conv: Path) -> None:
    onnxq.quantize(conv, tmp_path / "quant.onnx")
    quant = tmp_path / "quant.onnx"
    options = ("--json", "--threads", 1, "--runs", 7, "--warmup", 2)
    text = works("bench", conv, quant, conv, *options)
    found = json.loads(text, parse_constant=pytest.fail)
    assert found.keys() == onnxq.Benchmark.model_fields.keys()
    assert found["inputs"] == {"x": [1, 3, 8, 8]}
    assert (found["made_up_inputs"], found["warmup"], found["rounds"]) == (True, 2, 7)
    assert found["threads"] == 1
    first, other, _ = found["models"]
    assert first.keys() == {
        *("model", "latency_ms", "latency_ratio", "load_ms", "load_ratio"),
        *("load_memory", "peak_memory", "memory_ratio", "size", "size_ratio"),
    }
    assert [model["model"] for model in found["models"]] == [str(conv), str(quant), str(conv)]
    assert set(first["latency_ratio"].values()) == {1.0}
    assert (first["load_ratio"], first["memory_ratio"], first["size_ratio"]) == (1, 1, 1)
    for model in found["models"]:
        for spread in (model["latency_ms"], model["latency_ratio"]):
            assert spread.keys() == {"low", "median", "high"}
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert model["load_ms"] > 0
        assert model["size"] == Path(model["model"]).stat().st_size
        assert model["size_ratio"] == model["size"] / first["size"]
        assert model["load_ratio"] == pytest.approx(model["load_ms"] / first["load_ms"])
    assert onnxq.Benchmark.model_validate_json(text).models[1].size == other["size"]
    assert contents(tmp_path).keys() == {"conv.onnx", "quant.onnx"}


@pytest.mark.usefixtures("seen")
def test_a_model_against_itself() -> None:
    found = onnxq.bench(DEMO, DEMO, runs=50, threads=1)
    assert 0.2 < found.models[1].latency_ratio.median < 5
    assert found.models[1].size_ratio == 1
    assert (found.rounds, found.warmup, found.threads) == (50, 5, 1)


def test_one_model_alone(conv: Path) -> None:
    assert len(onnxq.bench(str(conv), runs=1).models) == 1


def test_the_numbers_of_fake_runs(conv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owns = iter(
        benchmarking._Own(load_seconds=s, load_memory=m, peak_memory=p)
        for s, m, p in ((0.5, 100, 200), (0.25, 100, 300), (1.0, None, None))
    )
    times = np.array([[1.0, 2.0, 0.5], [2.0, 10.0, 1.0], [10.0, 10.0, 5.0]])
    monkeypatch.setattr(benchmarking, "time_in_turns", lambda *_, **__: times)
    monkeypatch.setattr(benchmarking, "_measure_one", lambda *_: next(owns))
    found = onnxq.bench(conv, conv, conv)
    assert [m.latency_ms.median for m in found.models] == [2000, 10000, 1000]
    assert [m.latency_ratio.median for m in found.models] == [1, 2, 0.5]
    assert (found.models[1].latency_ratio.low, found.models[1].latency_ratio.high) == (1.5, 3.5)
    assert [m.load_ms for m in found.models] == [500, 250, 1000]
    assert [m.load_ratio for m in found.models] == [1, 0.5, 2]
    assert [m.memory_ratio for m in found.models] == [1, 1.5, None]
    assert found.rounds == 3


def test_table(tmp_path: Path, conv: Path) -> None:
    quant = tmp_path / "quant.onnx"
    onnxq.quantize(conv, quant)
    out = works("bench", conv, quant, *QUICK, "--threads", 1)
    for heading in ("model", "ms", "latency", "25–75 %", "load", "memory", "size"):
        assert heading in out
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["conv.onnx", "quant.onnx"]
    assert rows[0][3].strip() == "1.00" and rows[0][4].strip() == "1.00–1.00"
    ratio = quant.stat().st_size / conv.stat().st_size
    assert rows[1][7].strip() == f"{ratio:.3f}"
    assert "medians of 3 runs in turns, 1 threads; made-up inputs: x 1×3×8×8" in _joined(out)


def _joined(out: str) -> str:
    return " ".join(out.split())


def test_names_that_are_alike_are_shown_with_their_folders(
    tmp_path: Path, conv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    write(small.conv_model(), tmp_path / "b" / "conv.onnx")
    monkeypatch.chdir(tmp_path)  # the process of its own has another folder
    assert "│ b/conv.onnx │" in works("bench", "conv.onnx", Path("b", "conv.onnx"), *QUICK)


def test_a_system_that_does_not_count_memory(conv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = benchmarking._Own(load_seconds=1.0, load_memory=None, peak_memory=None)
    monkeypatch.setattr(benchmarking, "_measure_one", lambda *_: own)
    assert "│      – │" in works("bench", conv, conv, *QUICK)
    found = json.loads(works("bench", conv, conv, *QUICK, "--json"))
    assert found["models"][0]["memory_ratio"] is None


def test_help() -> None:
    out = works("bench", "--help")
    assert out.startswith("Usage: ") and "FLOAT.onnx" in out and "QUANT.onnx" in out
    for option in ("threads", "batch", "data", "input-shape", "warmup", "runs", "seconds", "json"):
        assert f"--{option}" in out


# --- memory and load time


def test_memory_grows_with_the_weights(tmp_path: Path) -> None:
    text = "g (int64[1] i) => (float[1,SIZE] y) { y = Gather (w, i) }"
    tiny, large = (
        write(
            small.model(text.replace("SIZE", str(size)), {"w": np.ones((size, size), np.float32)}),
            tmp_path / f"{size}.onnx",
        )
        for size in (4, 4096)
    )
    ballast = b"x" * (300 * MIB)  # what this process holds is not the model's
    one, other = onnxq.bench(tiny, large, runs=1).models
    del ballast
    for model in (one, other):
        assert model.load_memory is not None and model.peak_memory is not None
        assert 0 < model.load_memory <= model.peak_memory
    assert one.peak_memory is not None and other.peak_memory is not None
    assert one.peak_memory < 64 * MIB < other.peak_memory
    assert other.load_memory is not None and other.load_memory > 64 * MIB


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_peak_memory_of_each_system(monkeypatch: pytest.MonkeyPatch) -> None:
    here = measure_process.peak_memory()
    assert here is not None and here > 10 * MIB
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for system, unit in (("darwin", 1), ("freebsd14", 1024)):
        monkeypatch.setattr(sys, "platform", system)
        found = measure_process.peak_memory()
        assert found is not None and peak * unit <= found
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert measure_process.peak_memory() is None


def test_load_time_is_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_seconds(*durations: float) -> tuple[float | int | None, list[int]]:
        now, left, threads = [0.0], iter(durations), []

        def open_session(_: str, **options: int) -> object:
            now[0] += next(left)
            threads.append(options["threads"])
            return object()

        monkeypatch.setattr(measure_process, "open_session", open_session)
        monkeypatch.setattr(measure_process, "run", lambda *_: [])
        monkeypatch.setattr(measure_process.time, "perf_counter", lambda: now[0])
        return measure_process.measure("m", {}, 3)["load_seconds"], threads

    seconds, threads = load_seconds(0.3, 0.1, 0.2, 0.1, 0.1)
    assert seconds == pytest.approx(0.1)
    assert threads == [3] * 5
    assert load_seconds(5.0)[0] == 5.0  # a slow one is not loaded again


def test_the_process_reports_errors_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, np.zeros((1, 1, 8, 8), np.float32))
    measure_process.main(str(DEMO), str(inputs), '["image"]', "")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out).keys() == {"load_seconds", "load_memory", "peak_memory"}
    with pytest.raises(SystemExit, match="onnxruntime cannot load"):
        measure_process.main(str(inputs), str(inputs), "[]", "1")
    with pytest.raises(SystemExit, match="the run fails in onnxruntime"):
        measure_process.main(str(DEMO), str(inputs), '["other"]', "1")


# --- options


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the sessions, the turns and the processes."""
    seen: dict[str, Any] = {"threads": [], "child": []}
    open_session, in_turns = benchmarking.open_session, benchmarking.time_in_turns

    def opening(path: Path, *, threads: int | None) -> Any:
        seen["threads"].append(threads)
        return open_session(path, threads=threads)

    def turns(runs: Any, **options: Any) -> np.ndarray:
        seen["turns"] = options
        seen["feed"] = runs[0].args[1]
        return in_turns(runs, **options)

    def process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        names = json.loads(command[5])
        with np.load(command[4]) as file:
            feed = {name: file[f"arr_{i}"] for i, name in enumerate(names)}
        assert feed.keys() == seen["feed"].keys()
        for name, array in feed.items():  # the processes run on the very same
            np.testing.assert_array_equal(array, seen["feed"][name], strict=True)
        seen["child"].append(command[6])
        own = '{"load_seconds": 1, "load_memory": 1, "peak_memory": 2}\n'
        return subprocess.CompletedProcess(command, 0, "noise of a library\n" + own, "")

    monkeypatch.setattr(benchmarking, "open_session", opening)
    monkeypatch.setattr(benchmarking, "time_in_turns", turns)
    monkeypatch.setattr(benchmarking.subprocess, "run", process)
    return seen


def test_options_reach_what_they_are_for(conv: Path, seen: dict[str, Any]) -> None:
    works(
        *("bench", conv, DEMO.parent / ".." / conv, "--threads", 3, "--runs", 4),
        *("--warmup", 1, "--seconds", 2.5),
    )
    assert seen["threads"] == [3, 3]
    assert seen["child"] == ["3", "3"]
    options = {name: seen["turns"][name] for name in ("warmup", "rounds", "seconds")}
    assert options == {"warmup": 1, "rounds": 4, "seconds": 2.5}
    assert seen["turns"]["progress"] is not None


def test_defaults(conv: Path, seen: dict[str, Any]) -> None:
    assert "100 runs in turns, default threads;" in _joined(works("bench", conv, conv))
    assert seen["threads"] == [None, None]
    assert seen["child"] == ["", ""]
    options = {name: seen["turns"][name] for name in ("warmup", "rounds", "seconds")}
    assert options == {"warmup": 5, "rounds": 100, "seconds": 10.0}


def test_progress(conv: Path, seen: dict[str, Any]) -> None:
    states: list[tuple[str, int, int]] = []
    onnxq.bench(conv, conv, runs=2, progress=lambda *state: states.append(state))
    assert states == [("rounds", 1, 2), ("rounds", 2, 2), ("memory", 1, 2), ("memory", 2, 2)]


def _shapes(seen: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in seen["feed"].items()}


def test_batch(tmp_path: Path, seen: dict[str, Any]) -> None:
    source = _open(tmp_path)
    found = json.loads(works("bench", source, source, *QUICK, "--json", "--batch", 5))
    shapes = {"x": [5, 4], "s": [2], "m": [5, 64]}
    assert _shapes(seen) == shapes == found["inputs"]
    works("bench", source, source, *QUICK)
    assert _shapes(seen) == {"x": [1, 4], "s": [2], "m": [1, 64]}


def test_batch_where_the_dimension_has_no_name(tmp_path: Path, seen: dict[str, Any]) -> None:
    proto = small.model("g (float[N,4] x) => (float[N,4] y) { y = Neg (x) }")
    proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    source = write(proto, tmp_path / "in.onnx")
    works("bench", source, source, *QUICK, "--batch", 5)
    assert _shapes(seen) == {"x": [5, 4]}


def test_input_shapes(tmp_path: Path, seen: dict[str, Any]) -> None:
    source = _open(tmp_path)
    works("bench", source, source, *QUICK, "--input-shape", "m=3,7")
    assert _shapes(seen) == {"x": [3, 4], "s": [2], "m": [3, 7]}
    works("bench", source, source, *QUICK, "--batch", 3, "--input-shape", "m=3,7")
    assert _shapes(seen) == {"x": [3, 4], "s": [2], "m": [3, 7]}


def test_data(tmp_path: Path, seen: dict[str, Any]) -> None:
    with np.load(DIGITS) as file:
        images = file["image"]
    out = works("bench", DEMO, DEMO, *QUICK, "--data", DIGITS)
    assert "; inputs: image 1×1×8×8" in _joined(out)
    np.testing.assert_array_equal(seen["feed"]["image"], images[:1])
    works("bench", DEMO, DEMO, *QUICK, "--data", DIGITS, "--batch", 32)
    np.testing.assert_array_equal(seen["feed"]["image"], images[:32])
    assert not onnxq.bench(DEMO, DEMO, data={"image": images}, batch=2, runs=1).made_up_inputs
    np.testing.assert_array_equal(seen["feed"]["image"], images[:2])


def test_batches_of_data_with_an_input_of_fixed_size(tmp_path: Path, seen: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    x, m, s = (rng.random(shape, np.float32) for shape in ((6, 4), (6, 3), (6, 2)))
    source = _open(tmp_path)
    onnxq.bench(source, source, data={"x": x, "s": s, "m": m}, batch=3, runs=1)
    for name, want in {"x": x[:3], "s": s[0], "m": m[:3]}.items():
        np.testing.assert_array_equal(seen["feed"][name], want)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a/b=c,1", "-x", "é×"])
def test_odd_names_of_inputs(tmp_path: Path, name: str) -> None:
    proto = small.conv_model()
    proto.graph.input[0].name = proto.graph.node[0].input[0] = name
    source = write(proto, tmp_path / "-ö 1.onnx")
    assert onnxq.bench(source, runs=1, warmup=0).inputs == {name: (1, 3, 8, 8)}


def test_a_model_without_inputs(tmp_path: Path) -> None:
    proto = small.model("g () => (float[3] y) { y = Neg (w) }", {"w": small.weights(3)})
    source = write(proto, tmp_path / "in.onnx")
    assert onnxq.bench(source, runs=1).inputs == {}


@pytest.mark.usefixtures("seen")
def test_external_data_count_as_size(tmp_path: Path, conv: Path) -> None:
    (tmp_path / "sub").mkdir()
    outside = tmp_path / "sub" / "outside.onnx"
    onnx.save(
        small.conv_model(), outside, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    found = onnxq.bench(conv, outside, runs=1)
    size = sum(path.stat().st_size for path in (tmp_path / "sub").iterdir())
    assert found.models[1].size == size
    assert found.models[1].size_ratio == size / conv.stat().st_size


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--threads 0", "'--threads'"),
        ("--batch 0", "--batch 0: must be 1 or more"),
        ("--runs 0", "--runs 0: must be 1 or more"),
        ("--warmup -1", "--warmup -1: must be 0 or more"),
        ("--seconds 0", "--seconds 0.0: must be more than 0"),
        ("--seconds nan", "--seconds nan: must be more than 0"),
        ("--batch 2 --input-shape m=3,7", "--batch 2 contradicts --input-shape m=3,7: leave"),
        ("--batch 2 --input-shape q=3", "--input-shape: no input 'q'"),
        ("--input-shape m=3", "--input-shape m=3: the input is ['N', 'M']"),
        ("--data DIGITS --input-shape m=3,7", "--input-shape is for made-up inputs"),
        ("--data DIGITS --batch 2 --input-shape m=3,7", "--input-shape is for made-up inputs"),
        ("--data DIGITS", "no array for input 'm'"),
        ("--data DIGITS --batch 2", "no array for input 'm'"),
        ("--data nowhere.npz", "data nowhere.npz: cannot be read (No such file or directory)"),
    ],
)
def test_bad_options(tmp_path: Path, options: str, message: str) -> None:
    source = _open(tmp_path)
    arguments = options.replace("DIGITS", str(DIGITS)).split()
    assert message in refused(tmp_path, "bench", source, source, *arguments)


def test_no_threads_at_all() -> None:
    with pytest.raises(ConfigError, match="--threads 0: must be 1 or more"):
        onnxq.bench(DEMO, DEMO, threads=0)


def test_a_batch_that_is_not_open(tmp_path: Path, conv: Path) -> None:
    message = refused(tmp_path, "bench", conv, conv, "--batch", 2)
    assert message == (
        "--batch 2: no input has an open first dimension (they are {'x': [1, 3, 8, 8]}): leave it "
        "away"
    )


def test_a_batch_that_the_data_do_not_give(tmp_path: Path) -> None:
    source = write(
        small.model("g (float[N,4] x) => (float[N,4] y) { y = Neg (x) }"), tmp_path / "in.onnx"
    )
    np.savez(tmp_path / "few.npz", x=np.ones((3, 4), np.float32))
    np.savez(tmp_path / "whole.npz", x=np.ones((3, 2, 4), np.float32))
    arguments = ("bench", source, source, "--batch", 4, "--data")
    assert refused(tmp_path, *arguments, tmp_path / "few.npz") == (
        "--batch 4: the data hold only 3 samples"
    )
    assert refused(tmp_path, *arguments, tmp_path / "whole.npz") == (
        "--batch 4: array 'x' holds whole inputs; leave it away, or give samples along the input's "
        "own first axis"
    )


def test_missing_files(tmp_path: Path, conv: Path) -> None:
    for bad in (tmp_path / "no.onnx", tmp_path):
        for models in ((bad, conv), (conv, bad), (conv, conv, bad)):
            message = refused(tmp_path, "bench", *models)
            assert message == f"model {bad}: no such file; check the path"
    assert "Missing argument" in refused(tmp_path, "bench", conv)


def test_no_model(tmp_path: Path, conv: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    message = refused(tmp_path, "bench", conv, tmp_path / "bad.onnx")
    assert message == f"{tmp_path / 'bad.onnx'} is not an ONNX model, or is damaged"
    unknown = small.conv_model()
    unknown.graph.node[1].op_type = "Unknown"
    message = refused(tmp_path, "bench", conv, write(unknown, tmp_path / "unknown.onnx"))
    assert message.startswith(f"onnxruntime cannot load {tmp_path / 'unknown.onnx'}: ")


def test_no_pair(tmp_path: Path, conv: Path) -> None:
    message = refused(tmp_path, "bench", conv, conv, DEMO)
    assert message == (
        f"{conv} and {DEMO} are no pair: their inputs are ['x'] and ['image']; give a float model "
        "and what was made from it"
    )


def test_a_model_that_fails(tmp_path: Path, conv: Path) -> None:
    text = "g (float[1,3,N,N] x) => (float[A,B] y) { y = Reshape (x, shape) }"
    proto = small.model(text, {"shape": np.array([7, 7], np.int64)})
    bad = write(proto, tmp_path / "bad.onnx")
    message = refused(tmp_path, "bench", conv, bad)
    assert message.startswith(f"{bad}: the run fails in onnxruntime: ")
    text = "g (float[1,3,16,16] x) => (float[1,3,16,16] y) { y = Neg (x) }"
    other = write(small.model(text), tmp_path / "other.onnx")
    message = refused(tmp_path, "bench", conv, other)
    assert message.startswith(f"{other}: the run fails in onnxruntime: ")


@pytest.mark.parametrize(
    ("done", "why"),
    [
        ((-9, "", ""), "exit code -9"),
        ((1, "", "Traceback\nMemoryError\n"), "MemoryError"),
        ((1, "", "it cannot be loaded\n"), "it cannot be loaded"),
        ((0, "", ""), "it does not say what it measured"),
        ((0, "{}\n", ""), "it does not say what it measured"),
    ],
)
def test_a_process_that_fails(
    tmp_path: Path,
    conv: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: tuple[int, str, str],
    why: str,
) -> None:
    ended = subprocess.CompletedProcess([], *done)
    monkeypatch.setattr(benchmarking.subprocess, "run", lambda *_, **__: ended)
    message = refused(tmp_path, "bench", conv, conv, *QUICK)
    assert message == f"{conv}: measuring it in a process of its own fails: {why}"


def test_a_model_that_goes_away_meanwhile(tmp_path: Path, conv: Path) -> None:
    other = write(small.conv_model(), tmp_path / "other.onnx")

    def remove(*_: object) -> None:
        other.unlink(missing_ok=True)

    with pytest.raises(ValidationError, match=r"other.onnx: measuring .* onnxruntime cannot load"):
        onnxq.bench(conv, other, runs=1, progress=remove)


def test_no_room_for_the_inputs(
    tmp_path: Path, conv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(benchmarking.np, "savez", full)
    message = refused(tmp_path, "bench", conv, conv, *QUICK)
    assert "cannot be written to" in message and "(No space left on device)" in message


@pytest.mark.parametrize("name", ["time_in_turns", "_measure_one"])
def test_interrupt(conv: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarking, name, interrupt)
    done = command("bench", conv, conv, *QUICK)
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err and done.err.count("\n") <= 1


def test_the_errors_of_the_api(tmp_path: Path, conv: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        onnxq.bench(conv, tmp_path / "no.onnx")
    with pytest.raises(ConfigError, match="no array for input 'x'"):
        onnxq.bench(conv, data={}, batch=None)
    with pytest.raises(ValidationError, match="no pair"):
        onnxq.bench(conv, DEMO)
    with pytest.raises(ModelError, match="damaged"):
        onnxq.bench(conv, DIGITS)
