"""Static compute: agreement with the float model by the way ranges are chosen.

Calibrated on the first 32 samples, judged on the rest: `python benchmarks/static_ranges.py`.
"""

from __future__ import annotations

import sys
from typing import get_args

import numpy as np
import real
from rich.console import Console
from rich.table import Table

from onnxq.calibration import open_calibration
from onnxq.kernels_ref import relative_error, top1_agreement
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import Expand, SearchScales, SelectNodes, required_opset
from onnxq.passes.insert_qdq import InsertQDQ
from onnxq.passes.search_ranges import RangeMethod
from onnxq.pipeline import apply, canonicalize
from onnxq.session import input_specs, open_session
from onnxq.static import plan_static

CALIBRATION, COUNT = 32, 232
FORMS = {
    "W8": {"bits": 8},
    "W8, uint8·uint8": {"bits": 8, "avoid_saturation": False},
    "W7": {"bits": 7},
    "W4 + W4": {"bits": 4, "terms": 2},
}


def quantized(
    path: str, images: np.ndarray, method: RangeMethod, *, bits: int, terms: int = 1, **how: bool
) -> bytes:
    """The model in static compute."""
    model = load(path)
    canonicalize(model)
    select = SelectNodes(bits=bits, terms=terms, activations="static", layout="merged")
    plan = SearchScales()(model, select(model))
    specs = input_specs(open_session(path, threads=1))
    samples = open_calibration({specs[0].name: images}, specs)
    plan = plan_static(model, plan, samples, method, **how)
    model = raise_opset(model, required_opset(plan))
    apply(Expand(plan), model)
    apply(InsertQDQ(plan), model)
    return bytes(to_proto(model).SerializeToString())


def outputs(model: str | bytes, images: np.ndarray) -> np.ndarray:
    """Logits of all images."""
    session = open_session(model, threads=1)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in images])


def main(names: list[str]) -> None:
    """Print a table per classifier."""
    for name in names or list(real.CLASSIFIERS):
        path = str(real.MODELS / f"{name}.onnx")
        images = real.classifier_data(name, COUNT)["input"]
        want = outputs(path, images[CALIBRATION:])
        table = Table("ranges", *FORMS, title=f"{name}: top-1 agreement (relative error)")
        for method in get_args(RangeMethod):
            cells = []
            for form in FORMS.values():
                made = quantized(path, images[:CALIBRATION], method, **form)
                got = outputs(made, images[CALIBRATION:])
                agreement, error = top1_agreement(want, got), relative_error(want, got)
                cells.append(f"{agreement:.3f} ({error:.4f})")
            table.add_row(method, *cells)
        Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
