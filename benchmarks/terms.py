"""Error, size and latency of every real model for one, two and three terms, without data.

python benchmarks/terms.py [--bits 4] [--activations none] [--layout parallel]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from real import CLASSIFIERS, MODELS, classifier_data, samples
from rich.console import Console
from rich.table import Table

import onnxq


def main(
    bits: Annotated[int, typer.Option(help="Bits per term.")] = 4,
    activations: Annotated[str, typer.Option(help="none or dynamic.")] = "none",
    layout: Annotated[str, typer.Option(help="parallel or merged.")] = "parallel",
    count: Annotated[int, typer.Option(help="Samples; classifiers take 500.")] = 8,
    latency: Annotated[bool, typer.Option(help="Also time each against float.")] = True,
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    title = f"{bits}-bit terms, activations {activations}, {layout}"
    table = Table(title=title, title_justify="left")
    for name in ("model", "terms", "rel. error", "agreement", "size", "latency", "nodes"):
        table.add_column(name, justify="left" if name == "model" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for path in (p for p in sorted(MODELS.glob("*.onnx")) if only in p.stem):
            name = path.stem
            data = classifier_data(name, 500) if name in CLASSIFIERS else samples(name, count)
            for terms in (1, 2, 3):
                target = Path(folder) / "q.onnx"
                made = onnxq.quantize(
                    path,
                    target,
                    weight_bits=bits,
                    terms=terms,
                    activations=activations,  # type: ignore[arg-type]
                    layout=layout,  # type: ignore[arg-type]
                    data={key: value[:1] for key, value in data.items()},
                )
                found = onnxq.compare(path, target, data=data, latency=latency, threads=1)
                report = made.report
                worst = max(output.relative_error for output in found.outputs)
                agreement = found.outputs[0].top1_agreement
                table.add_row(
                    name,
                    str(terms),
                    f"{worst:.2e}",
                    "–" if agreement is None else f"{agreement:.3f}",
                    f"{found.size_ratio:.3f}",
                    "–" if found.latency_ratio is None else f"{found.latency_ratio:.2f}",
                    f"{report.quantized}/{report.quantized + len(report.left_alone)}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
