"""Calibration samples: what is read from arrays, array files and iterables, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from feeding import NAN, TWO, X, refused, rows, seen, spec

from onnxq.calibration import Calibration, open_calibration
from onnxq.errors import CalibrationError, ValidationError
from onnxq.feeds import Feed, load_data
from onnxq.images import ImageOptions
from onnxq.session import InputSpec, input_specs, open_session, run


def same(one: list[Feed], two: list[Feed]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


# --- mappings and single files


@pytest.mark.parametrize(
    ("arrays", "specs"),
    [
        ({"x": rows(9)}, [X]),
        ({"x": rows(9).astype(np.float64)}, [X]),
        ({"x": rows(9).astype(np.uint8)}, [X]),
        ({"x": rows(12).reshape(4, 3, 3)}, [X]),
        ({"x": rows(12)}, [spec("x", 4, 3)]),
        ({"x": rows(18).reshape(6, 3, 3)}, [spec("x", 3, 3)]),
        ({"x": rows(9), "mask": np.arange(9)}, TWO),
        ({"x": rows(9), "s": np.arange(9.0)}, [X, spec("s")]),
    ],
)
def test_the_rules_are_those_of_load_data(
    tmp_path: Path, arrays: dict[str, np.ndarray], specs: list[InputSpec]
) -> None:
    expected = list(load_data(arrays, specs))
    np.savez(tmp_path / "c.npz", **arrays)
    (tmp_path / "d").mkdir()
    for name in "ab":
        shutil.copy(tmp_path / "c.npz", tmp_path / "d" / f"{name}.npz")
    for source in (arrays, tmp_path / "c.npz", str(tmp_path / "c.npz")):
        calibration = open_calibration(source, specs)
        assert len(calibration) == len(expected)
        same(list(calibration), expected)
        same(list(calibration), expected)  # and again
    folder = open_calibration(tmp_path / "d", specs)
    assert len(folder) == 2 * len(expected)
    same(list(folder), expected * 2)


@pytest.mark.parametrize("label", [np.arange(9), np.arange(5.0), np.array(["cat"])])
def test_labels_are_ignored(tmp_path: Path, label: np.ndarray) -> None:
    assert seen(open_calibration({"x": rows(9), "label": label}, [X])) == list(range(9))
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=rows(9), label=label)
    assert len(open_calibration(tmp_path, [X])) == 18
    feeds = [{"x": rows(1), "label": label}] * 2
    assert [feed.keys() for feed in open_calibration(feeds, [X])] == [{"x"}, {"x"}]


def test_an_input_that_is_named_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", label=rows(9))
    np.savez(tmp_path / "b.npz", label=rows(9))
    assert len(open_calibration(tmp_path, [spec("label", "N", 3)])) == 18


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({}, "no array for input 'x'"),
        ({"y": rows(2)}, "no array for input 'x'; array 'y' is no input (the inputs are ['x'])"),
        ({"x": rows(2), "y": rows(2)}, "array 'y' is no input"),
        ({"x": rows(2).astype(np.complex64)}, "array 'x' is complex64, the input is float32"),
        ({"x": rows(2).astype("U")}, "array 'x' is str"),
        ({"x": rows(1)[0, 0]}, "array 'x' has shape []"),
        ({"x": rows(2)[None, None]}, "samples along the first axis"),
        ({"x": rows(2)[:, :2]}, "array 'x' has shape [2, 2], the input ['N', 3]: dimension 1"),
        ({"x": rows(0)}, "different or no numbers of samples: {'x': 0}"),
        ({"x": NAN}, "array 'x' has NaN or Inf, first in sample 4"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], part: str) -> None:
    message = refused(arrays, [X])
    assert message.startswith("calibration: ") and part in message
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "a.npz", x=rows(9))
    for path, source in ((tmp_path / "one.npz", None), (folder / "b.npz", folder)):
        np.savez(path, **arrays)
        message = refused(source or path, [X])
        assert message.startswith(f"calibration {path}: ") and part in message


def test_lists_that_are_no_array() -> None:
    part = "'x' cannot be made a numpy array ("
    assert refused({"x": [[1.0], [1.0, 2.0]]}, [X]).startswith(f"calibration: {part}")
    assert refused([{"x": [[1.0], [1.0, 2.0]]}], [X]).startswith(f"calibration sample 0: {part}")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    bomb = np.array([Bomb()], object)
    np.savez(tmp_path / "x.npz", allow_pickle=True, x=bomb)
    np.save(tmp_path / "x.npy", bomb, allow_pickle=True)
    assert "plain arrays" in refused(tmp_path / "x.npz", [X])
    assert "plain array" in refused(tmp_path / "x.npy", [X])
    assert "array 'x' is object" in refused({"x": bomb}, [X])
    assert "array 'x' is object" in refused([{"x": bomb[None]}], [spec("x", "N", "M")])
    assert not marker.exists()


def test_a_model_without_inputs() -> None:
    assert "the model has no inputs" in refused({"label": rows(2)}, [])


# --- iterables


class Loader:
    """Gives its feeds in each iteration and counts these."""

    def __init__(self, *feeds: Any) -> None:
        self.feeds, self.given = feeds, 0

    def __iter__(self) -> Iterator[Any]:
        for feed in self.feeds:
            self.given += 1
            yield feed


class Sized(Loader):
    def __len__(self) -> int:
        return len(self.feeds)


class Dataset:
    """Only indexed, as map-style datasets are."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Feed:
        if index >= len(self):
            raise IndexError
        return {"x": rows(1, index)}


class Unsized(Loader):
    def __len__(self) -> int:
        raise TypeError("a stream has no length")


FEEDS = [{"x": rows(1, i)} for i in range(9)]


@pytest.mark.parametrize(
    "source",
    [FEEDS, tuple(FEEDS), Loader(*FEEDS), Sized(*FEEDS), Unsized(*FEEDS), Dataset()],
    ids=lambda source: type(source).__name__,
)
def test_iterables(source: Any) -> None:
    calibration = open_calibration(source, [X])
    assert len(calibration) == 9 and calibration.warnings == ()
    assert seen(calibration) == seen(calibration) == list(range(9))
    assert seen(calibration.split(3)[1]) == [1, 4, 7]
    assert calibration.describe(3) == "sample 3"


def test_a_generator_is_kept() -> None:
    calibration = open_calibration((feed for feed in FEEDS), [X])
    assert len(calibration) == 9
    assert seen(calibration) == seen(calibration) == list(range(9))


def test_a_generator_that_fills_one_buffer() -> None:
    def fill() -> Iterator[Feed]:
        buffer = rows(1)
        for i in range(9):
            buffer[...] = rows(1, i)
            yield {"x": buffer}

    assert seen(open_calibration(fill(), [X])) == list(range(9))


def test_no_more_is_taken_from_an_iterable_than_is_needed() -> None:
    source = Sized(*FEEDS)
    calibration = open_calibration(source, [X])
    assert source.given == 1
    assert seen(calibration.first(3)) == [0, 1, 2]
    assert source.given == 4


def test_an_iterable_that_runs_dry() -> None:
    iterator = iter(FEEDS)

    class Once:
        def __iter__(self) -> Iterator[Feed]:
            return iterator

    assert "it gave 9 samples when opened and 0 now" in refused(Once(), [X])


def test_feeds_are_cast_and_keep_their_shape() -> None:
    feed = {"x": rows(5).astype(np.float64), "state": [[1.0], [2.0]], "rate": 16000}
    specs = [X, spec("state", 2, "B"), spec("rate", dtype=np.int64)]
    (given,) = open_calibration([feed], specs)
    assert {n: (a.shape, a.dtype) for n, a in given.items()} == {
        "x": ((5, 3), np.float32),
        "state": ((2, 1), np.float32),
        "rate": ((), np.int64),
    }
    assert all(isinstance(array, np.ndarray) for array in given.values())


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ((rows(1), 3), "is a tuple; give for each run a mapping, input name -> array"),
        (rows(1), "is a ndarray; give for each run a mapping"),
        ("a.npz", "is a str"),
        ({"y": rows(1)}, "no array for input 'x'; array 'y' is no input (the inputs are ['x'])"),
        ({"x": rows(1)[0]}, "shape [3], the input ['N', 3]: give what one run takes (the batch"),
        ({"x": rows(1)[None]}, "shape [1, 1, 3], the input ['N', 3]: give what one run takes"),
        ({"x": rows(1)[:, :2]}, "has shape [1, 2], the input ['N', 3]"),
        ({"x": rows(1).astype("U")}, "array 'x' is str1024, the input is float32"),
        ({"x": NAN}, "array 'x' has NaN or Inf"),
        ({"x": np.array([[0, 1, 1e300]])}, "array 'x' has NaN or Inf"),
    ],
)
def test_items_that_are_no_feed(item: Any, part: str) -> None:
    for before in (0, 2):
        message = refused([*FEEDS[:before], item], [X])
        assert message.startswith(f"calibration sample {before}: ") and part in message
        assert "first in sample" not in message
        assert refused(iter([*FEEDS[:before], item]), [X]) == message


def test_the_batch_of_an_item_is_the_models() -> None:
    message = refused([{"x": rows(2)}], [spec("x", 4, 3)])
    assert "array 'x' has shape [2, 3], the input [4, 3]" in message


def test_what_is_no_source() -> None:
    assert refused(rows(9), [X]) == "calibration: is one array; give a mapping {'x': array}"
    assert "a int is no path" in refused(3, [X])
    for nothing in ([], iter([]), Loader()):
        assert "the iterable gives no samples" in refused(nothing, [X])


def test_errors_of_the_users_own_code_are_shown_as_they_are() -> None:
    def broken() -> Iterator[Feed]:
        yield FEEDS[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        open_calibration(broken(), [X])


# --- parts of a calibration


@pytest.fixture
def nine(tmp_path: Path) -> Calibration:
    for name, start, count in (("a", 0, 4), ("b", 4, 1), ("c", 5, 4)):
        np.savez(tmp_path / f"{name}.npz", x=rows(count, start))
    return open_calibration(tmp_path, [X])


def test_first(nine: Calibration) -> None:
    assert seen(nine.first(1)) == [0]
    assert seen(nine.first(6)) == list(range(6)) and len(nine.first(6)) == 6
    assert seen(nine.first(20)) == list(range(9)) and len(nine.first(20)) == 9
    with pytest.raises(ValueError, match="at least 1"):
        nine.first(0)


@pytest.mark.parametrize("held_out", range(1, 9))
def test_split(nine: Calibration, held_out: int) -> None:
    fit, held = nine.split(held_out)
    assert len(held) == held_out and len(fit) == 9 - held_out
    assert sorted(seen(fit) + seen(held)) == list(range(9))
    assert seen(fit) == sorted(seen(fit))
    gaps = np.diff(seen(held))
    assert set(gaps) <= {9 // held_out, -(-9 // held_out)}  # as even as can be


def test_parts_of_parts_know_their_files(nine: Calibration, tmp_path: Path) -> None:
    fit, held = nine.split(3)
    assert seen(held) == [1, 4, 7] and seen(fit.first(3)) == [0, 2, 3]
    assert seen(fit.split(2)[1]) == [2, 6]
    assert held.describe(0) == f"{tmp_path / 'a.npz'}, sample 1"
    assert held.describe(1) == str(tmp_path / "b.npz")
    assert held.describe(-1) == f"{tmp_path / 'c.npz'}, sample 2"
    with pytest.raises(IndexError):
        held.describe(3)


def test_files_that_are_not_chosen_are_not_read(nine: Calibration, tmp_path: Path) -> None:
    (tmp_path / "c.npz").unlink()
    assert seen(nine.first(5)) == list(range(5))


def test_split_leaves_something_to_fit_on(nine: Calibration, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        nine.split(9)
    assert str(caught.value) == (
        f"calibration {tmp_path}: of 9 samples, 9 cannot be held out: give more samples"
    )
    with pytest.raises(ValueError, match="at least 1"):
        nine.split(0)


def test_a_sample_on_which_the_model_fails() -> None:
    text = """g (float[N,4] x, int64[M] i) => (float[K,3] y) {
        [pick] p = Gather (x, i)
        [dot] y = MatMul (p, w)
    }"""
    session = open_session(small.model(text, {"w": small.weights(4, 3)}).SerializeToString())
    feeds = [{"x": np.ones((1, 4), np.float32), "i": np.array([i])} for i in (0, 0, 7)]
    calibration = open_calibration(feeds, input_specs(session))
    with pytest.raises(CalibrationError) as caught:
        for index, feed in enumerate(calibration):
            try:
                run(session, feed)
            except ValidationError as error:
                raise calibration.failing(index, error) from None
    message = str(caught.value)
    assert message.startswith("calibration sample 2: the float model fails on it, mend or remove")
    assert "the run fails in onnxruntime" in message and "\n" not in message


# --- warnings


@pytest.mark.parametrize(
    ("source", "specs", "samples"),
    [
        ({"x": rows(1)}, [X], 1),
        ({"x": rows(7)}, [X], 7),
        ({"x": rows(8)}, [X], None),
        ({"x": rows(4)}, [spec("x", 4, 3)], 4),
        ({"x": rows(8)}, [spec("x", 4, 3)], None),
        (FEEDS[:7], [X], 7),
        ([{"x": rows(4)}], [X], 4),
        ([{"x": rows(4)}] * 2, [X], None),
        ([{"x": rows(3)[0]}] * 2, [spec("x", "T")], 2),
    ],
)
def test_few_samples(source: Any, specs: list[InputSpec], samples: int | None) -> None:
    calibration = open_calibration(source, specs)
    if samples is None:
        assert calibration.warnings == ()
        assert calibration.first(1).warnings == ()  # a choice, not a lack
    else:
        (warning,) = calibration.warnings
        noun = "sample" if samples == 1 else "samples"
        assert warning.startswith(f"calibration has {samples} {noun}: ranges may be too narrow")


def test_warnings_name_the_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(2))
    assert open_calibration(tmp_path, [X]).warnings == (
        f"calibration {tmp_path} has 2 samples: ranges may be too narrow; 32 or more are better",
    )


def test_image_options_without_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", rows(9))
    message = refused(tmp_path, [X], ImageOptions(mean=(0.5,)))
    assert message == f"calibration {tmp_path}: holds no images: leave the image options away"
    assert "holds no images" in refused(FEEDS, [X], ImageOptions(size=(8, 8)))
    assert len(open_calibration(FEEDS, [X], ImageOptions())) == 9
