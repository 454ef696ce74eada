"""Inner tensors of a model on samples: their values, bounded portions, and named failures."""

import numpy as np
import onnx
import pytest
from small import conv_model, model, weights

from onnxq import observing
from onnxq.errors import CalibrationError, ValidationError
from onnxq.model import load
from onnxq.observing import observer

FEEDS = [{"x": weights(1, 3, 8, 8, seed=i)} for i in range(3)]


def failing(index: int, error: ValidationError) -> CalibrationError:
    return CalibrationError(f"sample {index}: {error}")


def chain(length: int) -> onnx.ModelProto:
    """y = x + 1 + 1 …, with tensors t1, t2, …"""
    steps = [f"t{i + 1} = Add ({f't{i}' if i else 'x'}, one)" for i in range(length)]
    return model(
        f"g (float[n] x) => (float[n] y) {{ {' '.join(steps)} y = Identity (t{length}) }}",
        {"one": np.float32([1])},
    )


def test_values_are_those_of_the_model() -> None:
    observe = observer(load(conv_model()), FEEDS, failing)
    found = list(observe(["c", "y", "x"]))
    assert len(found) == len(FEEDS)
    for feed, values in zip(FEEDS, found, strict=True):
        assert set(values) == {"c", "y", "x"}
        np.testing.assert_array_equal(values["x"], feed["x"])
        np.testing.assert_array_equal(values["y"], np.maximum(values["c"], 0))
        assert (values["c"] < 0).any()  # no fusion has swallowed it


def test_the_model_may_change_afterwards_and_it_can_be_asked_again() -> None:
    source = load(conv_model())
    observe = observer(source, FEEDS, failing)
    source.graph.nodes.clear()
    first, second = (next(iter(observe(["c"])))["c"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_portions_are_bounded_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "BYTES_PER_RUN", 4 * 10 * 7)
    count = observing.FIRST_TENSORS + 5
    feeds = [{"x": np.full(10, i, np.float32)} for i in range(2)]
    names = [f"t{i + 1}" for i in range(count)]
    seen: dict[str, list[float]] = {name: [] for name in names}
    for values in observer(load(chain(count)), feeds, failing)(names):
        assert sum(array.nbytes for array in values.values()) <= observing.BYTES_PER_RUN
        for name, array in values.items():
            seen[name].append(float(array[0]))
    assert seen == {f"t{i + 1}": [i + 1, i + 2] for i in range(count)}


def test_a_failing_sample_is_named() -> None:
    feeds = [*FEEDS, {"x": weights(1, 2, 8, 8)}]
    with pytest.raises(CalibrationError, match="sample 3: "):
        list(observer(load(conv_model()), feeds, failing)(["c"]))


def test_no_names_and_no_samples() -> None:
    assert list(observer(load(conv_model()), FEEDS, failing)([])) == []
    names = [f"t{i + 1}" for i in range(observing.FIRST_TENSORS + 1)]
    assert list(observer(load(chain(len(names))), [], failing)(names)) == []


def test_an_unknown_tensor() -> None:
    with pytest.raises(CalibrationError, match="cannot be observed"):
        list(observer(load(conv_model()), FEEDS, failing)(["nowhere"]))
