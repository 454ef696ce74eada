"""Files and folders of arrays as calibration samples."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from feeding import NAN, TWO, X, refused, rows, seen, spec

from onnxq.calibration import open_calibration
from onnxq.errors import CalibrationError


def test_one_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(9))
    assert seen(open_calibration(tmp_path / "x.npy", [X])) == list(range(9))


@pytest.mark.parametrize("name", ["c.npz", "c.npy"])
@pytest.mark.parametrize("alone", [True, False])
def test_damaged_files(tmp_path: Path, name: str, alone: bool) -> None:
    path = tmp_path / name
    (np.savez_compressed if path.suffix == ".npz" else np.save)(path, rows(50))
    good = path.read_bytes()
    if not alone:
        (tmp_path / f"a{path.suffix}").write_bytes(good)
    for at in (0, 3, 40, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:at])
        message = refused(path if alone else tmp_path, [spec("arr_0", "N", 3)])
        assert message.startswith(f"calibration {path}: ")
        assert "plain array" in message and "write it with numpy.save" in message


def test_an_npz_under_another_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(9))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "a.npy: no .npy of a plain array" in refused(tmp_path, [X])


def test_damage_that_headers_do_not_show(tmp_path: Path) -> None:
    values = rows(4000)  # more than zipfile reads, and checks, with a header
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=values)
    good = (tmp_path / "b.npz").read_bytes()
    at = len(good) // 2
    (tmp_path / "b.npz").write_bytes(good[:at] + b"\xff" * 8 + good[at + 8 :])
    calibration = open_calibration(tmp_path, [X])
    assert seen(calibration.first(4000)) == list(range(4000))
    with pytest.raises(CalibrationError, match=r"b\.npz: not an \.npz of plain arrays"):
        list(calibration)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    message = refused(tmp_path / "no", [X])
    assert message.startswith(f"calibration {tmp_path / 'no'}: cannot be read (No such file")
    assert "give an .npz, or a folder" in message
    assert "cannot be read" in refused("x" * 5000, [X])
    assert "cannot be read" in refused("a\0b", [X])
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    assert "not an .npz of plain arrays" in refused(tmp_path / "model.onnx", [X])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is readable")
def test_files_and_folders_without_leave_to_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    np.savez(tmp_path / "sub" / "a.npz", x=rows(9))
    for path in (tmp_path / "sub" / "a.npz", tmp_path / "sub"):
        path.chmod(0)
        message = refused(tmp_path, [X])
        path.chmod(0o700)
        assert message == f"calibration {path}: cannot be read (Permission denied)"


# --- folders of arrays


def test_files_are_taken_by_name_and_hold_any_number_of_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=rows(1, 5))
    np.savez_compressed(tmp_path / "a.npz", x=rows(5))
    (tmp_path / "c").mkdir()
    np.savez(tmp_path / "c" / "a.NPZ", x=rows(2, 6)[:, None])
    (tmp_path / "c" / "a.NPZ.npz").rename(tmp_path / "c" / "a.NPZ")
    calibration = open_calibration(tmp_path, [X])
    assert len(calibration) == 8
    assert seen(calibration) == seen(calibration) == list(range(8))
    assert [calibration.describe(i) for i in (1, 5, 7)] == [
        f"{tmp_path / 'a.npz'}, sample 1",
        str(tmp_path / "b.npz"),
        f"{tmp_path / 'c' / 'a.NPZ'}, sample 1",
    ]


def test_a_folder_of_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(1)[0])  # one sample without the batch axis
    np.save(tmp_path / "b.npy", rows(4, 1))
    np.save(tmp_path / "c.npy", rows(3, 5)[:, None])
    calibration = open_calibration(tmp_path, [X])
    assert len(calibration) == 8 and seen(calibration) == list(range(8))
    assert {feed["x"].shape for feed in calibration} == {(1, 3)}


def test_what_is_passed_over(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(9))
    for name in (".hidden.npz", "._a.npy", "notes.txt", "labels.csv"):
        (tmp_path / name).write_bytes(b"no array")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.npy").write_bytes(b"no array")
    assert seen(open_calibration(tmp_path, [X])) == list(range(9))


def test_folders_without_samples_or_with_several_kinds(tmp_path: Path) -> None:
    message = refused(tmp_path, [X])
    assert message.startswith(f"calibration {tmp_path}: no samples in it: give a folder of .npz")
    (tmp_path / "notes.txt").write_text("nothing")
    assert "no samples in it" in refused(tmp_path, [X])
    np.savez(tmp_path / "a.npz", x=rows(9))
    (tmp_path / "b.png").touch()
    (tmp_path / "c.jpg").touch()
    assert "holds 1 .npz and 2 images: keep one kind" in refused(tmp_path, [X])


def test_npy_for_a_model_of_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(9))
    message = refused(tmp_path, TWO)
    assert "holds .npy, but the model has 2 inputs ['x', 'mask']: give .npz" in message
    assert "2 inputs" in refused(tmp_path / "a.npy", TWO)


def test_a_fixed_batch_in_folders(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(8))
    np.savez(tmp_path / "b.npz", x=rows(4, 8))
    calibration = open_calibration(tmp_path, [spec("x", 4, 3)])
    assert len(calibration) == 3 and seen(calibration) == [0, 4, 8]
    assert calibration.warnings == ()
    assert calibration.describe(1) == f"{tmp_path / 'a.npz'}, samples 4 to 7"
    np.savez(tmp_path / "c.npz", x=rows(3))
    assert "3 samples, but the model takes batches of 4" in refused(tmp_path, [spec("x", 4, 3)])


def test_the_first_file_is_checked_when_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=NAN)
    np.savez(tmp_path / "b.npz", x=rows(9))
    with pytest.raises(CalibrationError, match="NaN or Inf, first in sample 4"):
        open_calibration(tmp_path, [X])
    (tmp_path / "a.npz").rename(tmp_path / "c.npz")
    later = open_calibration(tmp_path, [X])
    with pytest.raises(CalibrationError, match=r"c\.npz: array 'x' has NaN or Inf"):
        list(later)


@pytest.mark.parametrize(
    "arrays",
    [
        {"y": rows(2)},
        {"x": rows(2), "y": rows(2)},
        {"x": rows(2)[None, None]},
        {"x": rows(2)[0, 0]},
        {"x": rows(0)},
    ],
)
def test_the_headers_of_all_files_are_checked_when_opened(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    np.savez(tmp_path / "a.npz", x=rows(9))
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(CalibrationError, match=r"b\.npz: "):
        open_calibration(tmp_path, [X])


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=rows(9))
    calibration = open_calibration(tmp_path, [X])
    np.savez(tmp_path / "b.npz", x=rows(3))
    with pytest.raises(CalibrationError, match=r"b\.npz: it gave 9 samples when opened and 3 now"):
        list(calibration)


def test_one_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    megabyte = np.ones((1, 2**18), np.float32)
    for i in range(12):
        np.savez(tmp_path / f"{i:02}.npz", x=megabyte)
    tracemalloc.start()
    assert sum(1 for _ in open_calibration(tmp_path, [spec("x", "N", 2**18)])) == 12
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * megabyte.nbytes  # the last one, the next, and its copies
