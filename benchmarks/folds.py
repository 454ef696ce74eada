"""The exact folds on every model: operators before and after, and the largest output difference.

python benchmarks/folds.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from real import MODELS, samples
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.feeds import load_data
from onnxq.session import input_specs, open_session, run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models"))
from resnet50 import build_mobileone_like, sample_images  # noqa: E402  (models/ is no package)

SHOWN = ("Conv", "MatMul", "Gemm", "BatchNormalization", "Add", "Constant")


def main() -> None:
    table = Table(title="nodes before → after; difference = max |folded − float| / max |float|")
    for name in ("model", "nodes", *SHOWN, "difference"):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as folder:
        for name, path, data in cases(Path(folder)):
            target = Path(folder) / "folded.onnx"
            report = onnxq.fold(path, target).report
            nodes = f"{sum(report.before.values())} → {sum(report.after.values())}"
            counts = [f"{report.before.get(op, 0)} → {report.after.get(op, 0)}" for op in SHOWN]
            table.add_row(name, nodes, *counts, f"{difference(path, target, data):.1e}")
    Console(width=140).print(table)


def cases(folder: Path):
    digits = np.load(ROOT / "models" / "digits_test.npz")["image"]
    yield "demo RepVGG", ROOT / "models" / "digits_repvgg.onnx", {"image": digits}
    path = folder / "mobileone.onnx"
    model = build_mobileone_like(path)
    yield "MobileOne-like", path, {model.graph.input[0].name: sample_images(32, 32, seed=1)}
    if not MODELS.exists():
        print(f"the trained models are skipped: {MODELS} is not there (set ONNXQ_REAL)")
        return
    for path in sorted(MODELS.glob("*.onnx")):
        yield path.stem, path, samples(path.stem, 16)


def difference(path: Path, target: Path, data: dict[str, np.ndarray]) -> float:
    reference, folded = open_session(path), open_session(target)
    largest = 0.0
    for feed in load_data(data, input_specs(reference)):
        for want, got in zip(run(reference, feed), run(folded, feed), strict=True):
            scale = float(np.abs(want).max())
            if scale > 0:
                largest = max(largest, float(np.abs(got - want).max()) / scale)
    return largest


if __name__ == "__main__":
    main()
