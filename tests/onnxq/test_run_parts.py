"""Running a split model: equal to the single file, and never a hang."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from expanding import gamma
from small import model, run, weights
from splitting import chain, quantized, split_to

import onnxq.parts.part as part_module
from onnxq.errors import ConfigError, ValidationError
from onnxq.parts.runner import PartsRunner, run_parts, run_parts_file
from onnxq.parts.splitting import split

Array = np.ndarray
X = {"x": weights(2, 3, 6, 6, seed=5)}


WHOLE = quantized(chain(batch="N"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_to(tmp_path_factory.mktemp("two"), WHOLE)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions without optimisation: fusions differ where a model is cut, and round otherwise."""
    monkeypatch.setattr(
        part_module, "open_session", partial(part_module.open_session, optimize=False)
    )


def one_product() -> onnx.ModelProto:
    return model(
        "g (float[N,8] x) => (float[N,8] y) { [one] a = MatMul (x, w) y = Relu (a) }",
        {"w": weights(8, 8)},
    )


# --- the same outputs


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("parts", [2, 3])
def test_threads_give_the_bits_of_the_single_file(tmp_path: Path, parts: int) -> None:
    """As many parts as terms, added in their order: the same float32 operations."""
    whole = quantized(chain(batch="N"), parts)
    got = run_parts(split_to(tmp_path, whole, parts), X)
    assert list(got) == ["y"]
    np.testing.assert_array_equal(got["y"], run(whole, X, optimize=False)[0])


def test_processes_give_the_bits_of_threads(two: Path) -> None:
    with PartsRunner(two, backend="processes") as runner:
        for batch in (1, 3, 1):
            feed = {"x": weights(batch, 3, 6, 6, seed=batch)}
            got = runner.run(feed)["y"]
            np.testing.assert_array_equal(got, run_parts(two, feed)["y"])
            assert runner.reduced_bytes == 2 * batch * 3 * 6 * 6 * 4


def test_fewer_parts_than_terms_round_otherwise(tmp_path: Path) -> None:
    """Terms 0 + 2 and 1 + 3 are added first: both sums of 4 are within gamma(3) of the exact one.

    |addend| is bounded by its share of |x| · |W|, at most twice the float product's (each term is
    smaller than the one before); the dynamic quantization of x is the same in both.
    """
    whole = quantized(one_product(), 4)
    x = {"x": weights(5, 8, seed=3)}
    got = run_parts(split_to(tmp_path, whole, 2), x)["y"]
    want = run(whole, x)[0]
    limit = 2 * gamma(3) * 2 * (np.abs(x["x"]) @ np.abs(weights(8, 8)) * 1.1)
    assert (np.abs(got - want) <= limit).all()


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("batch", ["N", "2"])
def test_a_part_that_adds_nothing_knows_how_much_nothing(tmp_path: Path, batch: str) -> None:
    """Zeros of the sum's shape, from the manifest, or, where that is open, from another part."""
    whole = quantized(chain(batch=batch), {"one": 3, "two": 2})
    out = split_to(tmp_path, whole, 3)
    with PartsRunner(out) as runner:
        got = runner.run(X)["y"]
        exchanged = runner.reduced_bytes - 2 * X["x"].nbytes
    np.testing.assert_array_equal(got, run(whole, X, optimize=False)[0])
    assert exchanged == (4 * 8 if batch == "N" else 0)


@pytest.mark.usefixtures("plain")
def test_a_part_with_an_empty_stage(tmp_path: Path) -> None:
    proto = model(
        """g (float[N,6] x) => (float[N,6] y) {
            [one] a = MatMul (x, w)
            [two] y = MatMul (a, w)
        }""",
        {"w": weights(6, 6)},
    )
    whole = quantized(proto, {"one": 2, "two": 3})
    out = split_to(tmp_path, whole, 3)
    assert not (out / "part2" / "stage00.onnx").exists()
    x = {"x": weights(4, 6, seed=2)}
    np.testing.assert_array_equal(run_parts(out, x)["y"], run(whole, x, optimize=False)[0])


def test_an_empty_batch(tmp_path: Path) -> None:
    whole = quantized(one_product(), activations="none")
    out = split_to(tmp_path, whole)
    empty = {"x": np.zeros((0, 8), np.float32)}
    for backend in ("threads", "processes"):
        assert run_parts(out, empty, backend=backend)["y"].shape == (0, 8)  # type: ignore[arg-type]


def test_text_goes_to_other_processes_too(tmp_path: Path) -> None:
    proto = model(
        """g (float[4,6] x, string[N] s) => (float[4,6] y, string[N] t) {
            [one] y = MatMul (x, w)
            t = Identity (s)
        }""",
        {"w": weights(6, 6)},
    )
    feed = {"x": weights(4, 6), "s": np.array(["a", "ö"], object)}
    onnx.save(quantized(proto), tmp_path / "m.onnx")
    split(tmp_path / "m.onnx", tmp_path / "out", parts=2)
    got = run_parts(tmp_path / "out", feed, backend="processes")
    assert list(got["t"]) == ["a", "ö"]


@pytest.mark.parametrize("extra", [{}, {"label": np.arange(2)}])
def test_files_in_and_out(two: Path, tmp_path: Path, extra: dict[str, Array]) -> None:
    np.savez(tmp_path / "in.npz", **X, **extra)
    shapes = run_parts_file(two, tmp_path / "in.npz", tmp_path / "out.npz")
    assert shapes == {"y": (2, 3, 6, 6)}
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["y"], run_parts(two, X)["y"])
    with pytest.raises(ConfigError, match="would overwrite the data"):
        run_parts_file(two, tmp_path / "in.npz", tmp_path / "in.npz")


# --- what goes wrong


@pytest.mark.parametrize("name", ["parts.json", "part0/stage00.onnx", "part1/new.npz"])
def test_outputs_do_not_go_into_the_folder(two: Path, tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "in.npz", **X)
    before = {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="lies in the folder of the parts"):
        run_parts_file(two, tmp_path / "in.npz", two / "part0" / ".." / name)
    assert before == {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}


@pytest.fixture
def copied(two: Path, tmp_path: Path) -> Path:
    shutil.copytree(two, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Whatever a test waits for takes less than this."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 100
    assert [t for t in threading.enumerate() if t.name.startswith("onnxq-part")] == []


BACKENDS: list[Any] = ["threads", "processes"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_part(copied: Path, backend: Any) -> None:
    shutil.rmtree(copied / "part1")
    with pytest.raises(ConfigError, match=r"part1/stage00\.onnx: no such file: copy the whole"):
        PartsRunner(copied, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stage_of_another_split(copied: Path, tmp_path: Path, backend: Any) -> None:
    (tmp_path / "other").mkdir()
    other = split_to(tmp_path / "other", quantized(chain(batch="N"), bits=5))
    shutil.copy(other / "part1" / "stage01.onnx", copied / "part1" / "stage01.onnx")
    with pytest.raises(ConfigError, match=r"part1/stage01\.onnx belongs to another split"):
        PartsRunner(copied, backend=backend)


def test_a_stage_that_is_no_model(copied: Path) -> None:
    (copied / "part1" / "stage01.onnx").write_bytes(b"damaged")
    with pytest.raises(ValidationError, match=r"onnxruntime cannot load .*stage01\.onnx"):
        PartsRunner(copied)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"inputs \[\] given, but the model has \['x'\]"),
        ({"z": X["x"], **X}, "given, but"),
        ({"x": X["x"].astype(np.float64)}, r"float64 .* takes float32 of shape \[None, 3, 6, 6\]"),
        ({"x": X["x"][0]}, r"shape \[3, 6, 6\], but"),
    ],
)
def test_a_wrong_input_leaves_the_runner_open(
    two: Path, feed: dict[str, Array], message: str
) -> None:
    with PartsRunner(two) as runner:
        with pytest.raises(ConfigError, match=message):
            runner.run(feed)
        assert runner.run(X)["y"].shape == X["x"].shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_on_which_the_model_fails_closes_it(two: Path, backend: Any) -> None:
    with PartsRunner(two, backend=backend) as runner:
        with pytest.raises(ValidationError, match="stage 0 fails in onnxruntime"):
            runner.run({"x": np.zeros((1, 4, 6, 6), np.float32)})
        with pytest.raises(ConfigError, match="closed"):
            runner.run(X)
        runner.close()


def test_one_part_that_fails_wakes_the_others_and_is_named(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = part_module._run_stage

    def second_fails(session: Any, s: int, stage: Any, known: Any) -> Any:
        if s == 1 and "part1" in str(stage.model):
            raise ValidationError("out of memory")
        return real(session, s, stage, known)

    monkeypatch.setattr(part_module, "_run_stage", second_fails)
    with PartsRunner(two, timeout=60) as runner:
        start = time.monotonic()
        with pytest.raises(ValidationError, match="out of memory"):
            runner.run(X)
        assert time.monotonic() - start < 30


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_a_process_that_dies(two: Path) -> None:
    with PartsRunner(two, backend="processes") as runner:
        runner.run(X)
        (process,) = runner._runner._processes  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(ConfigError, match="part 1 ended before its work was done"):
            runner.run(X)
    assert not process.is_alive()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_process_that_does_not_answer(two: Path) -> None:
    runner = PartsRunner(two, backend="processes", timeout=20)
    runner._runner._hub._timeout = 0.5  # type: ignore[union-attr]
    (process,) = runner._runner._processes  # type: ignore[union-attr]
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError, match=r"part 1 did not answer within 0\.5 s: raise --timeout"):
        runner.run(X)
    assert not process.is_alive()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_process_that_does_not_read(two: Path) -> None:
    """More than a pipe holds."""
    runner = PartsRunner(two, backend="processes", timeout=10)
    (process,) = runner._runner._processes  # type: ignore[union-attr]
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError, match="part 1 does not take what it is sent"):
        runner.run({"x": np.zeros((4000, 3, 6, 6), np.float32)})


def test_a_thread_that_does_not_answer(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = part_module._run_stage

    def slow(session: Any, s: int, stage: Any, known: Any) -> Any:
        if "part1" in str(stage.model):
            time.sleep(2)
        return real(session, s, stage, known)

    monkeypatch.setattr(part_module, "_run_stage", slow)
    with (
        PartsRunner(two, timeout=0.2) as runner,
        pytest.raises(ConfigError, match="another part failed, or did not answer in time"),
    ):
        runner.run(X)


def test_the_processes_end_with_the_runner(two: Path) -> None:
    runner = PartsRunner(two, backend="processes")
    (process,) = runner._runner._processes  # type: ignore[union-attr]
    runner.close()
    assert process.exitcode == 0


def test_a_script_without_a_main_guard_is_told_so(two: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from onnxq.parts.runner import PartsRunner\n"
        f"PartsRunner({str(two)!r}, backend='processes')\n"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert '`if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "options", [{"backend": "carrier pigeon"}, {"threads": 0}, {"timeout": 0}, {"timeout": -1.0}]
)
def test_bad_options(two: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        PartsRunner(two, **options)
