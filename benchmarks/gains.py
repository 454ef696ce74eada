"""Single MatMuls in dynamic integer compute against float: from which size on they gain.

python benchmarks/gains.py [--rows 1,64]

The weight has 8 bits, one thread; passes/gains.py has what follows for `--activations auto`.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.session import open_session, run

RNG = np.random.default_rng(0)
SHAPES = (
    *((64, 64), (128, 128), (192, 192), (128, 512), (256, 256)),
    *((512, 512), (1280, 1000), (2048, 1000), (4096, 4096)),
)


def main(
    rows: Annotated[str, typer.Option(help="Rows of the input, by commas.")] = "1,64",
    bits: Annotated[int, typer.Option(help="Of the weight.")] = 8,
) -> None:
    counts = [int(text) for text in rows.split(",")]
    table = Table("weight", *(f"{count} rows" for count in counts))
    for inputs, outputs in SHAPES:
        proto = matmul(inputs, outputs)
        settings = {"activations": "dynamic", "weight_bits": bits, "terms": 1, "outliers": 0}
        made = onnxq.quantize(proto, **settings).model
        sessions = [open_session(p.SerializeToString(), threads=1) for p in (proto, made)]
        cells = []
        for count in counts:
            feed = {"x": RNG.standard_normal((count, inputs)).astype(np.float32)}
            runs = [partial(run, session, feed) for session in sessions]
            found = quartiles(
                paired_ratios(time_in_turns(runs, warmup=5, rounds=200, seconds=10)).T[1]
            )
            cells.append(f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})")
        table.add_row(f"{inputs}×{outputs}", *cells)
    Console(width=100).print(table)


def matmul(inputs: int, outputs: int) -> onnx.ModelProto:
    """x [N, inputs] times a random weight."""
    weight = (RNG.standard_normal((inputs, outputs)) / inputs**0.5).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="dot")],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    typer.run(main)
