"""Cross-layer equalization: neighbouring layers share the work of holding a channel's range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.equalize import equalization_scales
from onnxq.model import Model, constant, graphs, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.edit import Names, consumers, is_graph_output
from onnxq.passes.weights import find_weight

Array = npt.NDArray[Any]

# f(s·x) = s·f(x) for every s > 0, and channels stay apart.
_HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")
_CLOSE = 0.02  # factors nearer to 1 change nothing that a quantizer sees


@dataclass(frozen=True)
class Equalize:
    """Scale the channels between two layers so that both weights have equal ranges per channel.

    Exact, since what stands between is positively homogeneous. Off by default.
    Source: Nagel et al., arXiv 1906.04721.

    Given:   Conv(W1, b1) -> Relu -> Conv(W2), or MatMul -> Add -> Relu -> MatMul
    Result:  the same with W1 / s, b1 / s and W2 · s, one s per channel
    """

    sweeps: int = 20

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place; the sweeps end when no factor differs from 1."""
        names = Names(model)
        rewritten: dict[str, None] = {}
        skipped: dict[str, str] = {}
        pairs = list(_pairs(model, skipped))
        fresh: set[int] = set()  # ids of the constants made here, which may be edited again
        for _ in range(self.sweeps):
            moved = [pair for pair in pairs if pair.equalize(names, fresh)]
            rewritten.update(dict.fromkeys(pair.first.name for pair in moved))
            if not moved:
                break
        return PassResult(tuple(rewritten), skipped)


@dataclass(eq=False)
class _Pair:
    first: gs.Node
    bias: tuple[gs.Node, int] | None
    second: gs.Node

    def equalize(self, names: Names, fresh: set[int]) -> bool:
        w1, w2 = _floats(self.first, 1), _floats(self.second, 1)
        out_axis = 0 if self.first.op == "Conv" else 1
        rows = _absmax(w1, out_axis)
        columns, shape = _input_ranges(self.second, w2)
        if rows.size != columns.size:
            return False
        s = equalization_scales(rows, columns).astype(np.float32)
        if np.all(np.abs(s - 1) < _CLOSE):
            return False
        along = [-1 if axis == out_axis else 1 for axis in range(w1.ndim)]
        _replace(self.first, 1, w1 / s.reshape(along), names, fresh)
        if self.bias is not None:
            node, slot = self.bias
            _replace(node, slot, _floats(node, slot) / s, names, fresh)
        groups = int(self.second.attrs.get("group", 1)) if self.second.op == "Conv" else 1
        if self.second.op == "Conv":
            split = w2.reshape(groups, -1, *w2.shape[1:])
            scaled = split * s.reshape(groups, 1, -1, *(1 for _ in w2.shape[2:]))
            _replace(self.second, 1, scaled.reshape(shape), names, fresh)
        else:
            _replace(self.second, 1, w2 * s[:, None], names, fresh)
        return True


def _pairs(model: Model, skipped: dict[str, str]) -> Iterator[_Pair]:
    for _, graph in graphs(model):
        for node in graph.nodes:
            if node.op not in ("Conv", "MatMul") or isinstance(find_weight(model, node), str):
                continue
            found = _follow(model, node)
            if isinstance(found, str):
                skipped[node.name] = found
            else:
                yield found


def _follow(model: Model, first: gs.Node) -> _Pair | str:
    """The layer behind `first` that can take over factors, or the reason why none can."""
    if first.op == "MatMul" and values(first.inputs[1]).ndim != 2:
        return "batched weight"
    bias: tuple[gs.Node, int] | None = None
    if first.op == "Conv" and len(first.inputs) > 2 and first.inputs[2].name:
        if not is_constant(first.inputs[2]):
            return "its bias is not constant"
        bias = (first, 2)
    if len(first.inputs[1].outputs) > 1:
        return "its weight is shared"
    tensor = first.outputs[0]
    while True:
        readers = consumers(tensor)
        if len(readers) != 1 or is_graph_output(model, tensor):
            return "its output is read more than once"
        node = readers[0]
        if node.op == first.op:
            return _second(model, first, bias, node, tensor)
        if node.op == "Add" and first.op == "MatMul" and bias is None:
            slot = next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
            if slot is None or values(node.inputs[slot]).ndim != 1:
                return "followed by Add of something that is no bias"
            bias = (node, slot)
        elif node.op not in _HOMOGENEOUS or (first.op == "MatMul" and "Pool" in node.op):
            return f"followed by {node.op}, which is not positively homogeneous"
        tensor = node.outputs[0]


def _second(
    model: Model, first: gs.Node, bias: tuple[gs.Node, int] | None, node: gs.Node, tensor: Any
) -> _Pair | str:
    if node.inputs[0] is not tensor:
        return "followed by a layer that reads it as its weight"
    weight = find_weight(model, node)
    if isinstance(weight, str) or weight.slot != 1 or len(node.inputs[1].outputs) > 1:
        return "followed by a layer whose weight is not its own constant"
    if node.op == "MatMul" and len(weight.shape) != 2:
        return "followed by a batched weight"
    return _Pair(first, bias, node)


def _floats(node: gs.Node, slot: int) -> npt.NDArray[np.float32]:
    return np.asarray(values(node.inputs[slot]), np.float32)


def _absmax(w: Array, axis: int) -> Array:
    return np.asarray(np.max(np.abs(w), axis=tuple(a for a in range(w.ndim) if a != axis)))


def _input_ranges(node: gs.Node, w: Array) -> tuple[Array, tuple[int, ...]]:
    """Largest |w| per input channel of the node, and the weight's shape."""
    if node.op == "MatMul":
        return _absmax(w, 0), w.shape
    groups = int(node.attrs.get("group", 1))
    split = w.reshape(groups, -1, *w.shape[1:])
    ranges = np.max(np.abs(split), axis=(1, *range(3, split.ndim)))
    return np.asarray(ranges.reshape(-1)), w.shape


def _replace(node: gs.Node, slot: int, array: Array, names: Names, fresh: set[int]) -> None:
    old = node.inputs[slot]
    name = old.name if id(old) in fresh or len(old.outputs) == 1 else names.tensor(old.name)
    made = constant(name, np.ascontiguousarray(array, np.float32))
    node.inputs[slot] = made
    fresh.add(id(made))
