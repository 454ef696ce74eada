"""The files of `split`: what is in the folder, what is refused, and that it is whole or absent."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small import model, weights
from splitting import chain, quantized

from onnxq.errors import ConfigError, ModelError, ValidationError
from onnxq.parts import part as part_module
from onnxq.parts import splitting as split_module
from onnxq.parts import write as write_module
from onnxq.parts.manifest import MANIFEST, Manifest
from onnxq.parts.splitting import split


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.onnx"
    onnx.save(quantized(chain()), path)
    return path


def test_the_folder(whole: Path, tmp_path: Path) -> None:
    report = split(whole, tmp_path / "out", parts=2)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    stages = [f"stage{s:02d}.onnx" for s in range(3)]
    assert files == [
        *(f"part0/{name}" for name in stages),  # tensors this small lie in the models
        *(f"part1/{name}" for name in stages),
        MANIFEST,
    ]
    for path in (tmp_path / "out").rglob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
    assert (report.parts, report.stages, report.all_reduces) == (2, 3, 2)
    assert report.shared_out == ("one", "two")
    assert report.whole == {}
    assert report.reduced_bytes == 2 * 3 * 6 * 6 * 4
    assert report.difference == report.stage_difference == 0.0  # a + b is all that is summed
    assert report.part_bytes == tuple(
        sum(p.stat().st_size for p in (tmp_path / f"out/part{k}").iterdir()) for k in (0, 1)
    )
    assert list(tmp_path.glob(".*")) == []


def test_the_manifest_says_what_the_stages_take_and_give(whole: Path, tmp_path: Path) -> None:
    split(whole, tmp_path / "out", parts=2)
    manifest = Manifest.load(tmp_path / "out")
    assert [entry.name for entry in manifest.inputs] == ["x"]
    assert manifest.inputs[0].dtype == "float32"
    assert manifest.outputs == ("y",)
    for step in manifest.stages:
        for stage in step.parts:
            proto = onnx.load(tmp_path / "out" / str(stage.model), load_external_data=False)
            assert {v.name for v in proto.graph.input} == set(stage.inputs)
            assert {v.name for v in proto.graph.output} == set(stage.outputs)
    assert [entry.name for step in manifest.stages for entry in step.sums] == ["one/sum", "two/sum"]


def test_the_same_split_twice_is_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        split(whole, tmp_path / name, parts=2)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_weight_of_two_stages_is_stored_once(tmp_path: Path) -> None:
    proto = model(
        """g (float[4,96] x) => (float[4,96] y) {
            [one] a = MatMul (x, w)
            r = Relu (a)
            [two] y = MatMul (r, w)
        }""",
        {"w": weights(96, 96)},
    )
    onnx.save(quantized(proto), tmp_path / "tied.onnx")
    split(tmp_path / "tied.onnx", tmp_path / "out", parts=2)
    q = 96 * 96 // 2  # one term, 4 bits
    size = (tmp_path / "out" / "part0" / "weights.data").stat().st_size
    assert q <= size < 1.5 * q


def test_weights_in_an_external_file(tmp_path: Path) -> None:
    onnx.save(quantized(chain()), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    assert split(tmp_path / "m.onnx", tmp_path / "out", parts=2).difference == 0.0


def test_what_every_part_computes_is_said(tmp_path: Path) -> None:
    proto = model(
        """g (bool p, float[4,6] x) => (float[4,6] y) {
            [one] a = MatMul (x, w)
            [two] b = MatMul (a, w)
            [three] c = MatMul (b, w)
            [if] y = If (p) <
                then_branch = t () => (float[4,6] yt) { [inner] yt = MatMul (c, w) },
                else_branch = e () => (float[4,6] ye) { ye = Relu (c) }
            >
        }""",
        {"w": weights(6, 6)},
    )
    terms = {"one": 2, "two": 1, "inner": 2}
    onnx.save(quantized(proto, terms, exclude=("three",)), tmp_path / "m.onnx")
    report = split(tmp_path / "m.onnx", tmp_path / "out", parts=2)
    assert report.shared_out == ("one",)
    assert report.whole == {
        "three": "its weight is float",
        "two": "it has one term",
        "inner": "it is inside if/then_branch",
    }


def test_an_input_with_a_default_is_fixed_with_a_warning(tmp_path: Path) -> None:
    proto = quantized(
        model(
            """g (float[4,6] x) => (float[4,6] y) {
                [one] a = MatMul (x, w)
                y = Mul (a, s)
            }""",
            {"w": weights(6, 6), "s": np.array([2.0], np.float32)},
        )
    )
    proto.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, [1]))
    onnx.save(proto, tmp_path / "m.onnx")
    report = split(tmp_path / "m.onnx", tmp_path / "out", parts=2)
    assert report.warnings == ("input 's' has a default value and is fixed to it",)
    assert [e.name for e in Manifest.load(tmp_path / "out").inputs] == ["x"]


def test_a_model_that_runs_on_nothing_made_up_is_not_run(tmp_path: Path) -> None:
    proto = model(
        """g (float[4,6] x, int64[2] s) => (float[N,M] y) {
            [one] a = MatMul (x, w)
            y = Reshape (a, s)
        }""",
        {"w": weights(6, 6)},
    )
    onnx.save(quantized(proto), tmp_path / "m.onnx")
    report = split(tmp_path / "m.onnx", tmp_path / "out", parts=2)
    assert report.difference is None
    assert "give --data" in report.warnings[0]
    data = {"x": weights(4, 6)[None], "s": np.array([[3, 8]])}
    assert split(tmp_path / "m.onnx", tmp_path / "o2", parts=2, data=data).difference == 0.0


def test_a_stage_that_computes_something_else_shows(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of one part is doubled: the sums differ by as much as that share weighs."""
    real = part_module._run_stage

    def wrong(session: Any, s: int, stage: Any, known: Any) -> Any:
        made = real(session, s, stage, known)
        for name in stage.partials.values():
            made[name] = made[name] * (2 if "part1" in str(stage.model) else 1)
        return made

    monkeypatch.setattr(part_module, "_run_stage", wrong)
    report = split(whole, tmp_path / "out", parts=2)
    assert report.stage_difference is not None
    assert report.stage_difference > 0.01
    assert "the stages differ from the single file by" in report.warnings[0]


# --- whole or absent


def test_an_existing_folder(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists already"):
        split(whole, target, parts=2)
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    (target / "mine.txt").unlink()
    split(whole, target, parts=2)
    assert (target / MANIFEST).is_file()


def test_a_file_in_the_place_or_no_place(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ConfigError, match="exists already"):
        split(whole, tmp_path / "file", parts=2)
    with pytest.raises(ConfigError, match="does not exist: create it"):
        split(whole, tmp_path / "a" / "b", parts=2)
    with pytest.raises(ConfigError, match=r"cannot be written \(File name too long"):
        split(whole, tmp_path / ("a" * 300), parts=2)


def fail(*_args: Any, **_options: Any) -> Any:
    raise ValidationError("on purpose")


def no_space(*_args: Any, **_options: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "broken", "message"),
    [
        (split_module, "check_parts", fail, "on purpose"),
        (split_module, "_check_run", fail, "on purpose"),
        (write_module, "export", no_space, "cannot be written .No space left on device."),
    ],
)
def test_nothing_is_left_of_a_split_that_fails(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    module: Any,
    name: str,
    broken: Any,
    message: str,
) -> None:
    monkeypatch.setattr(module, name, broken)
    with pytest.raises((ValidationError, ConfigError), match=message):
        split(whole, tmp_path / "out", parts=2)
    assert [p.name for p in tmp_path.iterdir()] == ["whole.onnx"]


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        split(tmp_path / "m.onnx", tmp_path / "out", parts=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="folders have other rights there")
def test_others_may_read_it_as_the_umask_says(whole: Path, tmp_path: Path) -> None:
    split(whole, tmp_path / "out", parts=2)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- manifests that are wrong


def without(key: str) -> Any:
    def change(entry: dict[str, Any]) -> None:
        del entry[key]

    return change


def at(*path: str | int, value: Any) -> Any:
    def change(entry: Any) -> None:
        for step in path[:-1]:
            entry = entry[step]
        entry[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("split"), "split: Field required"),
        (at("format_version", value=2), "format_version"),
        (at("parts", value=3), "stage 0 has 2 parts, not 3"),
        (at("outputs", value=["z"]), "an output of the model is computed by no stage"),
        (at("stages", 0, "parts", 0, "model", value="../../etc/passwd"), "model: String should"),
        (at("stages", 0, "parts", 0, "model", value="part1/stage00.onnx"), "is said to be"),
        (at("stages", 1, "parts", 1, "inputs", value=["w"]), "names 'w', which is not there"),
        (at("stages", 0, "parts", 1, "partials", value={"one/sum": "q"}), "names 'q', which is"),
        (at("stages", 0, "parts", 1, "partials", value={"q": "q"}), "names 'q', which is"),
        (at("stages", 0, "sums", value=[]), "names 'one/sum', which is not there"),
        (at("stages", value=[]), "nothing is summed"),
        (at("parts", value=10**9), "parts: Input should be less than"),
        (at("outputs", value=[]), "outputs: "),
        (at("stages", 0, "parts", 0, "model", value=None), "has outputs, but no model"),
        (at("stages", 0, "parts", 0, "partials", value={}), "nothing uses"),
    ],
)
def test_a_wrong_manifest(whole: Path, tmp_path: Path, change: Any, message: str) -> None:
    split(whole, tmp_path / "out", parts=2)
    path = tmp_path / "out" / MANIFEST
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Manifest.load(tmp_path / "out")
    assert "split the model again" in str(caught.value)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parts\.json: cannot be read .* `onnxq split`"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="Invalid JSON"):
        Manifest.load(tmp_path)
