"""Quantization error with and without the exact folds before it; same data, float compute.

For the project's demo model and a MobileOne-like network of random weights (models/).

python benchmarks/fold_first.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from onnxq.comparison import compare_sessions
from onnxq.feeds import choose_samples
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import (
    PIPELINE,
    ConstantsToInitializers,
    Expand,
    FoldBatchNorm,
    GemmToMatMul,
    NameNodes,
    RemoveIdentity,
    SearchScales,
    SelectNodes,
    required_opset,
)
from onnxq.session import open_session

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models"))
from resnet50 import build_mobileone_like, sample_images  # noqa: E402  (models/ is no package)

NAMES = (NameNodes(), RemoveIdentity(), ConstantsToInitializers(), GemmToMatMul())
FOLDS = {
    "nothing": NAMES,
    "batch norm": (*NAMES[:3], FoldBatchNorm(), NAMES[3]),
    "everything": PIPELINE,
}


def main() -> None:
    demo = onnx.load(ROOT / "models" / "digits_repvgg.onnx")
    digits = np.load(ROOT / "models" / "digits_test.npz")
    mobileone = build_mobileone_like()
    images = sample_images(64, 32, seed=1)
    cases = {
        "digits_repvgg": (demo, dict(digits)),
        "mobileone-like": (mobileone, {mobileone.graph.input[0].name: images}),
    }
    table = Table(title="relative output error (top-1 agreement), one term per channel")
    for name in ("model", "folded first", "nodes", "weights", "W8", "W4", "W4, 2 terms"):
        table.add_column(name)
    for name, (model, data) in cases.items():
        for folds, passes in FOLDS.items():
            results, weights, nodes = [], 0, 0
            for bits, terms in ((8, 1), (4, 1), (4, 2)):
                proto, plan = quantized(model, passes, bits, terms)
                nodes = len(plan.quantized)
                weights = sum(int(np.prod(node.shape)) for node in plan.quantized)
                reference = open_session(model.SerializeToString())
                samples = choose_samples(reference, data, {})
                found = compare_sessions(
                    reference, open_session(proto.SerializeToString()), samples
                ).outputs[0]
                results.append(f"{found.relative_error:.4f} ({found.top1_agreement:.3f})")
            table.add_row(name, folds, str(nodes), str(weights), *results)
    Console(width=120).print(table)


def quantized(model, passes, bits, terms):
    working = load(model)
    for pass_ in passes:
        pass_(working)
    plan = SelectNodes(bits=bits, terms=terms, activations="none", layout="merged")(working)
    SearchScales()(working, plan)
    working = raise_opset(working, required_opset(plan))
    Expand(plan)(working)
    return to_proto(working), plan


if __name__ == "__main__":
    main()
