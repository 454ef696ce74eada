"""Calibration samples that do not fit end in one line, and nothing is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from command import contents, onnxq, refused, write
from PIL import Image

X = np.random.default_rng(0).standard_normal((9, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(small.conv_model(), tmp_path / "in.onnx")


def refuse(source: Path, samples: Path, *options: object, activations: str = "static") -> str:
    out = source.with_name("out.onnx")
    plan = ("--plan-out", source.with_name("plan.json"))
    given = ("--activations", activations, "--calibration", samples, *plan, *options)
    return refused(source.parent, "quantize", source, out, *given)


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def images(folder: Path, count: int = 3) -> Path:
    (folder / "images").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
    return folder / "images"


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"img": X}, ["no array for input 'x'", "'img' is no input"]),
        ({"x": X, "z": X}, ["'z' is no input"]),
        ({"x": X.astype("U4")}, ["'x' is str", "float32"]),
        ({"x": X[:, 0]}, ["shape [9, 8, 8]", "samples along the first axis"]),
        ({"x": X[..., :4]}, ["dimension 3 differs"]),
        ({"x": X[:0]}, ["no numbers of samples"]),
        ({"x": np.where(np.arange(9)[:, None, None, None] == 5, np.nan, X)}, ["NaN", "sample 5"]),
    ],
)
def test_arrays(source: Path, arrays: dict[str, Any], parts: list[str], activations: str) -> None:
    samples = npz(source.parent, **arrays)
    message = refuse(source, samples, activations=activations)
    assert message.startswith(f"calibration {samples}: ")
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_files_that_are_damaged(source: Path, content: bytes | None) -> None:
    samples = npz(source.parent, x=X)
    samples.write_bytes(samples.read_bytes()[:500] if content is None else content)
    assert "not an .npz of plain arrays" in refuse(source, samples)


def test_objects(source: Path) -> None:
    samples = npz(source.parent, x=np.array([1, "a"], object))
    assert "not an .npz of plain arrays" in refuse(source, samples)


def test_a_folder_of_nothing_and_of_both(source: Path) -> None:
    (source.parent / "empty").mkdir()
    assert "no samples in it" in refuse(source, source.parent / "empty")
    folder = images(source.parent)
    np.savez(folder / "x.npz", x=X)
    assert "holds 1 .npz and 3 images: keep one kind" in refuse(source, folder)


def test_images(source: Path) -> None:
    folder = images(source.parent)
    assert "mean has 2 values: give 1, or 3" in refuse(source, folder, "--mean", "1,2")
    assert "have to be finite" in refuse(source, folder, "--mean", "nan")
    assert "nor std 0 or less" in refuse(source, folder, "--std", "0")
    assert "takes 8 × 8" in refuse(source, folder, "--image-size", "9,9")
    assert "separated by commas" in refuse(source, folder, "--image-size", "9x9")
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:90])
    assert f"calibration {folder / '1.png'}: cannot be used" in refuse(source, folder)


def test_images_that_do_not_fit_into_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise MemoryError

    folder = images(source.parent)
    monkeypatch.setattr("PIL.ImageOps.fit", full)
    assert "8 × 8 pixels do not fit into memory" in refuse(source, folder)


def test_images_without_a_size_or_for_two_inputs(tmp_path: Path) -> None:
    folder, weights = images(tmp_path), {"w": small.weights(4, 3, 3, 3)}
    text = "g (float[N,3,H,W] x) => (float[N,4,P,Q] y) { y = Conv (x, w) }"
    source = write(small.model(text, weights), tmp_path / "in.onnx")
    assert "leaves height and width open" in refuse(source, folder)
    assert "0.png: the float model fails on it" in refuse(source, folder, "--image-size", "1,1")
    text = "g (float[N,3,8,8] x, float[N,3,8,8] z) => (float[N,4,6,6] y) { s = Add (x, z) %s }"
    write(small.model(text % "y = Conv (s, w)", weights), source)
    assert "the model has 2 inputs ['x', 'z']" in refuse(source, folder)


def test_the_sample_on_which_the_model_fails_is_named(tmp_path: Path) -> None:
    text = "g (float[N,4] x, int64[M] i) => (float[K,3] y) { p = Gather (x, i) y = MatMul (p, w) }"
    source = write(small.model(text, {"w": small.weights(4, 3)}), tmp_path / "in.onnx")
    samples = npz(tmp_path, x=np.ones((3, 1, 4), np.float32), i=np.array([[0], [7], [0]]))
    message = refuse(source, samples)
    assert message.startswith(f"calibration {samples}, sample 1: the float model fails on it")


def test_options_that_contradict(source: Path) -> None:
    samples, out = npz(source.parent, x=X), source.with_name("out.onnx")
    quantize = ("quantize", source, out)
    assert "needs ranges" in refused(source.parent, *quantize, "--activations", "static")
    assert "without --calibration" in refused(source.parent, *quantize, "--mean", "1")
    assert "leave the image options away" in refuse(source, samples, "--mean", "1")
    given = ("--calibration", samples)
    message = refused(source.parent, "quantize", source, samples, *given)
    assert "would overwrite the calibration" in message
    assert onnxq(*quantize, *given, "--plan-out", source.with_name("p.json")).code == 0
    message = refused(source.parent, *quantize, *given, "--plan", source.with_name("p.json"))
    assert "--calibration beside --plan" in message


def test_few_samples_are_a_warning(source: Path) -> None:
    samples = npz(source.parent, x=X[:3])
    given = ("--activations", "static", "--calibration", samples)
    done = onnxq("quantize", source, source.with_name("out.onnx"), *given)
    assert (done.code, done.err) == (0, "")
    assert "has 3 samples: ranges may be too narrow" in " ".join(done.out.split())


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_ranges_are_measured(source: Path) -> None:
    """The end is 130, nothing is written, and no traceback is shown."""
    samples = npz(source.parent, x=np.tile(X, (4000, 1, 1, 1)))
    before = contents(source.parent)
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from onnxq import observing\n"
        "session = observing._session\n"
        "def loud(*args):\n"
        "    print('begun', flush=True)\n"
        "    return session(*args)\n"
        "observing._session = loud\n"
        "from onnxq.cli import main\nmain()"
    )
    given = ("--activations", "static", "--calibration", str(samples), "--quiet")
    command = ["quantize", str(source), str(source.with_name("out.onnx")), *given]
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", script, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.count("\n") <= 1
    assert contents(source.parent) == before


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_a_sample_on_which_the_model_fails_is_named(tmp_path: Path, activations: str) -> None:
    text = """g (int64[N,2] i) => (float[N,2,3] y) {
        [rows] e = Gather (t, i)
        [dot] y = MatMul (e, w)
    }"""
    proto = small.model(text, {"t": small.weights(5, 4), "w": small.weights(4, 3)})
    source = write(proto, tmp_path / "in.onnx")
    np.savez(tmp_path / "c.npz", i=np.array([[0, 1], [2, 3], [4, 5]]))
    message = refused(
        *(tmp_path, "quantize", source, tmp_path / "out.onnx", "--calibration", tmp_path / "c.npz"),
        *("--activations", activations, "--terms", "1"),
    )
    assert "sample 2: the float model fails on it" in message
