"""What BatchNormalization tells about the tensors behind it: mean and variance per channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.linear_map import Unfoldable
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.rectified import mapped_normal
from onnxq.model import Model, is_constant, values
from onnxq.passes.batch_norm import in_training_mode
from onnxq.passes.linear_nodes import is_onnx, per_channel
from onnxq.passes.ranks import Shape, tensor_shapes

# Of the variance, what averaging over a whole feature map, or over one window, leaves: neighbours
# are alike, so far more than one by the number of positions. A guess, which means do not depend on.
LEFT_BY_GLOBAL_POOL, LEFT_BY_POOL = 0.2, 0.7
# Correlation of what the taps of a kernel read: as measured on real models, half.
ALIKE = 0.5


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Mean and variance of a tensor per channel (axis 1), float64 [channels] each."""

    mean: Float64Array
    variance: Float64Array

    def mapped(self, function: Callable[[Float64Array], Float64Array]) -> ChannelMoments:
        """Those of function(x), x taken for normal."""
        return ChannelMoments(*mapped_normal(self.mean, self.variance, function))


def channel_statistics(model: Model) -> dict[str, ChannelMoments]:
    """The moments of the tensors of the main graph, by name, as far as they follow from its
    BatchNormalizations; `model` is only read.

    A BatchNormalization's output has mean β and variance γ²·σ²/(σ²+ε) on the training data. From
    there on channels are taken for independent, tensors that are added or multiplied too, and
    everything that goes into an activation function for normal. Zeros at padded borders are left
    out of account. Behind an operator that is not listed here nothing is known.
    """
    walk = _Walk(tensor_shapes(model))
    for node in model.graph.nodes:
        walk.visit(node)
    return walk.known


@dataclass(eq=False)
class _Walk:
    shapes: Mapping[str, Shape]
    known: dict[str, ChannelMoments] = field(default_factory=dict)

    def visit(self, node: gs.Node) -> None:
        if not is_onnx(node) or len(node.outputs) < 1:
            return
        found = self._moments(node)
        if found is not None:
            self.known[node.outputs[0].name] = found

    def _moments(self, node: gs.Node) -> ChannelMoments | None:
        if node.op == "BatchNormalization":
            return _batch_norm(node)
        inputs = [self.known.get(t.name) for t in node.inputs]
        if node.op in ("Add", "Sub", "Mul", "Div"):
            return self._arithmetic(node, inputs)
        if node.op == "Concat":
            return _concat(node, inputs)
        x = inputs[0] if inputs else None
        if x is None:
            return None
        if node.op == "Conv":
            return _conv(node, x)
        if node.op in _SAME:
            return x
        if node.op in ("Reshape", "Flatten", "Squeeze"):
            return self._flat(node, x)
        if node.op in ("GlobalAveragePool", "ReduceMean"):
            return _averaged(node, x)
        if node.op == "AveragePool":
            return ChannelMoments(x.mean, x.variance * LEFT_BY_POOL)
        function = _function(node)
        return None if function is None else x.mapped(function)

    def _arithmetic(
        self, node: gs.Node, inputs: list[ChannelMoments | None]
    ) -> ChannelMoments | None:
        if len(inputs) != 2:
            return None
        one, other = (
            known if known is not None else self._constant(node, t)
            for known, t in zip(inputs, node.inputs, strict=True)
        )
        if one is None or other is None:
            return None
        if node.op in ("Add", "Sub"):
            sign = 1.0 if node.op == "Add" else -1.0
            return ChannelMoments(one.mean + sign * other.mean, one.variance + other.variance)
        if node.op == "Div":
            if not (is_constant(node.inputs[1]) and np.all(other.mean)):
                return None
            other = ChannelMoments(1.0 / other.mean, other.variance)
        gate = _gated(node)
        if gate is not None:
            x = self.known.get(gate.inputs[0].name)
            function = _function(gate)
            if x is not None and function is not None:
                return x.mapped(lambda v: v * function(v))
        first, second = np.square(one.mean), np.square(other.mean)
        variance = one.variance * (other.variance + second) + first * other.variance
        return ChannelMoments(one.mean * other.mean, variance)

    def _constant(self, node: gs.Node, tensor: gs.Tensor) -> ChannelMoments | None:
        if not is_constant(tensor):
            return None
        others = [t for t in node.inputs if t is not tensor]
        shape = self.shapes.get(others[0].name) if others else None
        try:
            value = per_channel(node, tensor, None if shape is None else len(shape))
        except Unfoldable:
            return None
        return ChannelMoments(value, np.zeros_like(value))

    def _flat(self, node: gs.Node, x: ChannelMoments) -> ChannelMoments | None:
        """[N, C, 1, 1] -> [N, C] keeps the channels; [N, C, H, W] -> [N, CHW] repeats them."""
        before = self.shapes.get(node.inputs[0].name)
        after = self.shapes.get(node.outputs[0].name)
        if before is None or len(before) < 2 or None in before[2:]:
            return None
        if after is None or len(after) < 2 or (node.op != "Flatten" and len(after) > 2):
            return None
        positions = int(np.prod([d for d in before[2:] if d is not None]))
        return ChannelMoments(np.repeat(x.mean, positions), np.repeat(x.variance, positions))


_SAME = ("Identity", "Dropout", "Resize", "Upsample", "Cast")


def _batch_norm(node: gs.Node) -> ChannelMoments | None:
    if in_training_mode(node) or not all(is_constant(t) for t in node.inputs[1:]):
        return None
    gamma, beta, _, variance = (values(t).astype(np.float64) for t in node.inputs[1:5])
    total = variance + float(node.attrs.get("epsilon", 1e-5))
    if gamma.ndim != 1 or not (np.isfinite([gamma, beta, total]).all() and (total > 0).all()):
        return None
    return ChannelMoments(beta, np.square(gamma) * np.maximum(variance, 0.0) / total)


def _conv(node: gs.Node, x: ChannelMoments) -> ChannelMoments | None:
    if not all(is_constant(t) for t in node.inputs[1:] if t.name):
        return None
    kernel = values(node.inputs[1]).astype(np.float64)
    groups = int(node.attrs.get("group", 1))
    if len(x.mean) != kernel.shape[1] * groups:
        return None
    w = kernel.reshape(groups, kernel.shape[0] // groups, kernel.shape[1], -1)
    sums = w.sum(axis=3)
    spread = (1 - ALIKE) * np.square(w).sum(axis=3) + ALIKE * np.square(sums)
    split = (groups, kernel.shape[1], 1)
    mean = (sums @ x.mean.reshape(split)).reshape(-1)
    if len(node.inputs) > 2 and node.inputs[2].name:
        mean = mean + values(node.inputs[2])
    return ChannelMoments(mean, (spread @ x.variance.reshape(split)).reshape(-1))


def _concat(node: gs.Node, inputs: list[ChannelMoments | None]) -> ChannelMoments | None:
    found = [each for each in inputs if each is not None]
    if node.attrs.get("axis") != 1 or len(found) != len(inputs):
        return None
    return ChannelMoments(
        np.concatenate([each.mean for each in found]),
        np.concatenate([each.variance for each in found]),
    )


def _averaged(node: gs.Node, x: ChannelMoments) -> ChannelMoments | None:
    if node.op == "ReduceMean":
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1 and is_constant(node.inputs[1]):
            axes = values(node.inputs[1]).tolist()
        if sorted(a % 4 for a in axes or ()) != [2, 3]:
            return None
    return ChannelMoments(x.mean, x.variance * LEFT_BY_GLOBAL_POOL)


def _gated(node: gs.Node) -> gs.Node | None:
    """The Sigmoid or HardSigmoid of x where a Mul is x·sigmoid(x)."""
    if node.op != "Mul":
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        made = gate.inputs[0] if gate.inputs else None
        if made is not None and made.op in ("Sigmoid", "HardSigmoid") and made.inputs[0] is x:
            return made
    return None


def _sigmoid(x: Float64Array) -> Float64Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def _function(node: gs.Node) -> Callable[[Float64Array], Float64Array] | None:
    """What an activation function computes, or None."""
    if node.op == "Relu":
        return lambda x: np.maximum(x, 0.0)
    if node.op == "LeakyRelu":
        slope = float(node.attrs.get("alpha", 0.01))
        return lambda x: np.where(x > 0, x, slope * x)
    if node.op == "Clip":
        low, high = _clip_bounds(node)
        return lambda x: np.clip(x, low, high)
    if node.op == "Sigmoid":
        return _sigmoid
    if node.op == "Tanh":
        return np.tanh
    if node.op == "HardSigmoid":
        alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
        return lambda x: np.clip(alpha * x + beta, 0.0, 1.0)
    if node.op == "HardSwish":
        return lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0)
    return None


def _clip_bounds(node: gs.Node) -> tuple[float, float]:
    found = [-np.inf, np.inf]
    for i, name in enumerate(("min", "max")):
        if name in node.attrs:
            found[i] = float(node.attrs[name])
        elif len(node.inputs) > i + 1 and node.inputs[i + 1].name:
            found[i] = float(values(node.inputs[i + 1]).reshape(-1)[0])
    return found[0], found[1]
