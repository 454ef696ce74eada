"""A file of several terms, cut down and extended again: error and size at every step.

python benchmarks/progressive.py [MODEL] [--samples 64]

The error is that of the first output against the float model, on real samples; top-1 says how often
both give the same class. `quantize` is the model quantized with that many terms from the start.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import real
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.embedded_plan import embed_plan, embedded_plan
from onnxq.model import load, save
from onnxq.progressive import extend, truncate

FORMS: dict[str, dict[str, Any]] = {
    "float, merged": {"activations": "none", "layout": "merged"},
    "dynamic, parallel": {"activations": "dynamic", "layout": "parallel"},
}


def quantized(source: Path, target: Path, **options: Any) -> Path:
    """The model in a file that holds its plan."""
    result = onnxq.quantize(source, target, **options)
    if embedded_plan(load(target)) is None:
        loaded = load(result.model)
        embed_plan(loaded, result.plan)
        save(loaded, target)
    return target


def steps(source: Path, folder: Path, **options: Any) -> Iterator[tuple[str, Path]]:
    """Each step by name, and the file that it makes."""
    for terms in (3, 2, 1):
        path = quantized(source, folder / f"q{terms}.onnx", terms=terms, **options)
        yield f"quantize, {terms} terms", path
    whole = folder / "q3.onnx"
    for terms in (2, 1):
        target = folder / f"cut{terms}.onnx"
        truncate(whole, target, terms)
        yield f"truncate to {terms}", target
        whole = target
    grown = folder / "q1.onnx"
    for terms in (2, 3):
        target = folder / f"grown{terms}.onnx"
        extend(grown, source, target, terms)
        yield f"1 term, extended to {terms}", target
        grown = target
    extend(folder / "cut1.onnx", source, folder / "back.onnx", 3)
    yield "cut to 1, extended to 3", folder / "back.onnx"


def main() -> None:
    """Print one table per form and series."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="squeezenet1.1")
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    source = real.MODELS / f"{args.model}.onnx"
    data = real.samples(args.model, args.samples)
    for form, options in FORMS.items():
        for series in ("fixed_ratio", "digit"):
            table = Table("step", "bytes", "SQNR dB", "MAE", "top-1", title=f"{form}, {series}")
            with tempfile.TemporaryDirectory() as name:
                for step, path in steps(source, Path(name), series=series, **options):
                    found = onnxq.compare(source, path, data=data, latency=False).outputs[0]
                    same = found.top1_agreement
                    table.add_row(
                        step,
                        f"{path.stat().st_size}",
                        f"{found.sqnr_db:.1f}",
                        f"{found.mae:.2g}",
                        "" if same is None else f"{same:.0%}",
                    )
            Console(width=100).print(table)


if __name__ == "__main__":
    main()
