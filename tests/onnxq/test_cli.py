"""What the commands print and write when all is well, and how they end when they are stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
from command import DEMO, DIGITS, contents, works, write
from command import onnxq as command

import onnxq.api
from onnxq.commands import look
from onnxq.errors import OnnxqError
from onnxq.goal import Infeasible
from onnxq.model import write as write_module


def _error_rows(text: str) -> dict[str, list[str]]:
    """The rows of the error table: output -> cells."""
    rows = (line.strip("│| ") for line in text.splitlines() if line[:1] in "│|")
    cells = [[cell.strip() for cell in re.split(r"[│|]", row)] for row in rows]
    return {row[0]: row[1:] for row in cells}


OPTIONS = [
    *(f"--weight-bits {bits}" for bits in range(2, 9)),
    "--terms 1",
    "--terms 3",
    *(f"--series {series}" for series in ("fixed_ratio", "digit", "joint")),
    "--layout merged",
    "--activations dynamic",
    "--activations dynamic --layout merged",
    "--activations none",
    "--activations none --layout merged",
    "--activations none --block-size 8",
    "--activations none --block-size 16 --terms 1 --layout merged",
    "--include *conv*",
    "--exclude *stage1*",
]
FEW_BITS = ("--weight-bits 2", "--terms 1")


@pytest.fixture(scope="module")
def some_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    with np.load(DIGITS) as file:
        np.savez(path, **{name: file[name][:60] for name in file.files})
    return path


@pytest.mark.parametrize("options", OPTIONS)
def test_each_option_gives_a_good_model(tmp_path: Path, some_digits: Path, options: str) -> None:
    target, report = tmp_path / "out.onnx", tmp_path / "r.json"
    works(
        *("quantize", DEMO, target, "--data", some_digits, "--report", report, "--quiet"),
        *options.split(),
    )
    quantized = onnx.load(target)
    onnx.checker.check_model(quantized, full_check=True)
    with np.load(some_digits) as file:
        images, labels = file["image"], file["label"]
    # one at a time, as the report does: dynamic scales depend on the batch
    got = np.concatenate([small.run(quantized, {"image": image[None]})[0] for image in images])
    (want,) = small.run(onnx.load(DEMO), {"image": images})
    found = json.loads(report.read_text())["comparison"]
    (logits,) = found["outputs"]
    error = np.abs(got - want)
    assert logits["mae"] == pytest.approx(error.mean(), rel=1e-3)
    assert logits["max_abs_error"] == pytest.approx(error.max(), rel=1e-3)
    noise = 10 * np.log10((want**2).sum() / (error**2).sum())
    assert logits["sqnr_db"] == pytest.approx(noise, abs=0.05)
    assert logits["top1_agreement"] == (got.argmax(1) == want.argmax(1)).mean()
    assert found["quantized_accuracy"] == (got.argmax(1) == labels).mean()
    assert found["float_accuracy"] == (want.argmax(1) == labels).mean()
    assert found["samples"] == 60
    assert logits["sqnr_db"] > (0 if options in FEW_BITS else 10)
    assert found["quantized_accuracy"] >= (0.3 if options in FEW_BITS else 0.95)


def test_more_bits_and_more_terms_give_smaller_errors(tmp_path: Path, some_digits: Path) -> None:
    def sqnr(*options: object) -> float:
        report = tmp_path / "r.json"
        works(
            *("quantize", DEMO, tmp_path / "out.onnx", "--data", some_digits, "--quiet"),
            *("--report", report, "--activations", "none", *options),
        )
        return float(json.loads(report.read_text())["comparison"]["outputs"][0]["sqnr_db"])

    by_bits = [sqnr("--terms", 1, "--weight-bits", bits) for bits in (2, 4, 6, 8)]
    assert by_bits == sorted(by_bits)
    by_terms = [sqnr("--weight-bits", 3, "--terms", terms) for terms in (1, 2, 3)]
    assert by_terms[0] + 10 < by_terms[1] < by_terms[2] - 10


def test_summary(tmp_path: Path) -> None:
    out = works(
        *("quantize", DEMO, tmp_path / "out.onnx", "--data", DIGITS),
        *("--exclude", "*classifier*", "--exclude", "*Gemm*", "--terms", "2"),
        *("--activations", "dynamic"),
    )
    lines = out.splitlines()
    assert any(re.match(r"quantized +\d+ nodes", line) for line in lines)
    assert any(re.search(r"\d+ × Conv: 2 terms of 4 bits, int8 dynamic", line) for line in lines)
    assert any(re.match(r"left alone +.*: excluded by --exclude", line) for line in lines)
    assert any(re.match(r"folds +\w+ \d+", line) for line in lines)
    size = re.search(r"^size +526.5 KiB → ([\d.]+) KiB \(([\d.]+) ×\)", out, re.M)
    assert size is not None
    assert float(size[1]) * 1024 == pytest.approx((tmp_path / "out.onnx").stat().st_size, rel=1e-2)
    assert float(size[1]) / 526.5 == pytest.approx(float(size[2]), abs=2e-3)
    bits = re.search(r"^weight bits +([\d.]+) per parameter \(float: 32\)", out, re.M)
    assert bits is not None and 8 <= float(bits[1]) < 12
    assert re.search(r"^opset +13 → 21", out, re.M)
    assert "error against the float model on 450 samples" in out
    assert float(_error_rows(out)["logits"][0]) > 25
    assert re.search(r"^accuracy: float 99\.\d+%, quantized 9\d\.\d+%", out, re.M)
    assert f"wrote {tmp_path / 'out.onnx'}" in out.replace("\n", "")


def test_no_opset_line_where_it_stays(tmp_path: Path) -> None:
    source = write(small.conv_model(opset=17), tmp_path / "in.onnx")
    out = works("quantize", source, tmp_path / "out.onnx", "--weight-bits", 8)
    assert not re.search("^opset", out, re.M)
    assert "made-up samples" in out
    assert "accuracy" not in out


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert works("quantize", DEMO, tmp_path / "out.onnx", "--quiet", "--report", page) == ""
    assert "weight bits" in page.read_text()


def test_reports(tmp_path: Path) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    for name in ("r.json", "r.html", "r.HTM"):
        works("quantize", source, tmp_path / "out.onnx", "--report", tmp_path / name)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report.keys() == onnxq.Report.model_fields.keys()
    assert report["quantized"] == 1
    assert report["size_after"] == (tmp_path / "out.onnx").stat().st_size
    page = (tmp_path / "r.html").read_text()
    assert "<html" in page and "1 nodes" in page
    assert (tmp_path / "r.HTM").read_text() == page


def test_a_plan_gives_the_same_bytes_again(tmp_path: Path) -> None:
    one, two, plan = tmp_path / "1.onnx", tmp_path / "2.onnx", tmp_path / "plan.json"
    options = ("--weight-bits", 3, "--terms", 3, "--activations", "none")
    works("quantize", DEMO, one, "--plan-out", plan, *options)
    assert contents(tmp_path).keys() == {"1.onnx", "plan.json", "plan.npz"}
    again = tmp_path / "again.json"
    works("quantize", DEMO, two, "--plan", plan, "--plan-out", again)
    assert two.read_bytes() == one.read_bytes()
    assert again.read_bytes() == plan.read_bytes()
    plan.with_suffix(".npz").unlink()  # the scales are searched again
    works("quantize", DEMO, two, "--plan", plan)
    assert two.read_bytes() == one.read_bytes()


def test_an_existing_target_is_replaced(tmp_path: Path) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    (tmp_path / "out.onnx").write_bytes(b"before")
    works("quantize", source, tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx")
    assert contents(tmp_path).keys() == {"in.onnx", "out.onnx"}


def test_external_data_are_taken_along(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = tmp_path / "a" / "in.onnx"
    onnx.save(
        small.conv_model(), source, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    out = works("quantize", source, tmp_path / "out.onnx")
    total = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert f"size         {total / 1024:.1f} KiB" in out
    assert contents(tmp_path).keys() == {"a", "a/in.onnx", "a/w.bin", "out.onnx"}


# --- how a run ends


def test_version() -> None:
    assert works("--version") == f"onnxq {onnxq.__version__}\n"


@pytest.mark.parametrize("command_name", ["", "quantize", "compare", "inspect"])
def test_help(command_name: str) -> None:
    out = works(*command_name.split(), "--help")
    assert out.startswith(f"Usage: onnxq {command_name}".rstrip())
    for option in {"quantize": ["--weight-bits", "--plan-out"], "": ["inspect"]}.get(
        command_name, []
    ):
        assert option in out


def test_no_arguments_show_the_help() -> None:
    assert works() == works("--help")


@pytest.mark.parametrize(("module", "name"), [(onnxq.api, "rewrite"), (write_module, "_sync")])
def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source = write(small.conv_model(), tmp_path / "in.onnx")
    before = contents(tmp_path)
    monkeypatch.setattr(module, name, interrupt)
    done = command("quantize", source, tmp_path / "out.onnx", "--plan-out", tmp_path / "p.json")
    assert (done.code, done.out) == (130, "")
    assert "Traceback" not in done.err and done.err.count("\n") <= 1
    assert contents(tmp_path) == before


_INTERRUPTED_IMPORT = """
import signal, sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from onnxq.cli import main
main()
"""


@pytest.mark.parametrize("module", ["onnxq.commands.app", "typer", "numpy", "onnx", "onnxruntime"])
def test_interrupt_while_starting(module: str) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _INTERRUPTED_IMPORT, module],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_other_errors_are_bugs_and_stay_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(look, "run_inspect", bug)
    with pytest.raises(ZeroDivisionError):
        command("inspect", DEMO)


def test_every_error_of_ours_has_one_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in OnnxqError.__subclasses__():
        if kind is Infeasible:  # 3: a bound that cannot be kept is no bad input
            continue

        def fail(*_: object, kind: type[OnnxqError] = kind) -> None:
            raise kind("what, where,\nwhat to do")

        monkeypatch.setattr(look, "run_inspect", fail)
        done = command("inspect", DEMO)
        assert (done.code, done.err) == (2, "error: what, where, what to do\n")


def _program(*args: object, encoding: str = "utf-8") -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", "from onnxq.cli import main; main()", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=Path(__file__).parent,  # the installed package, not the folder of the sources
    )


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away(options: list[str]) -> None:
    with _program("inspect", DEMO, *options) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 1)


def test_a_reader_that_goes_away_stops_no_file(tmp_path: Path) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    target, report = tmp_path / "out.onnx", tmp_path / "r.json"
    with _program("quantize", source, target, "--report", report) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert contents(tmp_path).keys() == {"in.onnx", "out.onnx", "r.json"}
    assert json.loads(report.read_text())["quantized"] == 1


def test_a_terminal_without_our_letters(tmp_path: Path) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    with _program("quantize", source, tmp_path / "ö.onnx", encoding="ascii") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b"1 ? Conv" in out
    assert (tmp_path / "ö.onnx").exists()


def test_written_numbers_are_finite_in_json(tmp_path: Path) -> None:
    """JSON has no Infinity; an exact output has an infinite SQNR."""
    text = (
        "g (float[1,4] x) => (float[1,2] y, float[1,4] z) { [dot] y = MatMul (x, w) z = Neg (x) }"
    )
    source = write(small.model(text, {"w": np.ones((4, 2), np.float32)}), tmp_path / "in.onnx")
    works("quantize", source, tmp_path / "out.onnx", "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert report["comparison"]["outputs"][1]["sqnr_db"] == "Infinity"
