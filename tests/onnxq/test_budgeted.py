"""Bounds on error and size, from the command line: kept, refused, or the closest on request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import DEMO, DIGITS, works
from command import onnxq as command

import onnxq

CALIBRATION = DEMO.with_name("digits_calibration.npz")
FLOAT = ("--activations", "none", "--effort", "fast", "--calibration", CALIBRATION)


def test_a_tolerance_is_kept_on_samples_that_were_not_seen(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    out = works("quantize", DEMO, target, "--tolerance", "error=1%", *FLOAT)
    assert "error=1%, measured on" in " ".join(out.split())
    found = onnxq.compare(DEMO, target, data=DIGITS, latency=False)
    assert found.outputs[0].relative_error < 0.015  # other samples: half as much again
    assert found.size_ratio < 0.5


def test_a_looser_tolerance_is_smaller() -> None:
    with np.load(CALIBRATION) as archive:
        samples = {name: archive[name] for name in archive.files if name != "label"}
    sizes = [
        onnxq.quantize(
            DEMO, tolerance=text, activations="none", effort="fast", calibration=samples
        ).report.size_after
        for text in ("error=0.5%", "error=2%", "error=20%")
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]


def test_a_size_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    works("quantize", DEMO, target, "--max-size", "100KB", *FLOAT)
    assert target.stat().st_size <= 105_000  # the plan inside counts a few KB


@pytest.mark.parametrize("data", [(), FLOAT], ids=["estimated", "measured"])
def test_what_cannot_be_kept_is_said_and_nothing_is_written(
    tmp_path: Path, data: tuple[object, ...]
) -> None:
    done = command("quantize", DEMO, tmp_path / "out.onnx", "--max-size", "1KB", *data)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "1000 bytes cannot be kept" in done.err and "--best-effort" in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_closest_on_request(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    out = works("quantize", DEMO, target, "--max-size", "1KB", "--best-effort", *FLOAT)
    assert "this is the closest" in " ".join(out.split())
    assert target.exists()


def test_the_default_says_what_it_chose(tmp_path: Path) -> None:
    for options, bound in (
        (("--activations", "dynamic"), "5%"),
        (("--target", "cpu-avx2"), "2%"),
        (("--target", "cpu-arm"), "5%"),
    ):
        out = " ".join(works("quantize", DEMO, tmp_path / "out.onnx", *options).split())
        assert f"error={bound} (the default tolerance), estimated from the weights" in out
        assert "left in float" not in out


def test_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    out = works("sweep", DEMO, folder, "--calibration", CALIBRATION, "--points", "3")
    assert "point-00" in out
    found = json.loads((folder / "sweep.json").read_text())
    sizes = [point["size"] for point in found["points"]]
    errors = [point["measured"]["energy"]["value"] for point in found["points"]]
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    target = tmp_path / "out.onnx"
    works("quantize", DEMO, target, "--plan", folder / "point-00.json")
    assert target.stat().st_size == pytest.approx(sizes[0], rel=0.1)


def test_sweep_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = command("sweep", DEMO, tmp_path, "--calibration", CALIBRATION)
    assert (done.code, "not empty" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", ["60KB", "75KB", "100KB"])
@pytest.mark.parametrize("data", [(), ("--calibration", CALIBRATION, "--effort", "fast")])
def test_the_file_itself_keeps_the_size(tmp_path: Path, size: str, data: tuple[str, ...]) -> None:
    """With the plan that it holds, and the biases that are added at last."""
    target = tmp_path / "out.onnx"
    works("quantize", DEMO, target, "--max-size", size, *FLOAT, *data)
    assert 0.8 < target.stat().st_size / (1000 * int(size[:-2])) <= 1
