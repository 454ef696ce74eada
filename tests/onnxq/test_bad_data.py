"""Data that do not fit the model end in one line, before any work is done."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from command import DEMO, refused, write

import onnxq.api
from onnxq.errors import ConfigError
from onnxq.feeds import load_data
from onnxq.session import InputSpec

IMAGES = np.zeros((4, 1, 8, 8), np.float32)
LABELS = np.arange(4)


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxq.api, "rewrite", lambda *_, **__: pytest.fail("the work was begun"))


def _refused(folder: Path, data: Path, source: Path = DEMO) -> str:
    message = refused(folder, "quantize", source, folder / "out.onnx", "--data", data)
    assert refused(folder, "compare", source, source, "--data", data) == message
    assert message.startswith(f"data {data}: ")
    return message


def test_missing_file(tmp_path: Path) -> None:
    message = _refused(tmp_path, tmp_path / "no.npz")
    assert "cannot be read (No such file or directory)" in message


def test_a_folder(tmp_path: Path) -> None:
    assert "cannot be read (Is a directory)" in _refused(tmp_path, tmp_path)


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04" + bytes(90)])
def test_not_an_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    assert "not an .npz of plain arrays" in _refused(tmp_path, tmp_path / "x.npz")


def test_one_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    assert "not an .npz of plain arrays" in _refused(tmp_path, tmp_path / "x.npy")


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged(tmp_path: Path, compressed: bool) -> None:
    data = tmp_path / "x.npz"
    values = np.random.default_rng(0).standard_normal(IMAGES.shape).astype(np.float32)
    (np.savez_compressed if compressed else np.savez)(data, image=values)
    good = data.read_bytes()
    for at in range(0, len(good) - 8, len(good) // 12):
        data.write_bytes(good[:at])
        assert "not an .npz of plain arrays" in _refused(tmp_path, data)
    for at in range(100, 400, 50):
        data.write_bytes(good[:at] + bytes(b ^ 0xFF for b in good[at : at + 8]) + good[at + 8 :])
        assert "not an .npz of plain arrays" in _refused(tmp_path, data)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("image.npy", b"text")
    assert "not an .npz of plain arrays" in _refused(tmp_path, tmp_path / "x.npz")


def test_pickled(tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    np.savez(tmp_path / "x.npz", allow_pickle=True, image=np.array([Bomb()], object))
    assert "plain arrays" in _refused(tmp_path, tmp_path / "x.npz")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({}, ["no array for input 'image'"]),
        ({"label": LABELS}, ["no array for input 'image'"]),
        ({"img": IMAGES}, ["no array for input 'image'; array 'img' is no input", "['image']"]),
        ({"image": IMAGES, "extra": IMAGES}, ["array 'extra' is no input"]),
        ({"image": IMAGES.astype("U4")}, ["'image' is str", "the input is float32"]),
        ({"image": IMAGES.astype(np.complex64)}, ["'image' is complex64"]),
        ({"image": IMAGES[0, 0]}, ["shape [8, 8]", "give samples along the first axis"]),
        ({"image": IMAGES[None, None]}, ["shape [1, 1, 4, 1, 8, 8]"]),
        ({"image": np.float32(1)}, ["shape []"]),
        ({"image": IMAGES[..., :7]}, ["[4, 1, 8, 7]", "['N', 1, 8, 8]", "dimension 3 differs"]),
        ({"image": np.repeat(IMAGES, 3, axis=1)}, ["dimension 1 differs"]),
        ({"image": IMAGES[:0]}, ["different or no numbers of samples", "'image': 0"]),
        ({"image": IMAGES * np.nan}, ["'image' has NaN or Inf, first in sample 0"]),
        ({"image": np.where(np.arange(4)[:, None, None, None] == 2, np.inf, IMAGES)}, ["sample 2"]),
        ({"image": IMAGES, "label": LABELS[:3]}, ["3 labels for 4 samples"]),
        ({"image": IMAGES, "label": np.eye(4, dtype=int)}, ["16 labels for 4 samples"]),
        ({"image": IMAGES, "label": np.array(3)}, ["1 labels for 4 samples"]),
        ({"image": IMAGES, "label": LABELS * 1.0}, ["'label' is float64; give the classes"]),
        ({"image": IMAGES, "label": LABELS.astype("U1")}, ["'label' is str"]),
    ],
)
def test_arrays(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    message = _refused(tmp_path, tmp_path / "x.npz")
    for part in parts:
        assert part in message, message


def _two_inputs(folder: Path) -> Path:
    text = """g (float[N,4] x, int64[M] i) => (float[K,3] y) {
        [pick] p = Gather (x, i)
        [dot] y = MatMul (p, w)
    }"""
    return write(small.model(text, {"w": small.weights(4, 3)}), folder / "in.onnx")


def test_different_numbers_of_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4), np.float32), i=np.zeros(2, np.int64))
    message = _refused(tmp_path, tmp_path / "x.npz", _two_inputs(tmp_path))
    assert "different or no numbers of samples: {'x': 3, 'i': 2}" in message


def test_integers_are_not_made_from_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4), np.float32), i=np.zeros(3, np.float32))
    message = _refused(tmp_path, tmp_path / "x.npz", _two_inputs(tmp_path))
    assert "array 'i' is float32, the input is int64" in message


def test_the_model_fails_on_the_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 4), np.float32), i=np.full(1, 7))
    message = _refused(tmp_path, tmp_path / "x.npz", _two_inputs(tmp_path))
    assert "the float model fails on it: " in message


def test_a_fixed_batch_wants_a_multiple(tmp_path: Path) -> None:
    text = "g (float[3,4] x) => (float[3,2] y) { [dot] y = MatMul (x, w) }"
    source = write(small.model(text, {"w": small.weights(4, 2)}), tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", x=np.zeros((7, 4), np.float32))
    message = _refused(tmp_path, tmp_path / "x.npz", source)
    assert "7 samples, but the model takes batches of 3: give a multiple" in message


def test_a_model_without_inputs(tmp_path: Path) -> None:
    text = "g () => (float[2,2] y) { r = RandomNormal <shape = [2,4]> () [dot] y = MatMul (r, w) }"
    source = write(small.model(text, {"w": small.weights(4, 2)}), tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", label=LABELS)
    assert "the model has no inputs" in _refused(tmp_path, tmp_path / "x.npz", source)


def test_integers_that_the_input_cannot_hold(tmp_path: Path) -> None:
    specs = [InputSpec("ids", np.int32, (None, 4))]
    with pytest.raises(ConfigError, match="'ids' holds values outside int32"):
        load_data({"ids": np.full((2, 4), 2**40)}, specs)
    assert load_data({"ids": np.full((2, 4), 2**30)}, specs).arrays["ids"].dtype == np.int32
