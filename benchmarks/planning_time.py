"""Time of planning and expansion, in units of one onnx.load + onnx.save of the same model.

A ResNet-50-shaped model (25.6 million parameters, built here). Medians of interleaved runs.

python benchmarks/planning_time.py [--runs 3]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

from onnxq.model import load, raise_opset
from onnxq.passes import Expand, SearchScales, SelectNodes, required_opset
from onnxq.pipeline import canonicalize

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from resnet50 import build_resnet50

CASES = [(kind, terms) for kind in ("fixed_ratio", "digit", "joint") for terms in (1, 2, 3)]


def main(runs: Annotated[int, typer.Option(help="Interleaved runs.")] = 3) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        build_resnet50(path)
        times: dict[object, list[float]] = {case: [] for case in (*CASES, "unit")}
        for _ in range(runs):
            times["unit"].append(_unit(path))
            for case in CASES:
                times[case].append(_plan_and_expand(path, *case))
    unit = float(np.median(times["unit"]))
    table = Table(title="planning + expansion / (onnx.load + onnx.save), 4 bits, per channel")
    for name in ("series", "1 term", "2 terms", "3 terms"):
        table.add_column(name, justify="right")
    for kind in ("fixed_ratio", "digit", "joint"):
        ratios = [float(np.median(times[kind, n])) / unit for n in (1, 2, 3)]
        table.add_row(kind, *(f"{ratio:.1f}" for ratio in ratios))
    Console(width=100).print(table)


def _unit(path: Path) -> float:
    start = time.perf_counter()
    onnx.save(onnx.load(path), path.with_name("copy.onnx"))
    return time.perf_counter() - start


def _plan_and_expand(path: Path, series: str, terms: int) -> float:
    model = load(path)
    canonicalize(model)
    start = time.perf_counter()
    plan = SelectNodes(bits=4, terms=terms, series=series, activations="none")(model)
    SearchScales()(model, plan)
    model = raise_opset(model, required_opset(plan))
    Expand(plan)(model)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
