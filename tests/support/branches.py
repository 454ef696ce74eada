"""Random graphs of linear branches, and how far rounding alone may move their outputs.

Every tensor knows its size as a function of the input's: ⌊(n + T) / S⌋ + 1 per axis. So branches
of different kernels, strides, dilations and pads can be drawn to end in the same size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

UNIT = 2.0**-24  # of float32: one rounding changes a value by at most this part
# Roundings of a node beside its sum: a BatchNormalization that onnxruntime turns into a Conv's
# weight takes √, 1/, three products and two sums, and each weight of a fold is rounded once.
PER_NODE = 9


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph: its channels and, per axis, S and T."""

    name: str
    channels: int
    strides: tuple[int, ...]
    offsets: tuple[int, ...]

    def size(self, n: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            (a + t) // s + 1 for a, s, t in zip(n, self.strides, self.offsets, strict=True)
        )


@dataclass(frozen=True)
class Target:
    """What a branch must end in, relative to the tensor at which it starts."""

    channels: int
    strides: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def trivial(self) -> bool:
        return all(s == 1 for s in self.strides) and all(t == -1 for t in self.offsets)


@dataclass
class Case:
    """A model, its inputs (several sizes, where they are symbolic), and whether it is integer."""

    proto: onnx.ModelProto
    feeds: list[dict[str, np.ndarray]]
    integer: bool
    fraction_bits: int  # every value of an integer case is a multiple of 2^-fraction_bits


@dataclass
class Graph:
    """A graph that is being drawn."""

    draw: st.DrawFn
    rank: int
    sizes: list[tuple[int, ...]]
    integer: bool
    traps: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    exposed: list[str] = field(default_factory=list)
    fraction_bits: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.draw(st.integers(0, 2**30)))

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def constant(self, array: np.ndarray, kind: str) -> str:
        if kind == "w" and self.chance(4):  # a weight that is there already
            same = [n for n, a in self.constants.items() if a.shape == array.shape and n[0] == "w"]
            if same:
                return self.pick(*same)
        name = f"{kind}{len(self.constants)}"
        self.constants[name] = array
        return name

    def values(self, *shape: int) -> np.ndarray:
        if self.integer:
            return self.rng.integers(-1, 2, shape).astype(np.float32)
        return self.rng.standard_normal(shape).astype(np.float32)

    def node(self, op: str, inputs: list[str], like: Tensor, **attrs: Any) -> Tensor:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"t_{name}"], name=name, **attrs))
        out = Tensor(f"t_{name}", like.channels, like.strides, like.offsets)
        if self.traps and self.chance(25):
            if self.chance(2):
                self.exposed.append(out.name)
            else:
                reader = f"n{len(self.nodes)}"
                relu = helper.make_node("Relu", [out.name], [f"t_{reader}"], name=reader)
                self.nodes.append(relu)
                self.exposed.append(f"t_{reader}")
        return out

    # ---------------------------------------------------------------- linear nodes

    def _moved(
        self, t: Tensor, channels: int, strides: tuple[int, ...], offsets: tuple[int, ...]
    ) -> Tensor:
        """⌊(m + T2) / S2⌋ + 1 of m = ⌊(n + T1) / S1⌋ + 1."""
        pairs = list(zip(t.strides, t.offsets, strides, offsets, strict=True))
        return Tensor(
            "",
            channels,
            tuple(s1 * s2 for s1, _, s2, _ in pairs),
            tuple(t1 + (1 + t2) * s1 for s1, t1, _, t2 in pairs),
        )

    def _window(self, target: Target, *, even: bool = False) -> tuple[list[int], ...] | None:
        """Kernel, dilations and pads that lead to the target."""
        kernel, dilations, begin, end = [], [], [], []
        for offset in target.offsets:
            fits = [
                (k, d)
                for k in ((1, 2, 4) if even else (1, 1, 2, 3, 3))
                for d in (1, 1, 1, 2, 3)
                if offset + 1 + (k - 1) * d >= 0
            ]
            if not fits:
                return None
            k, d = self.pick(*fits)
            total = offset + 1 + (k - 1) * d
            kernel.append(k)
            dilations.append(d)
            begin.append(total // 2 if self.chance(2) else self.draw(st.integers(0, total)))
            end.append(total - begin[-1])
        return kernel, dilations, begin, end

    def conv(self, t: Tensor, target: Target) -> Tensor | None:
        window = self._window(target)
        if window is None:
            return None
        kernel, dilations, begin, end = window
        common = math.gcd(t.channels, target.channels)
        group = self.pick(1, 1, *(g for g in range(2, common + 1) if common % g == 0))
        w = self.values(target.channels, t.channels // group, *kernel)
        inputs = [t.name, self.constant(w, "w")]
        if self.chance(2):
            inputs.append(self.constant(self.values(target.channels), "b"))
        attrs: dict[str, Any] = {"pads": [*begin, *end]}
        span = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        small, large = [s // 2 for s in span], [s - s // 2 for s in span]
        plain = all(d == 1 for d in dilations) and all(s == 1 for s in target.strides)
        if not any(begin) and not any(end) and self.chance(2):
            attrs = {"auto_pad": "VALID"} if self.chance(2) else {}
        elif plain and (begin, end) == (small, large) and self.chance(2):
            attrs = {"auto_pad": "SAME_UPPER"}
        elif plain and (begin, end) == (large, small) and self.chance(2):
            attrs = {"auto_pad": "SAME_LOWER"}
        out = self._moved(t, target.channels, target.strides, target.offsets)
        return self.node(
            "Conv",
            inputs,
            out,
            group=group,
            strides=list(target.strides),
            dilations=dilations,
            kernel_shape=kernel,
            **attrs,
        )

    def pool(self, t: Tensor, target: Target) -> Tensor | None:
        window = self._window(target, even=self.integer)
        if window is None or target.channels != t.channels:
            return None
        kernel, dilations, begin, end = window
        if any(p >= k for p, k in zip((*begin, *end), (*kernel, *kernel), strict=True)):
            return None  # onnxruntime wants a pool's pads below its kernel
        if max(dilations) > 1:
            return None  # its padded, dilated windows differ between its versions
        attrs: dict[str, Any] = {"count_include_pad": 1}
        if not any(begin) and not any(end):
            attrs = {"count_include_pad": self.pick(0, 1)}
        elif self.traps and not self.integer and self.chance(4):
            attrs = {}
        self.fraction_bits += math.ceil(math.log2(math.prod(kernel)))
        out = self._moved(t, target.channels, target.strides, target.offsets)
        return self.node(
            "AveragePool",
            [t.name],
            out,
            kernel_shape=kernel,
            strides=list(target.strides),
            pads=[*begin, *end],
            **attrs,
        )

    def pad(self, t: Tensor) -> Tensor:
        amounts = [self.draw(st.integers(0, 2)) for _ in range(2 * self.rank)]
        begin, end = amounts[: self.rank], amounts[self.rank :]
        inputs = [t.name]
        if self.chance(3):  # opset 18: named axes
            axes = np.arange(self.rank) - self.rank
            inputs += [self.constant(np.int64(amounts), "p"), "", self.constant(axes, "p")]
        else:
            inputs.append(self.constant(np.int64([0, 0, *begin, 0, 0, *end]), "p"))
            if self.traps and self.chance(4):
                inputs.append(self.constant(np.float32(1.0), "v"))
        sums = tuple(-1 + b + e for b, e in zip(begin, end, strict=True))
        return self.node("Pad", inputs, self._moved(t, t.channels, (1,) * self.rank, sums))

    def elementwise(self, t: Tensor) -> Tensor:
        kinds = ["bn", "bn", "Mul", "Add", "Sub", "Div", "Neg", "Identity"]
        if self.traps:
            kinds += ["Relu", "LeakyRelu", "Abs"]
        kind = self.pick(*kinds)
        if kind == "LeakyRelu":
            self.fraction_bits += 1
            return self.node(kind, [t.name], t, alpha=0.5)
        if kind in ("Relu", "Abs", "Neg", "Identity"):
            return self.node(kind, [t.name], t)
        if kind == "bn":
            return self.batch_norm(t)
        return self.with_constant(t, kind)

    def batch_norm(self, t: Tensor) -> Tensor:
        c = t.channels
        gamma, beta, mean = self.values(c), self.values(c), self.values(c)
        variance, epsilon = self.rng.uniform(0.1, 3, c).astype(np.float32), 0.01
        if self.integer:
            variance, epsilon = self.rng.choice([0.75, 3.75], c).astype(np.float32), 0.25
            self.fraction_bits += 1
        inputs = [self.constant(a, k) for a, k in ((gamma, "g"), (beta, "b"), (mean, "m"))]
        inputs = [t.name, *inputs, self.constant(variance, "s")]
        return self.node("BatchNormalization", inputs, t, epsilon=epsilon)

    def with_constant(self, t: Tensor, op: str, *, spread: bool = False) -> Tensor:
        c, rank = t.channels, self.rank
        ones = (1,) * rank
        shapes = [(), (1,), ones, (c, *ones), (1, c, *ones)]
        if self.traps and len(self.sizes) == 1 and self.chance(5):
            shapes = [t.size(self.sizes[0])[-1:]]
        channels = c
        if spread and c == 1:  # over three channels
            channels, shapes = 3, [(3, *ones)]
        shape = self.pick(*shapes)
        array = self.values(*shape) if shape else np.float32(self.values(1)[0])
        if op == "Div":
            if self.integer:
                array = np.asarray(2 ** self.rng.integers(0, 2, shape), np.float32)
                self.fraction_bits += 1
            else:
                signs = np.sign(array) + (array == 0)
                array = np.asarray(signs * (np.abs(array) + 0.5), np.float32)
        inputs = [t.name, self.constant(np.asarray(array), "k")]
        if op != "Div" and self.chance(2):
            inputs.reverse()
        return self.node(op, inputs, Tensor("", channels, t.strides, t.offsets))

    # ---------------------------------------------------------------- sums and sequences

    def target(self, t: Tensor) -> Target:
        """A target that leaves every size at least 1."""
        strides = tuple(self.pick(1, 1, 1, 2) for _ in range(self.rank))
        offsets = tuple(self.pick(-1, -1, -1, -2, -3, 0, 1) for _ in range(self.rank))
        if self.chance(3):
            strides, offsets = (1,) * self.rank, (-1,) * self.rank
        channels = t.channels if self.chance(2) else self.draw(st.integers(1, 4))
        if not self.fits(self._moved(t, channels, strides, offsets)):
            return Target(channels, (1,) * self.rank, (-1,) * self.rank)
        return Target(channels, strides, offsets)

    def fits(self, t: Tensor) -> bool:
        return all(min(t.size(n)) >= 1 for n in self.sizes)

    def rest(self, t: Tensor, now: Tensor, target: Target) -> Target | None:
        """What is left of a target that is relative to `t`, from `now` on."""
        goal = self._moved(t, target.channels, target.strides, target.offsets)
        strides, offsets = [], []
        for s, g, at, to in zip(now.strides, goal.strides, now.offsets, goal.offsets, strict=True):
            if g % s or (to - at) % s:
                return None
            strides.append(g // s)
            offsets.append((to - at) // s - 1)
        return Target(target.channels, tuple(strides), tuple(offsets))

    def finish(self, t: Tensor, target: Target) -> Tensor | None:
        """One node, or none, that leads to the target."""
        if target.trivial and t.channels == target.channels and self.chance(2):
            return t
        if t.channels == target.channels and self.chance(4):
            pooled = self.pool(t, target)
            if pooled is not None:
                return pooled
        return self.conv(t, target)

    def branch(self, t: Tensor, target: Target, depth: int) -> Tensor:
        if depth > 0 and self.chance(3):
            return self.total(t, target, depth - 1)
        now = t
        for _ in range(self.pick(0, 0, 1, 1, 2)):
            step = self.pick("conv1", "pad", "elementwise", "elementwise", "any")
            if self.traps and now.channels == 1 and self.chance(2):
                now = self.with_constant(now, self.pick("Mul", "Add"), spread=True)
            elif step == "elementwise":
                now = self.elementwise(now)
            elif step == "pad":
                now = self.pad(now)
            else:
                one = Target(self.pick(*range(1, 5)), (1,) * self.rank, (-1,) * self.rank)
                aim = one if step == "conv1" else self.target(now)
                now = self.conv(now, aim) or now
        left = self.rest(t, now, target)
        done = None if left is None else self.finish(now, left)
        if done is None:  # the detour is left dangling as an output of its own
            if now is not t:
                self.exposed.append(now.name)
            done = self.conv(t, target) or self.wide(t, target)
        while self.chance(3):
            done = self.elementwise(done)
        if done.channels != target.channels:
            one = Target(target.channels, (1,) * self.rank, (-1,) * self.rank)
            done = self.conv(done, one) or done
        if self.chance(6):
            one = Target(target.channels, (1,) * self.rank, (-1,) * self.rank)
            done = self.conv(done, one) or done
        return done

    def wide(self, t: Tensor, target: Target) -> Tensor:
        """A Conv without padding, as large as the target wants."""
        kernel = [max(-o, 1) for o in target.offsets]
        w = self.constant(self.values(target.channels, t.channels, *kernel), "w")
        out = self._moved(t, target.channels, target.strides, target.offsets)
        return self.node("Conv", [t.name, w], out, strides=list(target.strides))

    def total(self, t: Tensor, target: Target, depth: int) -> Tensor:
        """A sum of branches, nested by drawing."""
        parts = [self.branch(t, target, depth) for _ in range(self.pick(2, 2, 3))]
        if self.traps and self.chance(8):
            parts.append(self.broadcast(parts[0]))
        if self.chance(4):
            return self.node("Sum", [p.name for p in parts], parts[0])
        out = parts[0]
        for part in parts[1:]:
            pair = [out.name, part.name]
            if self.chance(3):
                pair.reverse()
            out = self.node(self.pick("Add", "Add", "Sub"), pair, parts[0])
        return out

    def broadcast(self, like: Tensor) -> Tensor:
        """A branch with one channel, or one position per channel."""
        if self.integer or self.chance(2):
            start = self.conv(like, Target(1, (1,) * self.rank, (-1,) * self.rank))
            return start or like
        name = f"n{len(self.nodes)}"
        pool = helper.make_node("GlobalAveragePool", [like.name], [f"t_{name}"], name=name)
        self.nodes.append(pool)
        return Tensor(f"t_{name}", like.channels, like.strides, like.offsets)


@st.composite
def cases(draw: st.DrawFn, *, traps: bool = True) -> Case:
    """A random graph; with traps, much of it must not be folded."""
    rank = draw(st.sampled_from([1, 1, 2, 2, 2, 2, 3]))
    static = draw(st.booleans())
    low, high = (5, 9) if rank < 3 else (4, 6)
    size = st.tuples(*[st.integers(low, high)] * rank)
    sizes = draw(st.lists(size, min_size=1 if static else 2, max_size=1 if static else 3))
    integer = draw(st.booleans())
    channels = draw(st.integers(1, 4))
    graph = Graph(draw, rank, sizes, integer, traps)
    known = draw(st.booleans())
    t = Tensor("x", channels, (1,) * rank, (-1,) * rank)
    for _ in range(graph.pick(1, 1, 2)):
        while graph.chance(4):
            t = graph.elementwise(t)
        if graph.chance(4):
            t = graph.pad(t)
        target = graph.target(t)
        build = graph.total if graph.chance(4) is False else graph.branch
        t = build(t, target, 2)
        if graph.traps and graph.chance(2):
            t = graph.node("Relu", [t.name], t)
    if t.name == "x" or t.name in graph.exposed:
        t = graph.node("Neg", [t.name], t)
    return Case(
        _proto(graph, t, channels, known, static),
        [{"x": _input(graph, channels, n)} for n in sizes],
        integer,
        graph.fraction_bits,
    )


def _input(graph: Graph, channels: int, size: tuple[int, ...]) -> np.ndarray:
    if graph.integer:  # never 0, so that no weight hides behind it in `magnitudes`
        return graph.rng.choice(np.float32([-2, -1, 1, 2]), (2, channels, *size))
    return graph.rng.standard_normal((2, channels, *size)).astype(np.float32)


def _proto(graph: Graph, t: Tensor, channels: int, known: bool, static: bool) -> onnx.ModelProto:
    space = graph.sizes[0] if static else ["D", "H", "W"][-graph.rank :]
    shape = ["N", channels if static or known else "C", *space]
    floats = TensorProto.FLOAT
    outputs = [*dict.fromkeys([t.name, *graph.exposed])]
    outputs = [name for name in outputs if name != "x"]
    onnx_graph = helper.make_graph(
        graph.nodes,
        "g",
        [helper.make_tensor_value_info("x", floats, shape)],
        [_declared(name, graph.rank) for name in outputs],
        [numpy_helper.from_array(a, n) for n, a in graph.constants.items()],
    )
    proto = helper.make_model(onnx_graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if graph.chance(2):
        proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


# -------------------------------------------------------------------- what rounding may do


def roundings(proto: onnx.ModelProto, positions: int) -> int:
    """Most roundings on any way from an input to an output.

    Each product and each sum on the way multiplies a value by at most 1 ± UNIT; a sum of k terms,
    in whatever order, puts at most k of them on the way of each term.
    """
    shapes = {i.name: list(i.dims) for i in proto.graph.initializer}
    deep: dict[str, int] = {}
    for node in proto.graph.node:
        terms = len(node.input)
        if node.op_type == "Conv":
            terms = math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "AveragePool":
            terms = next(math.prod(a.ints) for a in node.attribute if a.name == "kernel_shape")
        elif node.op_type == "GlobalAveragePool":
            terms = positions
        deep[node.output[0]] = terms + PER_NODE + max(deep.get(i, 0) for i in node.input)
    return max(deep.values())


def magnitudes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every sign taken away, and every tensor an output.

    Run on |x| it gives the sum of the absolute values of all that was added up, and so, times
    (1 + UNIT)^roundings − 1, a bound on what rounding did. Relu, LeakyRelu and Abs keep the bound:
    they enlarge neither a value nor a difference.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    negative = {n.input[3] for n in made.graph.node if n.op_type == "BatchNormalization"}
    floats = [i for i in made.graph.initializer if i.data_type == TensorProto.FLOAT]
    for initializer in floats:
        array = np.abs(numpy_helper.to_array(initializer))
        array = -array if initializer.name in negative else array
        initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    for node in made.graph.node:
        node.op_type = {"Sub": "Add", "Neg": "Identity"}.get(node.op_type, node.op_type)
    have = {o.name for o in made.graph.output}
    for node in made.graph.node:
        if node.output[0] not in have:
            rank = len(made.graph.input[0].type.tensor_type.shape.dim) - 2
            made.graph.output.append(_declared(node.output[0], rank))
    return made


def _declared(name: str, rank: int) -> onnx.ValueInfoProto:
    """An output of which nothing but the rank is said."""
    symbols = [f"{name}_{axis}" for axis in range(rank + 2)]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, symbols)
