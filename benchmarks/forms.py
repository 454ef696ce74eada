"""Which nodes dynamic integer compute is written in: each choice beside its alternatives.

python benchmarks/forms.py [--rounds 41] [--only conv|matmul|rescale|activation]

One thread, runs in turns, medians of the ratios to the first row of each table. Weights are random
4-bit integers: times do not depend on the values. Needs onnxruntime 1.24 (int8 ConvInteger).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated

import numpy as np
import onnx
import onnx.parser
import typer
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.session import open_session, run

Constants = dict[str, np.ndarray]
Variants = dict[str, onnx.ModelProto]

CONVS = ((64, 64, 3, 56), (128, 128, 3, 28), (256, 64, 1, 56), (512, 512, 3, 7))  # in, out, k, size
MATMULS = ((128, 768, 768), (128, 768, 3072), (1, 768, 768))  # rows, in, out
ACTIVATIONS = ((64, 56), (128, 28), (512, 7))  # channels, size

RNG = np.random.default_rng(0)
SCALARS: Constants = {
    "step": np.array(1 / 255, np.float32),
    "tiny": np.array(1e-20, np.float32),
    "none": np.array(0, np.float32),
    "lowest": np.array(-128, np.float32),
    "low": np.array(-128, np.int8),
    "sixteen": np.array(16, np.int32),
    "half": np.array(128, np.int32),
    "z8": np.array(8, np.uint8),
    "z128": np.array(128, np.uint8),
}

# x to int8 xq with scale sx and zero point zx
POSITIVE = """
    rmax = ReduceMax <keepdims = 0> (x)  top = Max (rmax, tiny)  sx = Mul (top, step)
    zx = Identity (low)  xq = QuantizeLinear (x, sx, zx)"""
SIGNED = """
    rmax = ReduceMax <keepdims = 0> (x)  rmin = ReduceMin <keepdims = 0> (x)
    top = Max (rmax, tiny)  bottom = Min (rmin, none)  wide = Sub (top, bottom)
    sx = Mul (wide, step)  steps = Div (bottom, sx)  exact = Sub (lowest, steps)
    near = Round (exact)  zx = Cast <to = 3> (near)  xq = QuantizeLinear (x, sx, zx)"""
UNSIGNED = "xq, sx, zx = DynamicQuantizeLinear (x)"
SHIFTED = """
    xu, sx, zu = DynamicQuantizeLinear (x)
    x32 = Cast <to = 6> (xu)  xs = Sub (x32, half)  xq = Cast <to = 3> (xs)
    z32 = Cast <to = 6> (zu)  zs = Sub (z32, half)  zx = Cast <to = 3> (zs)"""
TWICE = """
    xu, sx, zu = DynamicQuantizeLinear (x)
    z32 = Cast <to = 6> (zu)  zs = Sub (z32, half)  zx = Cast <to = 3> (zs)
    xq = QuantizeLinear (x, sx, zx)"""


def graph(xs: tuple[int, ...], body: str, constants: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """x, float of that shape, to y."""
    shape = ",".join(map(str, xs))
    rank = ",".join(f"d{i}" for i in range(len(xs)))
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 17]>\n'
        f"g (float[{shape}] x) => (float[{rank}] y) {{ {body} }}"
    )
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in {**SCALARS, **constants}.items():
        if name in used:
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    return proto


def integers(*shape: int, offset: int, kind: type[np.generic]) -> np.ndarray:
    return (RNG.integers(-7, 8, shape) + offset).astype(kind)


def conv(n: int, out: int, k: int, size: int) -> tuple[tuple[int, ...], str, Constants]:
    """Input shape, attributes and constants of a Conv, whole and in two terms."""
    both = integers(2 * out, n, k, k, offset=8, kind=np.uint8)
    scale = np.full(out, 0.01, np.float32)
    constants: Constants = {
        "w": RNG.standard_normal((out, n, k, k)).astype(np.float32),
        "both": both,
        "w0": both[:out],
        "w1": both[out:],
        "merged": integers(out, n, k, k, offset=128, kind=np.uint8),
        "s0": scale,
        "s1": scale / 16,
        "s01": np.concatenate([scale, scale / 16]),
        "s0column": scale.reshape(-1, 1, 1),
        "b1d": scale,
        "b": scale.reshape(-1, 1, 1),
        "halves": np.array([out, out], np.int64),
    }
    return (1, n, size, size), f"<pads = [{','.join([str(k // 2)] * 4)}]>", constants


def two_term_conv(dims: tuple[int, int, int, int]) -> Variants:
    xs, pads, constants = conv(*dims)
    terms = f"""
        p0 = ConvInteger {pads} (xq, w0, zx, z8)  p1 = ConvInteger {pads} (xq, w1, zx, z8)"""
    rescaled = """
        a0 = Mul (sx, s0)  y0 = DequantizeLinear <axis = 1> (p0, a0)
        a1 = Mul (sx, s1)  y1 = DequantizeLinear <axis = 1> (p1, a1)"""
    one = f"""
        p = ConvInteger {pads} (xq, both, zx, z8)
        a = Mul (sx, s01)  r = DequantizeLinear <axis = 1> (p, a)
        y0, y1 = Split <axis = 1> (r, halves)"""
    merged = f"""
        p = ConvInteger {pads} (xq, merged, zx, z128)
        a = Mul (sx, s1)  t = DequantizeLinear <axis = 1> (p, a)  y = Add (t, b)"""
    added = "t = Add (y0, y1)  y = Add (t, b)"
    bias_first = "t = Add (y0, b)  y = Add (t, y1)"
    in_int32 = """
        high = Mul (p0, sixteen)  p = Add (high, p1)
        a = Mul (sx, s1)  t = DequantizeLinear <axis = 1> (p, a)  y = Add (t, b)"""
    bodies = {
        "float": f"y = Conv {pads} (x, w, b1d)",
        "two nodes (today)": f"{POSITIVE} {terms} {rescaled} {added}",
        "two nodes, bias before the sum": f"{POSITIVE} {terms} {rescaled} {bias_first}",
        "two nodes, Sum with bias": f"{POSITIVE} {terms} {rescaled} y = Sum (y0, y1, b)",
        "two nodes, digits added as int32": f"{POSITIVE} {terms} {in_int32}",
        "one node, 2 × outputs, Split": f"{POSITIVE} {one} {added}",
        "merged int8·uint8 (VNNI)": f"{POSITIVE} {merged}",
        "merged uint8·uint8": f"{UNSIGNED} {merged}",
    }
    return {name: graph(xs, body, constants) for name, body in bodies.items()}


def two_term_matmul(dims: tuple[int, int, int]) -> Variants:
    rows, n, out = dims
    both = integers(n, 2 * out, offset=0, kind=np.int8)
    scale = np.full(out, 0.01, np.float32)
    constants: Constants = {
        "w": RNG.standard_normal((n, out)).astype(np.float32),
        "both": both,
        "w0": np.ascontiguousarray(both[:, :out]),
        "w1": np.ascontiguousarray(both[:, out:]),
        "whole": integers(n, out, offset=0, kind=np.int8),
        "merged": integers(n, out, offset=128, kind=np.uint8),
        "s0": scale,
        "s1": scale / 16,
        "s01": np.concatenate([scale, scale / 16]),
        "b": scale,
        "halves": np.array([out, out], np.int64),
    }

    def product(q: str, w: str, s: str, y: str, zero: str = "") -> str:
        return f"""
        {y}p = MatMulInteger (xq{q}, {w}, zx{q}{zero})  {y}f = Cast <to = 1> ({y}p)
        {y}a = Mul (sx{q}, {s})  {y} = Mul ({y}f, {y}a)"""

    def quantized(q: str) -> str:
        return f"xq{q}, sx{q}, zx{q} = DynamicQuantizeLinear (x)"

    one, added = quantized(""), "t = Add (y0, y1)  y = Add (t, b)"
    bodies = {
        "float": "t = MatMul (x, w)  y = Add (t, b)",
        "two nodes (today)": one + product("", "w0", "s0", "y0") + product("", "w1", "s1", "y1"),
        "two DynamicQuantizeMatMul": quantized("0")
        + quantized("1")
        + product("0", "w0", "s0", "y0")
        + product("1", "w1", "s1", "y1"),
        "one node, 2 × outputs, Split": one
        + product("", "both", "s01", "r")
        + "y0, y1 = Split <axis = 1> (r, halves)",
        "merged uint8·int8 (VNNI)": one + product("", "whole", "s1", "t"),
        "merged uint8·uint8": one + product("", "merged", "s1", "t", ", z128"),
    }
    made = {}
    for name, body in bodies.items():
        last = "" if name == "float" else "y = Add (t, b)" if "merged" in name else added
        made[name] = graph((rows, n), f"{body} {last}", constants)
    return made


def rescale(dims: tuple[int, int, int, int]) -> Variants:
    """One term: from the product to float, and where the bias is added."""
    xs, pads, constants = conv(*dims)
    start = f"{POSITIVE} p = ConvInteger {pads} (xq, w0, zx, z8)"
    linear = "a = Mul (sx, s0)  t = DequantizeLinear <axis = 1> (p, a)"
    bodies = {
        "DequantizeLinear, bias added (today)": f"{linear} y = Add (t, b)",
        "DequantizeLinear, no bias": "a = Mul (sx, s0)  y = DequantizeLinear <axis = 1> (p, a)",
        "Cast, Mul, bias added": """
            f = Cast <to = 1> (p)  a = Mul (sx, s0column)  t = Mul (f, a)  y = Add (t, b)""",
        "bias added as int32": """
            a = Mul (sx, s0)  c = Mul (sx, s0column)  e = Div (b, c)  n = Round (e)
            i = Cast <to = 6> (n)  q = Add (p, i)  y = DequantizeLinear <axis = 1> (q, a)""",
    }
    return {name: graph(xs, f"{start} {body}", constants) for name, body in bodies.items()}


def activation(dims: tuple[int, int], *, product: bool) -> Variants:
    """Quantization of an activation, alone or with the 3×3 ConvInteger that reads it."""
    channels, size = dims
    xs, pads, constants = conv(channels, channels, 3, size)
    ways = {
        "DynamicQuantizeLinear (uint8)": UNSIGNED,
        "ReduceMax, QuantizeLinear (int8, x ≥ 0)": POSITIVE,
        "ReduceMax, ReduceMin, QuantizeLinear (int8)": SIGNED,
        "DynamicQuantizeLinear − 128 (int8)": SHIFTED,
        "its scale, QuantizeLinear (int8)": TWICE,
    }
    end = "y = DequantizeLinear (xq, sx, zx)"
    if product:
        end = f"p = ConvInteger {pads} (xq, w0, zx, z8)  y = Cast <to = 1> (p)"
    return {name: graph(xs, f"{body} {end}", constants) for name, body in ways.items()}


def cases() -> Iterator[tuple[str, str, Variants]]:
    for dims in CONVS:
        shape = f"{dims[0]}→{dims[1]} {dims[2]}×{dims[2]} @ {dims[3]}²"
        yield "conv", f"Conv {shape}, two 4-bit terms", two_term_conv(dims)
        yield "rescale", f"Conv {shape}, one term", rescale(dims)
    for rows in MATMULS:
        name = "MatMul {}×{}×{}, two 4-bit terms".format(*rows)
        yield "matmul", name, two_term_matmul(rows)
    for plane in ACTIVATIONS:
        name = "activation {}×{}²".format(*plane)
        yield "activation", f"{name}, quantized", activation(plane, product=False)
        yield "activation", f"{name}, and a 3×3 ConvInteger", activation(plane, product=True)


def main(
    rounds: Annotated[int, typer.Option(help="Timed runs of each.")] = 41,
    only: Annotated[str, typer.Option(help="conv, matmul, rescale or activation.")] = "",
) -> None:
    console = Console(width=100)
    for group, title, variants in cases():
        if only not in group:
            continue
        (value,) = next(iter(variants.values())).graph.input
        xs = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        feed = {"x": np.maximum(RNG.standard_normal(xs), 0).astype(np.float32)}
        sessions = [open_session(m.SerializeToString(), threads=1) for m in variants.values()]
        calls = [partial(run, session, feed) for session in sessions]
        times = time_in_turns(calls, warmup=3, rounds=rounds, seconds=30)
        ratios = paired_ratios(times)
        table = Table(title=title, title_justify="left")
        for name in ("form", "ms", "ratio", "25–75 %"):
            table.add_column(name, justify="left" if name == "form" else "right")
        for i, name in enumerate(variants):
            found = quartiles(ratios[:, i])
            table.add_row(
                name,
                f"{np.median(times[:, i]) * 1e3:.3f}",
                f"{found.median:.2f}",
                f"{found.low:.2f}–{found.high:.2f}",
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
