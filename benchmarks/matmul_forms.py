"""MatMul with constant weights in float compute: folded to float at load, or left to MatMulNBits.

Latency of one MatMul as a ratio to float, timed in turns on one thread; with --stack, the load
time and the memory of a stack of them, each in a process of its own; with --model FILE, both of a
whole model of transformer inputs [batch, tokens], and its outputs' cosine to float.

python benchmarks/matmul_forms.py [--stack] [--model FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.comparison import time_in_turns
from onnxq.kernels_ref import cosine
from onnxq.model import load
from onnxq.passes import PIPELINE, SelectNodes
from onnxq.session import open_session, run

SHAPES = ((384, 1536), (1536, 384), (768, 3072), (3072, 768))
ROWS = (1, 16, 128, 1024)
BATCHES = ((1, 64), (16, 64))
# bits, block_size (None: one scale per channel), terms, MatMulNBits
FORMS = {
    "4 bits folded": (4, 32, 1, False),
    "4 bits, 32": (4, 32, 1, True),
    "4 bits, 128": (4, 128, 1, True),
    "4 bits, channel": (4, None, 1, True),
    "8 bits, 32": (8, 32, 1, True),
    "8 bits, 128": (8, 128, 1, True),
    "4 bits, 32, 2 terms": (4, 32, 2, True),
}


def stack(shapes, rank=3):
    """MatMuls in a row, with a vector added and Relu; x [batch, rows, in] or [rows, in]."""
    rng = np.random.default_rng(0)
    constants, nodes, last = [], [], "x"
    for i, (inputs, out) in enumerate(shapes):
        weight = rng.standard_normal((inputs, out)).astype(np.float32) / np.float32(inputs**0.5)
        bias = rng.standard_normal(out).astype(np.float32)
        constants += [
            numpy_helper.from_array(weight, f"w{i}"),
            numpy_helper.from_array(bias, f"b{i}"),
        ]
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"p{i}"], name=f"matmul{i}"),
            helper.make_node("Add", [f"p{i}", f"b{i}"], [f"s{i}"], name=f"add{i}"),
            helper.make_node("Relu", [f"s{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        last = f"r{i}"
    axes = ["batch", "rows"][2 - rank + 1 :]
    value = partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "stack",
        [value("x", shape=[*axes, shapes[0][0]])],
        [value(last, shape=[*axes, shapes[-1][1]])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def quantized(model, bits, block_size, terms, nbits):
    """The model in one of FORMS."""
    working = load(model)
    for pass_ in PIPELINE:
        pass_(working)
    select = SelectNodes(bits=bits, terms=terms, block_size=block_size, activations="none")
    plan = select(working)
    form = {"form": "nbits" if nbits else "folded"}
    nodes = [n.model_copy(update=form) if n.op_type == "MatMul" else n for n in plan.nodes]
    data = None if isinstance(model, onnx.ModelProto) else token_feed(model, (1, 8))
    return onnxq.quantize(model, plan=plan.model_copy(update={"nodes": nodes}), data=data)


def token_feed(path, shape):
    """Token ids of the given [batch, tokens] for every int64 input of a model file."""
    ids = np.random.default_rng(0).integers(1000, 20000, shape)
    session = open_session(path)
    feed = {}
    for value in session.get_inputs():
        mask, kind = "mask" in value.name, "type" in value.name
        feed[value.name] = np.ones_like(ids) if mask else np.zeros_like(ids) if kind else ids
    return feed


def ratios(sessions, feed, rounds=25, seconds=12.0):
    """Median latency over that of the first session."""
    calls = [partial(run, session, feed) for session in sessions]
    taken = time_in_turns(calls, warmup=2, rounds=rounds, seconds=seconds)
    return np.median(taken / taken[:, :1], axis=0)


def one_matmul(console):
    table = Table(title="one MatMul + Add + Relu: latency / float, 1 thread")
    for name in ("in, out", "rows", *FORMS):
        table.add_column(name)
    for shape in SHAPES:
        model = stack([shape])
        protos = [quantized(model, *form).model for form in FORMS.values()]
        sessions = [open_session(p.SerializeToString(), threads=1) for p in (model, *protos)]
        for rows in ROWS:
            x = np.random.default_rng(1).standard_normal((1, rows, shape[0])).astype(np.float32)
            found = ratios(sessions, {"x": x})
            table.add_row(f"{shape}", str(rows), *(f"{ratio:.2f}" for ratio in found[1:]))
    console.print(table)


def in_own_process(path, feed):
    """(load seconds, bytes after loading, bytes at most) of a model file."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as archive:
        np.savez(archive, *feed.values())
        archive.flush()
        names = json.dumps(list(feed))
        command = [sys.executable, "-m", "onnxq.measure_process", path, archive.name, names, "1"]
        done = subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - no shell
        found = json.loads(done.stdout)
    return found["load_seconds"], found["load_memory"], found["peak_memory"]


def whole(console, title, model, feeds):
    """Latency, load time, memory, size and cosine of every form of a model."""
    table = Table(title=f"{title}: ratios to float, 1 thread")
    shapes = [str(next(iter(feed.values())).shape) for feed in feeds]
    for name in ("form", *shapes, "load", "memory loaded", "memory running", "file", "cosine"):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float": Path(folder) / "float.onnx"}
        onnx.save(model if isinstance(model, onnx.ModelProto) else onnx.load(model), paths["float"])
        for i, (name, form) in enumerate(FORMS.items()):
            paths[name] = Path(folder) / f"{i}.onnx"
            quantized(model, *form).save(paths[name])
        sessions = [open_session(path, threads=1) for path in paths.values()]
        latency = np.stack([ratios(sessions, feed) for feed in feeds], axis=1)
        outputs = [run(session, feeds[-1]) for session in sessions]
        own = np.array([in_own_process(str(path), feeds[0]) for path in paths.values()])
        for i, (name, path) in enumerate(paths.items()):
            size = path.stat().st_size / paths["float"].stat().st_size
            same = min(cosine(a, b) for a, b in zip(outputs[0], outputs[i], strict=True))
            numbers = [*latency[i], *(own[i] / own[0]), size]
            table.add_row(name, *(f"{number:.2f}" for number in numbers), f"{same:.4f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stack", action="store_true", help="load time and memory of 24 MatMuls")
    parser.add_argument("--model", help="an ONNX file with token inputs")
    options = parser.parse_args()
    console = Console(width=160)
    if options.stack:
        feed = {"x": np.random.default_rng(1).standard_normal((1, 16, 768)).astype(np.float32)}
        whole(console, "24 MatMuls", stack([(768, 3072), (3072, 768)] * 12), [feed])
    if options.model:
        feeds = [token_feed(options.model, shape) for shape in BATCHES]
        whole(console, Path(options.model).stem, options.model, feeds)
    if not (options.stack or options.model):
        one_matmul(console)


if __name__ == "__main__":
    main()
