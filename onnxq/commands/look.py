"""`onnxq inspect` and `onnxq doctor`: what a model is made of, and what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.shared import AsJson, say
from onnxq.doctor import diagnose
from onnxq.inspection import inspect as run_inspect
from onnxq.show import show_diagnosis, show_inspection


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx")],
    as_json: AsJson = False,
) -> None:
    """Show each candidate node and what would be done, or the terms of a quantized model."""
    found = run_inspect(model)
    say(found, show_inspection, as_json=as_json)


def doctor(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show versions, what this CPU computes fast and exactly, and what follows for a plan."""
    found = diagnose(refresh=refresh)
    say(found, show_diagnosis, as_json=as_json)
