"""How long onnxruntime takes to load a file by the bits of its weights, in float compute.

python benchmarks/loading.py [--rounds 7]   ResNet-50's shape; ratios to the float file, in turns
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import onnx
import typer
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.session import open_session

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from resnet50 import build_resnet50


def main(rounds: Annotated[int, typer.Option(help="Loads of each file, in turns.")] = 7) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        onnx.save(build_resnet50(), source)
        files = {"float": source}
        for bits in range(2, 9):
            files[f"{bits} bits"] = path = Path(folder) / f"{bits}.onnx"
            onnxq.quantize(
                source, path, weight_bits=bits, terms=1, activations="none", priors=False
            )
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(rounds):
            for name, path in files.items():
                start = time.perf_counter()
                open_session(path, threads=1)
                seconds[name].append(time.perf_counter() - start)
        size, unit = source.stat().st_size, statistics.median(seconds["float"])
        table = Table("weights", "size", "load time")
        for name, path in files.items():
            share = path.stat().st_size / size
            table.add_row(name, f"{share:.3f}", f"{statistics.median(seconds[name]) / unit:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
