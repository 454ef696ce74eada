"""What plain `onnxq quantize IN OUT`, without data, makes of each model: size and error.

python benchmarks/plain.py [--activations none] [--only squeezenet]

The relative error is that of every output, on 12 real samples.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from real import MODELS, samples
from rich.console import Console
from rich.table import Table

import onnxq

SAMPLES = 12


def main(
    activations: Annotated[Literal["auto", "none"], typer.Option(help="none: float compute.")] = (
        "auto"
    ),
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    table = Table("model", "size", "relative error")
    settings: dict[str, Any] = {} if activations == "auto" else {"activations": activations}
    with tempfile.TemporaryDirectory() as folder:
        for path in (p for p in sorted(MODELS.glob("*.onnx")) if only in p.stem):
            made = Path(folder) / path.name
            onnxq.quantize(path, made, **settings)
            found = onnxq.compare(path, made, data=samples(path.stem, SAMPLES))
            errors = " ".join(f"{100 * output.relative_error:.3g}%" for output in found.outputs)
            table.add_row(path.stem, f"{made.stat().st_size / path.stat().st_size:.3f}", errors)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
