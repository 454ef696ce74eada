"""Options, plans and reports that cannot be meant end in one line, before any work is done."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from command import DEMO, DIGITS, Outcome, contents, refused, works, write
from command import onnxq as command

import onnxq.api


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(small.conv_model(), tmp_path / "in.onnx")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the rewriting has begun."""

    def rewrite(*_: object, **__: object) -> None:
        pytest.fail("the work was begun")

    monkeypatch.setattr(onnxq.api, "rewrite", rewrite)


OPTIONS = [
    ("--terms 0", ["--terms 0", "greater than or equal to 1"]),
    ("--terms 99", ["--terms 99", "less than or equal to 8"]),
    ("--terms two", ["'--terms'", "valid integer", "see `onnxq quantize --help`"]),
    ("--weight-bits 1", ["--weight-bits 1", "greater than or equal to 2"]),
    ("--weight-bits 9", ["--weight-bits 9", "less than or equal to 8"]),
    ("--weight-bits abc", ["'--weight-bits'", "valid integer"]),
    ("--block-size 1 --activations none", ["--block-size 1", "greater than or equal to 2"]),
    (
        "--block-size 32 --activations dynamic",
        ["--block-size 32 needs float compute", "--activations none"],
    ),
    (
        "--layout merged --weight-bits 5 --activations dynamic",
        ["2 terms of 5 bits need 10", "lower --terms"],
    ),
    ("--layout merged --terms 3 --activations dynamic", ["3 terms of 4 bits need 12"]),
    (
        "--layout merged --series joint --activations dynamic",
        ["--series joint", "needs --series digit"],
    ),
    (
        "--block-size 32 --activation-terms 2",
        [
            "--block-size 32 needs --activations none, but --activation-terms 2 needs "
            "--activations dynamic or static: leave one out"
        ],
    ),
    ("--matmul nbits --outliers 4", ["--matmul nbits needs", "--outliers 4 needs", "leave one"]),
    ("--layout merged --terms 3 --products all", ["--layout merged with such terms needs"]),
    ("--ranges mse --activation-bits 7", ["--ranges mse needs --activations static, but"]),
    ("--ranges mse", ["--activations static needs ranges", "add --calibration"]),
    ("--ranges mse --activations dynamic", ["--ranges needs --activations static"]),
    ("--max-latency fast", ["--max-latency 'fast'", "as 0.5x"]),
    ("--tolerance good", ["--tolerance 'good'", "give one of top1=0.5pt"]),
    ("--tolerance top1=x", ["--tolerance 'top1=x'", "top1=0.5pt"]),
    ("--tolerance error=1% --terms 2", ["--terms beside --tolerance", "leave one out"]),
    ("--max-size 1MB --weight-bits 4", ["--weight-bits beside --max-size"]),
    ("--max-size big", ["--max-size 'big'", "4MB, 3.5MiB or 0.2x"]),
    ("--minimize size", ["--minimize needs --tolerance, --max-size"]),
    ("--best-effort", ["--best-effort needs --tolerance, --max-size"]),
    ("--max-size 1MB --minimize size", ["--minimize size without --tolerance"]),
    ("--max-latency 0.5x --activations static", ["with --activations static"]),
    ("--offset on", ["--offset on needs --activations none"]),
    ("--offset on --weight-bits 8 --terms 4", ["at most 24 bits in all terms together"]),
    ("--layout diagonal", ["'--layout'", "'diagonal'", "merged"]),
    ("--series fourier", ["'--series'", "'fourier'", "fixed_ratio"]),
    ("--activations static", ["--activations static needs ranges", "add --calibration"]),
    ("--activations sometimes", ["'--activations'", "'sometimes'", "dynamic"]),
    ("--activation-terms 2 --activations none", ["--activation-terms 2 needs", "dynamic"]),
    ("--products some", ["--products some", "'all' or 'triangular'"]),
    ("--target gpu", ["'--target'", "'gpu'", "cpu-vnni"]),
    ("--image-size 8", ["image options without --calibration"]),
    ("--calibration none.npz", ["calibration none.npz: cannot be read", "give an .npz"]),
    ("--calibration . --image-size a", ["--image-size 'a': give numbers"]),
    (f"--calibration {DIGITS} --mean 1,x", ["--mean '1,x': give numbers"]),
    ("--input-shape x", ["--input-shape 'x': give NAME=1,512"]),
    ("--input-shape =1,2", ["--input-shape '=1,2': give NAME=1,512"]),
    ("--input-shape x=1,a", ["--input-shape 'x=1,a': give NAME=1,512"]),
    ("--input-shape x=0,3", ["--input-shape 'x=0,3': give NAME=1,512"]),
    ("--input-shape x=-1", ["give NAME=1,512"]),
    ("--input-shape z=1,2", ["no input 'z'", "['x']"]),
    ("--input-shape x=1,3,8", ["--input-shape x=1,3,8: the input is [1, 3, 8, 8]"]),
    ("--input-shape x=1,4,8,8", ["--input-shape x=1,4,8,8: the input is [1, 3, 8, 8]"]),
    ("--input-shape x=1,3,8,8 --input-shape x=1,3,8,9", ["input 'x' has two shapes"]),
    (f"--input-shape x=1,3,8,8 --data {DIGITS}", ["leave it away with --data"]),
    ("--plan missing.json --terms 3", ["--terms beside --plan", "leave one out"]),
    ("--plan missing.json", ["plan missing.json: cannot be read (No such file"]),
    ("--plan .", ["plan .: cannot be read (Is a directory)"]),
    ("--plan-out no/p.json", ["plan no/p.json: the folder no does not exist"]),
    ("--plan-out sub", ["plan sub is a folder"]),
    ("--plan-out p.npz", ["plan p.npz: give the JSON file"]),
    ("--plan-out out.onnx", ["plan out.onnx would overwrite the output"]),
    ("--plan-out in.onnx", ["plan in.onnx would overwrite the input model"]),
    ("--report no/r.json", ["report no/r.json: the folder no does not exist"]),
    ("--report sub.json", ["report sub.json is a folder"]),
    ("--report r.txt", ["--report r.txt: give a name that ends in .json or .html"]),
    ("--report in.json --plan-out in.json", ["report in.json would overwrite the plan"]),
    ("--no-such-option", ["No such option: --no-such-option", "see `onnxq quantize --help`"]),
    ("one-too-many", ["unexpected extra argument", "(one-too-many)"]),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS, ids=[o for o, _ in OPTIONS])
@pytest.mark.usefixtures("no_work")
def test_refused_before_the_work(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, options: str, parts: list[str]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.json").mkdir()
    monkeypatch.chdir(tmp_path)
    message = refused(tmp_path, "quantize", source.name, "out.onnx", *options.split())
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "arguments",
    ["compare no.onnx no.onnx", "bench no.onnx no.onnx", "sweep no.onnx out --calibration no"],
)
def test_threads_are_limited_by_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    message = refused(tmp_path, *arguments.split(), "--threads", 13)
    assert "'--threads': 13 is more than 12, 4 for each core of this machine; see" in message
    assert "--threads" not in refused(tmp_path, *arguments.split(), "--threads", 12)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("quantize", "Missing argument 'IN.onnx'"),
        ("quantize in.onnx", "Missing argument 'OUT.onnx'"),
        ("compare in.onnx", "Missing argument 'QUANT.onnx'"),
        ("compare in.onnx in.onnx --threads 0", "'--threads'"),
        ("compare in.onnx in.onnx --threads x", "'--threads'"),
        ("inspect", "Missing argument 'MODEL.onnx'"),
        ("inspect --terms 2 in.onnx", "No such option: --terms"),
        ("no-such-command", "No such command 'no-such-command'"),
        ("--no-such-option", "No such option: --no-such-option"),
    ],
)
def test_usage(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(tmp_path, *arguments.split())
    assert part in message
    assert message.endswith("--help`")


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_glob_that_matches_nothing(tmp_path: Path, source: Path, option: str) -> None:
    message = refused(tmp_path, "quantize", source, tmp_path / "out.onnx", option, "cnv")
    assert f"{option} 'cnv' matches no quantizable node; did you mean 'conv'?" in message
    message = refused(tmp_path, "quantize", source, tmp_path / "out.onnx", option, "zzz*")
    assert "'zzz*' matches no quantizable node; see `onnxq inspect`" in message


def test_everything_excluded(tmp_path: Path, source: Path) -> None:
    message = refused(tmp_path, "quantize", source, tmp_path / "out.onnx", "--exclude", "*")
    assert "nothing to quantize" in message and "excluded by --exclude *" in message


@pytest.mark.parametrize(
    "options", [["p.npz"], ["o.onnx", "--plan-out", "p.json"]], ids=["output", "scales"]
)
def test_a_target_must_not_overwrite_the_data(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("p.npz", x=np.zeros((2, 3, 8, 8), np.float32))
    message = refused(tmp_path, "quantize", source, *options, "--data", "p.npz")
    assert "p.npz would overwrite the data: give another name" in message


# --- plans


def _plan(folder: Path, source: Path) -> Path:
    plan = folder / "plan.json"
    options = ("--plan-out", plan, "--activations", "none", "--terms", "2", "--quiet")
    options += ("--offset", "off")
    works("quantize", source, folder / "first.onnx", *options)
    return plan


def _edit(plan: Path, **fields: Any) -> None:
    content = json.loads(plan.read_text())
    content["nodes"][0].update(fields)
    plan.write_text(json.dumps(content))


def _refused_plan(folder: Path, source: Path, plan: Path) -> str:
    return refused(folder, "quantize", source, folder / "out.onnx", "--plan", plan)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"color": "red"}, ["not a valid plan at nodes.0.color", "not permitted"]),
        ({"bits": 1}, ["not a valid plan at nodes.0.bits", "greater than or equal to 2"]),
        ({"terms": "many"}, ["not a valid plan at nodes.0.terms"]),
        ({"terms": 9}, ["not a valid plan at nodes.0.terms"]),
        ({"series": "fourier"}, ["not a valid plan at nodes.0.series"]),
        ({"block_size": 32}, ["at nodes.0", "block_size goes with granularity per_block"]),
        ({"granularity": "per_block"}, ["block_size goes with granularity per_block"]),
        (
            {"granularity": "per_block", "block_size": 8, "activations": "dynamic"},
            ["activations dynamic needs one scale per output channel"],
        ),
        (
            {"layout": "merged", "activations": "dynamic", "bits": 5, "series": "digit"},
            ["terms x bits <= 8, got 2 x 5"],
        ),
        (
            {"layout": "merged", "activations": "dynamic", "series": "joint"},
            ["needs series digit"],
        ),
        ({"name": "other"}, ["made for another model", "'other'", "--plan-out"]),
        ({"op_type": "MatMul"}, ["made for another model", "no MatMul node 'conv'"]),
        ({"shape": [4, 3, 3, 5]}, ["[4, 3, 3, 3]", "[4, 3, 3, 5]"]),
        ({"crc32": "00000000"}, ["'conv' has other values"]),
    ],
)
def test_a_plan_that_contradicts(
    tmp_path: Path, source: Path, fields: dict[str, Any], parts: list[str]
) -> None:
    plan = _plan(tmp_path, source)
    _edit(plan, **fields)
    message = _refused_plan(tmp_path, source, plan)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"no json", "Invalid JSON"),
        (b"", "Invalid JSON"),
        (b"[]", "not a valid plan"),
        (b"{}", "at nodes: Field required"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"nodes": [], "format_version": 2}', "at format_version"),
        (b'{"nodes": [], "mode": ""}', "at mode"),
        (b'{"nodes": [{"name": "a", "op_type": "Conv"}, {"name": "a", "op_type": "Conv"}]}', "'a'"),
        (b'{"nodes": []}', "nothing to quantize"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, source: Path, text: bytes, part: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_bytes(text)
    assert part in _refused_plan(tmp_path, source, plan)


def test_a_plan_of_another_model(tmp_path: Path, source: Path) -> None:
    plan = _plan(tmp_path, source)
    assert "made for another model" in _refused_plan(tmp_path, DEMO, plan)


def test_scales_that_are_damaged(tmp_path: Path, source: Path) -> None:
    plan = _plan(tmp_path, source)
    scales = plan.with_suffix(".npz")
    good = scales.read_bytes()
    half = len(good) // 2
    for bad in (
        b"",
        b"no zip",
        good[:half],
        good[:60] + bytes(30) + good[90:],
        good[:half] + b"\xff" * 20 + good[half + 20 :],
    ):
        scales.write_bytes(bad)
        message = _refused_plan(tmp_path, source, plan)
        assert "plan.npz" in message and "delete the file" in message, message


HOW = ["pickled", "missing", "rank", "length", "nan", "negative", "text", "whole", "ratio"]


@pytest.mark.parametrize("how", HOW)
def test_scales_that_cannot_be_right(tmp_path: Path, source: Path, how: str) -> None:
    plan = _plan(tmp_path, source)
    with np.load(plan.with_suffix(".npz")) as file:
        arrays = dict(file)
    name = "conv/term1/scale"
    if how == "missing":
        del arrays[name]
    else:
        arrays[name] = {
            "pickled": np.array([{}, {}, {}, {}], object),
            "rank": arrays[name][:, None],
            "length": arrays[name][:3],
            "negative": -arrays[name],
            "ratio": arrays[name] * 3,  # of two terms of a digit series it is 2^bits
            "nan": arrays[name] * np.nan,
            "text": np.array(["a", "b", "c", "d"]),
            "whole": np.ones(4, np.int64),
        }[how]
    np.savez(plan.with_suffix(".npz"), allow_pickle=True, **arrays)
    message = _refused_plan(tmp_path, source, plan)
    assert ".npz" in message and "delete " in message, message
    found_on_reading = {"missing", "rank", "nan", "negative", "text", "whole"}
    assert ("'conv/term1/scale' is missing or damaged" in message) == (how in found_on_reading)


def _disk_full_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)


def test_disk_full_for_the_plan(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disk_full_for(monkeypatch, "p.npz")
    message = refused(
        tmp_path, "quantize", source, tmp_path / "out.onnx", "--plan-out", tmp_path / "p.json"
    )
    assert "p.npz: cannot be written (No space left on device)" in message


def test_disk_full_for_the_report(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disk_full_for(monkeypatch, "r.json")
    report = tmp_path / "r.json"
    done = command("quantize", source, tmp_path / "out.onnx", "--report", report)
    assert done == Outcome(2, "", f"error: {report}: cannot be written (No space left on device)\n")
    # the report is about the file that was written, so the model is there by then
    assert contents(tmp_path).keys() == {"in.onnx", "out.onnx"}
