"""`compare`: what it measures, and what it refuses to compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
from command import DEMO, DIGITS, refused, works, write

import onnxq
from onnxq.errors import ConfigError, ValidationError


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source = write(small.conv_model(), tmp_path / "float.onnx")
    onnxq.quantize(source, tmp_path / "quant.onnx")
    return source, tmp_path / "quant.onnx"


def test_json(pair: tuple[Path, Path]) -> None:
    found = json.loads(works("compare", *pair, "--json", "--threads", 1), parse_constant=None)
    assert found.keys() == onnxq.Comparison.model_fields.keys()
    (output,) = found["outputs"]
    assert output.keys() == {
        *("name", "sqnr_db", "mae", "max_abs_error", "relative_error", "cosine", "top1_agreement")
    }
    assert output["name"] == "y" and output["top1_agreement"] is None
    assert (found["samples"], found["made_up_inputs"], found["threads"]) == (4, True, 1)
    assert found["size_ratio"] == pair[1].stat().st_size / pair[0].stat().st_size
    assert 0.01 < found["latency_ratio"] < 1000
    assert found["float_accuracy"] is None


def test_json_of_equal_models(pair: tuple[Path, Path]) -> None:
    text = works("compare", pair[0], pair[0], "--json", "--no-latency")
    found = json.loads(text, parse_constant=pytest.fail)  # JSON has no Infinity
    (output,) = found["outputs"]
    assert (output["sqnr_db"], output["mae"], output["cosine"]) == ("Infinity", 0, 1)
    assert found["size_ratio"] == 1
    assert found["latency_ratio"] is None
    assert onnxq.Comparison.model_validate_json(text).outputs[0].sqnr_db == np.inf


def test_table(pair: tuple[Path, Path]) -> None:
    out = works("compare", *pair)
    assert "error against the float model on 4 made-up samples" in out
    assert "sqnr_db" in out and " y " in out
    ratio = pair[1].stat().st_size / pair[0].stat().st_size
    assert f"size: {ratio:.3f} × float" in out
    assert "latency: " in out
    out = works("compare", pair[0], pair[0], "--no-latency")
    assert " inf " in out and "latency" not in out


def test_accuracy_comes_with_labels(tmp_path: Path) -> None:
    onnxq.quantize(DEMO, tmp_path / "out.onnx")
    arguments = ("compare", DEMO, tmp_path / "out.onnx", "--no-latency", "--data")
    with np.load(DIGITS) as file:
        image, label = file["image"][:50], file["label"][:50]
    np.savez(tmp_path / "with.npz", image=image, label=label)
    np.savez(tmp_path / "without.npz", image=image)
    np.savez(tmp_path / "wrong.npz", image=image, label=(label + 1) % 10)
    assert "accuracy: float 100.00%" in works(*arguments, tmp_path / "with.npz")
    assert "accuracy: float 0.00%" in works(*arguments, tmp_path / "wrong.npz")
    assert "accuracy" not in works(*arguments, tmp_path / "without.npz")


def test_a_fixed_batch_is_counted_by_samples(tmp_path: Path) -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { [dot] y = MatMul (x, w) }"
    proto = small.model(text, {"w": np.eye(4, dtype=np.float32)})
    result = onnxq.quantize(
        proto, data={"x": np.eye(4, dtype=np.float32), "label": np.array([0, 1, 2, 0])}
    )
    found = result.report.comparison
    assert found is not None
    assert (found.samples, found.float_accuracy, found.quantized_accuracy) == (4, 0.75, 0.75)


def test_input_shape(tmp_path: Path) -> None:
    text = "g (float[N,M,4] x) => (float[N,M,3] y) { [dot] y = MatMul (x, w) }"
    proto = small.model(text, {"w": small.weights(4, 3)})
    source = write(proto, tmp_path / "in.onnx")
    works("compare", source, source, "--no-latency", "--input-shape", "x=2,7,4")
    message = refused(
        tmp_path, "compare", source, source, "--input-shape", "x=2,7,4", "--input-shape", "x=2,7,5"
    )
    assert "input 'x' has two shapes" in message


def test_no_pair(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    message = refused(tmp_path, "compare", pair[0], DEMO)
    assert "no pair: their outputs are ['y'] and ['logits']" in message
    other = small.conv_model()
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    message = refused(tmp_path, "compare", pair[0], write(other, tmp_path / "z.onnx"))
    assert "no pair: their inputs are ['x'] and ['z']" in message


def _twin(folder: Path, output: str, last: str) -> Path:
    text = f"g (float[N,4] x) => ({output} y) {{ d = MatMul (x, w) y = {last} (d) }}"
    return write(small.model(text, {"w": small.weights(4, 3)}), folder / "twin.onnx")


@pytest.mark.parametrize(
    ("output", "last", "part"),
    [
        ("float[3,N]", "Transpose", "output 'y' has shape [3, 1], the float model's [1, 3]"),
        ("int64[N,3]", "Cast <to = 7>", "output 'y' is int64, the float model's float32"),
        ("seq(float[N,3])", "SequenceConstruct", "output 'y' is list, the float model's float32"),
        ("float[N,3]", "Sqrt", "output 'y' has NaN or Inf where the float model has none"),
    ],
)
def test_outputs_that_do_not_compare(tmp_path: Path, output: str, last: str, part: str) -> None:
    text = "g (float[N,4] x) => (float[N,3] y) { [dot] y = MatMul (x, w) }"
    source = write(small.model(text, {"w": small.weights(4, 3)}), tmp_path / "in.onnx")
    message = refused(tmp_path, "compare", source, _twin(tmp_path, output, last))
    assert part in message


def test_a_model_that_fails_on_made_up_inputs(tmp_path: Path) -> None:
    text = """g (float[1,4] x, int64[1] i) => (float[1,4] y) {
        five = Constant <value = int64[1] {5}> ()
        off = Sub (i, five)
        y = Gather (x, off)
    }"""
    source = write(small.model(text), tmp_path / "in.onnx")
    assert "the run fails in onnxruntime" in refused(tmp_path, "compare", source, source)


def test_missing_files_and_folders(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for bad in (tmp_path / "no.onnx", tmp_path):
        for arguments in ((bad, pair[1]), (pair[0], bad)):
            assert f"model {bad}: no such file; check the path" in refused(
                tmp_path, "compare", *arguments
            )


def test_another_format_that_onnxruntime_loads(tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    data = small.conv_model().SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    file = tmp_path / "model.ort"
    message = refused(tmp_path, "compare", file, file, "--no-latency")
    assert message == f"{file} is not an ONNX model, or is damaged"


def test_sizes_count_external_data(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "sub").mkdir()
    outside = tmp_path / "sub" / "outside.onnx"
    onnx.save(
        small.conv_model(), outside, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    found = onnxq.compare(pair[0], outside, latency=False)
    size = sum(path.stat().st_size for path in (tmp_path / "sub").iterdir())
    assert found.size_ratio == size / pair[0].stat().st_size


def test_the_errors_of_the_api(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        onnxq.compare(pair[0], tmp_path / "no.onnx")
    with pytest.raises(ValidationError, match="no pair"):
        onnxq.compare(pair[0], DEMO)
    with pytest.raises(ConfigError, match="no array for input 'x'"):
        onnxq.compare(*pair, data={})
