"""What models are run on: the rules by which arrays become feeds, and the made-up inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from onnxq.errors import ConfigError, ValidationError
from onnxq.feeds import Feed, load_data, made_up_feeds, parse_shape
from onnxq.session import InputSpec

Dims = tuple[int | str | None, ...]


def _spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, dtype, shape)


def _feeds(arrays: dict[str, Any], *specs: InputSpec) -> list[Feed]:
    return list(load_data(arrays, specs))


def _made_up(
    specs: Sequence[InputSpec], shapes: dict[str, Sequence[int]] | None = None, accept: Any = None
) -> list[Feed]:
    def runs(feed: Feed) -> None:
        if accept is not None and not accept(feed):
            raise ValidationError(f"cannot run {[array.shape for array in feed.values()]}")

    return made_up_feeds(specs, shapes or {}, runs)


def test_an_array_of_the_inputs_rank_is_cut_along_the_batch_axis() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    feeds = _feeds({"x": x}, _spec("x", "N", 4))
    assert len(feeds) == 3
    for i, feed in enumerate(feeds):
        np.testing.assert_array_equal(feed["x"], x[i : i + 1])


def test_an_array_of_a_rank_more_holds_whole_inputs() -> None:
    x = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    feeds = _feeds({"x": x}, _spec("x", "N", 4))
    assert len(feeds) == 3
    for i, feed in enumerate(feeds):
        np.testing.assert_array_equal(feed["x"], x[i])


def test_a_fixed_batch_is_filled() -> None:
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    feeds = _feeds({"x": x}, _spec("x", 3, 4))
    assert [feed["x"].shape for feed in feeds] == [(3, 4), (3, 4)]
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), x)
    with pytest.raises(ConfigError, match="7 samples, but the model takes batches of 3"):
        _feeds({"x": np.ones((7, 4), np.float32)}, _spec("x", 3, 4))
    with pytest.raises(ConfigError, match="batches of"):
        _feeds(
            {"a": np.ones((6, 4), np.float32), "b": np.ones((6, 4), np.float32)},
            _spec("a", 2, 4),
            _spec("b", 3, 4),
        )


def test_a_fixed_batch_with_whole_inputs() -> None:
    feeds = _feeds({"x": np.ones((5, 3, 4), np.float32)}, _spec("x", 3, 4))
    assert [feed["x"].shape for feed in feeds] == [(3, 4)] * 5


def test_a_scalar_input_takes_one_value_per_sample() -> None:
    arrays = {"x": np.ones((2, 4), np.float32), "s": np.array([1.5, 2.5], np.float32)}
    feeds = _feeds(arrays, _spec("x", "N", 4), _spec("s"))
    assert [(feed["s"].shape, float(feed["s"])) for feed in feeds] == [((), 1.5), ((), 2.5)]
    assert all(isinstance(feed["s"], np.ndarray) for feed in feeds)  # onnxruntime takes no less


def test_inputs_of_the_own_rank_and_of_a_rank_more_together() -> None:
    arrays = {"x": np.ones((2, 4), np.float32), "m": np.ones((2, 3, 5), np.float32)}
    feeds = _feeds(arrays, _spec("x", "N", 4), _spec("m", 3, 5))
    assert [(f["x"].shape, f["m"].shape) for f in feeds] == [((1, 4), (3, 5))] * 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.int64, np.float32),
        (np.int32, np.int64),
        (np.uint8, np.int64),
        (np.bool_, np.int64),
    ],
)
def test_safe_dtypes_are_cast(given: type, wanted: type) -> None:
    (feed,) = _feeds({"x": np.ones((1, 2), given)}, _spec("x", "N", 2, dtype=wanted))
    assert feed["x"].dtype == wanted


@pytest.mark.parametrize(
    ("given", "wanted"), [(np.float32, np.int64), (np.int64, np.bool_), (np.complex64, np.float32)]
)
def test_unsafe_dtypes_are_refused(given: type, wanted: type) -> None:
    with pytest.raises(ConfigError, match=f"the input is {np.dtype(wanted).name}"):
        _feeds({"x": np.ones((1, 2), given)}, _spec("x", "N", 2, dtype=wanted))


@pytest.mark.filterwarnings("error")
def test_casts_that_overflow_are_found() -> None:
    with pytest.raises(ConfigError, match="NaN or Inf, first in sample 1"):
        _feeds({"x": np.array([[1.0], [1e300]])}, _spec("x", "N", 1))


def test_an_input_that_is_named_label() -> None:
    x = np.ones((2, 3), np.float32)
    data = load_data({"label": x}, [_spec("label", "N", 3)])
    assert data.label is None and len(list(data)) == 2


def test_labels_are_flat() -> None:
    data = load_data(
        {"x": np.ones((3, 2), np.float32), "label": np.array([[0], [1], [2]])}, [_spec("x", "N", 2)]
    )
    assert data.label is not None
    np.testing.assert_array_equal(data.label, [0, 1, 2])


# --- made-up inputs


def test_made_up_inputs_are_deterministic() -> None:
    specs = [_spec("x", "N", 3), _spec("i", "N", dtype=np.int64), _spec("b", 4, dtype=np.bool_)]
    one, two = _made_up(specs), _made_up(specs)
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        for name, array in a.items():
            assert array.dtype == next(s.dtype for s in specs if s.name == name)
            np.testing.assert_array_equal(array, b[name])
    assert not np.array_equal(one[0]["x"], one[1]["x"])


def test_integers_and_flags_are_0_or_1() -> None:
    feeds = _made_up([_spec("i", 100, dtype=np.int64), _spec("b", 100, dtype=np.bool_)])
    for feed in feeds:
        assert set(feed["i"].tolist()) == {0, 1}
        assert set(feed["b"].tolist()) == {False, True}


def test_floats_are_normal() -> None:
    x = np.concatenate([feed["x"] for feed in _made_up([_spec("x", 10_000)])])
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02  # five sigma of 40000 draws


def test_dimensions_of_one_name_are_equal() -> None:
    specs = [_spec("a", "N", "T"), _spec("b", "T", "N"), _spec("c", "N", "T", "C")]
    (feed, *_) = _made_up(specs, {"a": (2, 7)})
    assert (feed["a"].shape, feed["b"].shape, feed["c"].shape[:2]) == ((2, 7), (7, 2), (2, 7))


def test_the_first_axis_is_taken_as_the_batch() -> None:
    (feed, *_) = _made_up([_spec("x", "batch", 3, "h"), _spec("y", None, None)])
    assert feed["x"].shape[0] == feed["y"].shape[0] == 1
    assert feed["x"].shape[2] == feed["y"].shape[1] > 1


def test_scalars() -> None:
    (feed, *_) = _made_up([_spec("s"), _spec("i", dtype=np.int64)])
    assert feed["s"].shape == feed["i"].shape == ()


def test_sizes_are_tried_until_the_model_runs() -> None:
    feeds = _made_up([_spec("x", 1, 3, "h")], accept=lambda feed: feed["x"].shape[2] == 32)
    assert feeds[0]["x"].shape == (1, 3, 32)
    with pytest.raises(ValidationError, match="cannot run") as caught:
        _made_up([_spec("x", 1, "h")], accept=lambda _: False)
    assert "(1, 64)" in str(caught.value)  # the likeliest size


def test_a_given_shape_is_the_only_one_tried() -> None:
    tried: list[Any] = []

    def refuse(feed: Feed) -> bool:
        tried.append(feed["x"].shape)
        return False

    with pytest.raises(ValidationError):
        _made_up([_spec("x", 1, "h")], {"x": (1, 5)}, accept=refuse)
    assert tried == [(1, 5)]


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({"z": (1,)}, "no input 'z' (the inputs are ['a', 'b'])"),
        ({"a": (1,)}, "--input-shape a=1: the input is ['N', 3]"),
        ({"a": (1, 4)}, "--input-shape a=1,4: the input is ['N', 3]"),
        ({"a": (2, 3), "b": (4, 3)}, "dimension 'N' of the model cannot be both 2 and 4"),
    ],
)
def test_shapes_that_contradict(shapes: dict[str, Sequence[int]], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _made_up([_spec("a", "N", 3), _spec("b", "N", "C")], shapes)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1,512", ("x", (1, 512))),
        ("x=1x3x8", ("x", (1, 3, 8))),
        ("s=", ("s", ())),
        ("a=b=2", ("a=b", (2,))),
        ("x:0=4", ("x:0", (4,))),
    ],
)
def test_parse_shape(text: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert parse_shape(text) == expected


@pytest.mark.parametrize("text", ["x", "", "=1", "x=a", "x=1,-2", "x=0", "x=1.5"])
def test_parse_shape_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="give NAME=1,512"):
        parse_shape(text)
