"""Which nodes a term that covers only some output channels is computed in, without data.

python benchmarks/point_forms.py [--rounds 31] [--only conv|matmul|depthwise]

One thread, runs in turns, medians of the ratios to the node with one term; "full" is a second term
of all channels. Weights are random 4-bit integers: times do not depend on the values. Needs
onnxruntime 1.24 (int8 ConvInteger).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import numpy as np
import onnx
import typer
from forms import SIGNED, UNSIGNED, graph
from rich.console import Console
from rich.table import Table

from onnxq.comparison import paired_ratios, time_in_turns
from onnxq.session import open_session, run

RNG = np.random.default_rng(0)
CONVS = ((64, 64, 3, 56), (128, 128, 3, 28), (256, 64, 1, 56), (512, 512, 1, 7))  # in, out, k, size
DEPTHWISE = ((128, 56), (512, 14))  # channels, size
MATMULS = ((128, 384, 384), (128, 384, 1536), (1, 768, 768))  # rows, in, out
SHARES = (0.05, 0.15, 0.3)
Variants = dict[str, onnx.ModelProto]


def int8(*shape: int) -> np.ndarray:
    return RNG.integers(-7, 8, shape).astype(np.int8)


def scales(*shape: int) -> np.ndarray:
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def places(rows: np.ndarray, out: int) -> np.ndarray:
    """Where each channel is found in the small output; the last place holds zeros."""
    index = np.full(out, len(rows), np.int64)
    index[rows] = np.arange(len(rows))
    return index


def conv_forms(inputs: int, out: int, k: int, size: int, share: float) -> Variants:
    rows = np.sort(RNG.choice(out, round(share * out), replace=False))
    some = len(rows)
    pads = f"<pads = [{', '.join([str(k // 2)] * 4)}]>"
    q1 = int8(out, inputs, k, k)
    both, rest = np.concatenate([q1, q1[rows]]), np.setdiff1d(np.arange(out), rows)
    order = np.concatenate([rows, rest])
    constants = {
        "w": q1,
        "w2": int8(out, inputs, k, k),
        "ws": q1[rows],
        "wb": both,
        "wp": q1[order],
        "s": scales(out),
        "s2": scales(out),
        "ss": scales(some),
        "sb": scales(out + some),
        "wz": np.concatenate([both, np.zeros_like(both[:1])]),
        "sz": scales(out + some + 1),
        "first": np.arange(out),
        "index": places(rows, out),
        "joined": places(rows, out) + out,
        "back": np.argsort(order),
        "grow": np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64),
        "rest": np.array([0, 0, 0, 0, 0, len(rest), 0, 0], np.int64),
        "spread": np.eye(out, dtype=np.float32)[rows].T[:, :, None, None].copy(),
        "rows": rows[:, None],
        "zero": np.zeros(1, np.int64),
        "end": np.array([some], np.int64),
        "axis": np.ones(1, np.int64),
        "out": np.array([out], np.int64),
        "all": np.array([out + some], np.int64),
        "zerof": np.zeros((1, 1, size, size), np.float32),
        "bias": scales(out),
    }

    def product(weight: str, scale: str, to: str) -> str:
        return f"""
            n_{to} = ConvInteger {pads} (xq, {weight}, zx)  s_{to} = Mul (sx, {scale})
            {to} = DequantizeLinear <axis = 1> (n_{to}, s_{to})"""

    one, small = SIGNED + product("w", "s", "a"), product("ws", "ss", "b")
    bodies = {
        "one": one + " y = Identity (a)",
        "full": one + product("w2", "s2", "b") + " y = Add (a, b)",
        "pad+gather": one
        + small
        + " p = Pad (b, grow)  g = Gather <axis = 1> (p, index)  y = Add (a, g)",
        "concat+gather": one
        + small
        + " p = Concat <axis = 1> (b, zerof)  g = Gather <axis = 1> (p, index)  y = Add (a, g)",
        "1x1 conv": one + small + " g = Conv (b, spread)  y = Add (a, g)",
        "scatter": one
        + small
        + """ t = Transpose <perm = [1, 0, 2, 3]> (a)  u = Transpose <perm = [1, 0, 2, 3]> (b)
              v = ScatterND <reduction = "add"> (t, rows, u)
              y = Transpose <perm = [1, 0, 2, 3]> (v)""",
        "one node": SIGNED
        + product("wb", "sb", "ab")
        + """ a = Slice (ab, zero, out, axis)  e = Pad (ab, grow)
              g = Gather <axis = 1> (e, joined)  y = Add (a, g)""",
        "one node, zeros": SIGNED
        + product("wz", "sz", "ab")
        + """ a = Slice (ab, zero, out, axis)  g = Gather <axis = 1> (ab, joined)
              y = Add (a, g)""",
        "one node, gathers": SIGNED
        + product("wz", "sz", "ab")
        + """ a = Gather <axis = 1> (ab, first)  g = Gather <axis = 1> (ab, joined)
              y = Add (a, g)""",
        "permuted": SIGNED
        + product("wp", "s", "a")
        + small
        + """ h = Slice (a, zero, end, axis)  t = Slice (a, end, out, axis)  i = Add (h, b)
              c = Concat <axis = 1> (i, t)  y = Gather <axis = 1> (c, back)""",
        "prefix": SIGNED + product("wp", "s", "a") + small + " p = Pad (b, rest)  y = Add (a, p)",
    }
    return {name: graph((1, inputs, size, size), body, constants) for name, body in bodies.items()}


def depthwise_forms(channels: int, size: int, share: float) -> Variants:
    rows = np.sort(RNG.choice(channels, round(share * channels), replace=False))
    w = scales(channels, 1, 3, 3)
    constants = {
        "w": w,
        "v": scales(channels, 1, 3, 3),
        "ws": w[rows],
        "rows": rows,
        "index": places(rows, channels),
        "grow": np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64),
    }

    def conv(x: str, weight: str, count: int, to: str) -> str:
        return f"{to} = Conv <pads = [1, 1, 1, 1], group = {count}> ({x}, {weight}) "

    one = conv("x", "w", channels, "a")
    small = "xs = Gather <axis = 1> (x, rows) " + conv("xs", "ws", len(rows), "b")
    bodies = {
        "one": one + " y = Identity (a)",
        "full": one + conv("x", "v", channels, "b") + " y = Add (a, b)",
        "pad+gather": one
        + small
        + " p = Pad (b, grow)  g = Gather <axis = 1> (p, index)  y = Add (a, g)",
    }
    return {
        name: graph((1, channels, size, size), body, constants) for name, body in bodies.items()
    }


def matmul_forms(count: int, inputs: int, out: int, share: float) -> Variants:
    rows = np.sort(RNG.choice(out, round(share * out), replace=False))
    some = len(rows)
    q1 = int8(inputs, out)
    constants = {
        "w": q1,
        "v": int8(inputs, out),
        "ws": q1[:, rows],
        "s": scales(out),
        "t": scales(out),
        "ss": scales(some),
        "index": places(rows, out),
        "grow": np.array([0, 0, 0, 1], np.int64),
        "spread": np.eye(out, dtype=np.float32)[rows],
    }

    def product(weight: str, scale: str, to: str) -> str:
        return f"""
            n_{to} = MatMulInteger (xq, {weight}, zx)  f_{to} = Cast <to = 1> (n_{to})
            s_{to} = Mul (sx, {scale})  {to} = Mul (f_{to}, s_{to})"""

    one, small = UNSIGNED + product("w", "s", "a"), product("ws", "ss", "b")
    bodies = {
        "one": one + " y = Identity (a)",
        "full": one + product("v", "t", "b") + " y = Add (a, b)",
        "pad+gather": one
        + small
        + " p = Pad (b, grow)  g = Gather <axis = 1> (p, index)  y = Add (a, g)",
        "matmul": one + small + " g = MatMul (b, spread)  y = Add (a, g)",
    }
    return {name: graph((count, inputs), body, constants) for name, body in bodies.items()}


def cases(only: str) -> Iterator[tuple[str, dict[float, Variants]]]:
    if only in "conv":
        for i, o, k, size in CONVS:
            title = f"Conv {i}→{o}, {k}×{k}, {size}×{size}"
            yield title, {share: conv_forms(i, o, k, size, share) for share in SHARES}
    if only in "depthwise":
        for channels, size in DEPTHWISE:
            title = f"depthwise Conv {channels}, 3×3, {size}×{size}, float"
            yield title, {share: depthwise_forms(channels, size, share) for share in SHARES}
    if only in "matmul":
        for shape in MATMULS:
            title = f"MatMul {shape[0]}×{shape[1]} → {shape[2]}"
            yield title, {share: matmul_forms(*shape, share) for share in SHARES}


def ratios(variants: Variants, rounds: int) -> np.ndarray:
    sessions = [open_session(proto.SerializeToString(), threads=1) for proto in variants.values()]
    value = next(iter(variants.values())).graph.input[0]
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    feed = {"x": RNG.standard_normal(shape).astype(np.float32)}
    runs = [partial(run, session, feed) for session in sessions]
    times = time_in_turns(runs, warmup=3, rounds=rounds, seconds=30)
    return np.median(paired_ratios(times), axis=0)


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 31,
    only: Annotated[str, typer.Option(help="conv, depthwise or matmul.")] = "",
) -> None:
    for title, by_share in cases(only):
        table = Table(title=f"{title}: latency, ratio to one term", title_justify="left")
        table.add_column("form")
        columns = []
        for share, variants in by_share.items():
            table.add_column(f"{share:.0%}", justify="right")
            columns.append(ratios(variants, rounds))
        for row, form in enumerate(next(iter(by_share.values()))):
            table.add_row(form, *(f"{column[row]:.2f}" for column in columns))
        Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
