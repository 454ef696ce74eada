"""Which series for how many terms: top-1 agreement, output error and planning time, without data.

python benchmarks/series_kinds.py [--count 200] [--bits 4]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import onnx
import typer
from real import CLASSIFIERS, MODELS, classifier_data
from rich.console import Console
from rich.table import Table

import onnxq


def main(
    count: Annotated[int, typer.Option(help="Samples per model.")] = 200,
    bits: Annotated[int, typer.Option(help="Bits per term.")] = 4,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    table = Table(title=f"{bits}-bit terms, float compute, {count} samples, per channel")
    for name in ("model", "terms", "series", "agreement", "top-1 float", "top-1", "rel. error"):
        table.add_column(name, justify="left" if name in ("model", "series") else "right")
    table.add_column("time / (load + save)", justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for name in CLASSIFIERS:
            data = classifier_data(name, count)
            for terms in (1, 2, 3):
                for series in ("fixed_ratio", "digit", "joint"):
                    row = _measure(MODELS / f"{name}.onnx", Path(folder), data, bits, terms, series)
                    table.add_row(name, str(terms), series, *row)
    Console(width=120).print(table)


def _measure(model, folder, data, bits, terms, series):
    target = folder / "q.onnx"
    start = time.perf_counter()
    onnx.save(onnx.load(model), folder / "copy.onnx")
    unit = time.perf_counter() - start
    start = time.perf_counter()
    onnxq.quantize(
        model, weight_bits=bits, terms=terms, series=series, activations="none", layout="merged"
    )
    spent = time.perf_counter() - start
    onnxq.quantize(
        model,
        target,
        weight_bits=bits,
        terms=terms,
        series=series,
        activations="none",
        layout="merged",
    )
    found = onnxq.compare(model, target, data=data, latency=False)
    output = found.outputs[0]
    return (
        f"{output.top1_agreement:.3f}",
        f"{found.float_accuracy:.3f}",
        f"{found.quantized_accuracy:.3f}",
        f"{output.relative_error:.4f}",
        f"{spent / unit:.0f}",
    )


if __name__ == "__main__":
    typer.run(main)
