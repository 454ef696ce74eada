"""The command line, run in this process, and the one check that every refusal goes through."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import onnx

from onnxq.cli import main

DEMO = Path(__file__).resolve().parents[2] / "models" / "digits_repvgg.onnx"
DIGITS = DEMO.with_name("digits_test.npz")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def onnxq(*args: object) -> Outcome:
    """`onnxq ARGS`: exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["onnxq", *map(str, args)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def works(*args: object) -> str:
    """What a run prints that must succeed, and must not complain."""
    done = onnxq(*args)
    assert (done.code, done.err) == (0, "")
    return done.out


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder`, hidden ones too, with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(folder: Path, *args: object) -> str:
    """The message of a run that must end in one line and exit code 2, and leave `folder` alone."""
    before = contents(folder)
    done = onnxq(*args)
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.endswith("\n"), done.err
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    assert contents(folder) == before
    return done.err[len("error: ") : -1]


def write(proto: onnx.ModelProto, path: Path) -> Path:
    """Save a model, and say where."""
    path.write_bytes(proto.SerializeToString())
    return path
