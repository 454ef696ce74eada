"""Planning, static compute: which tensors are 8 bits wide, and which of them share a range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from onnxq.model import Model, is_constant
from onnxq.passes.edit import consumers
from onnxq.passes.integer_ops import (
    activation_bounds,
    after_activation,
    data_inputs,
    hard_sigmoid,
    integer_op,
)
from onnxq.passes.lower_static import is_parallel
from onnxq.passes.ranks import Shape, tensor_shapes
from onnxq.passes.search_scales import match_plan
from onnxq.passes.static_matmul import is_gemm, sole_add
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan, Range

Tensors = dict[int, Any]  # by identity, in graph order


@dataclass(frozen=True)
class Group:
    """Tensors with one range.

    Attributes:
        names: all of them.
        observed: the one that holds every value of the others.
        level: a value <= 0 that has to be one of the 256 levels, so that a HardSigmoid can be
            computed by saturation; 0 asks for nothing, since 0 is always a level.
        limits: of a tensor that is split into terms, what its values cannot pass; else None.
    """

    names: tuple[str, ...]
    observed: str
    level: float = 0.0
    limits: Range | None = None


@dataclass(frozen=True)
class Selection:
    """What static compute needs to know of a model.

    Attributes:
        groups: the tensors to quantize, in graph order.
        left: static nodes that have to compute in float, each with the reason.
    """

    groups: tuple[Group, ...]
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectTensors:
    """Choose the tensors around static nodes that are quantized.

    Given:   x -> Conv -> Relu -> MaxPool -> Conv -> y, both Convs static
    Result:  x; the Relu's output and the MaxPool's as one group; y

    Quantized are: what a static node reads; what a static Conv writes, after its Relu or Clip
    (without that it would be computed in float; the same goes for a MatMul of rank 2 to which
    something other than a row is added); and what an operator of INTEGER_OPS writes, if all
    it reads is quantized, and either a static node reads it in the end or nothing is lost, since
    the operator moves values only. All else, the ends of the graph above all, stays float. So does
    what a static node splits into several terms; it has a range of its own.
    """

    def __call__(self, model: Model, plan: Plan) -> Selection:
        """The tensors to quantize; `model`, canonical, is only read.

        Raises:
            ConfigError: the plan was made for another model.
        """
        shapes = tensor_shapes(model)
        left: dict[str, str] = {}
        nodes: dict[int, NodePlan] = {}
        for entry, (candidate, weight) in match_plan(model, plan):
            if entry.activations != "static":
                continue
            reason = _why_float(model, candidate.node, weight)
            if candidate.graph is not model.graph:
                reason = "inside a body, whose tensors are not observed"
            if reason:
                left[entry.name] = reason
            else:
                nodes[id(candidate.node)] = entry
        while True:
            survey = _Survey(model, shapes, nodes)
            islands = survey.islands()
            if not islands:
                return Selection(tuple(survey.groups()), left)
            for key in islands:
                left[nodes.pop(key).name] = _ISLAND


_ISLAND = "depthwise between float nodes: quantizing would cost more than it gains"


def _why_float(model: Model, node: gs.Node, weight: Weight) -> str | None:
    """Why a node planned as static cannot be, or None."""
    if weight.slot != 1:
        return "the constant is the left operand"
    if node.op == "MatMul" and len(weight.shape) != 2:
        return "batched weight: DequantizeLinear has no scale per matrix and column"
    if not node.inputs[0].inputs and is_constant(node.inputs[0]):
        return "its input is constant"
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if bias is not None and not is_constant(bias):
        return f"its bias {bias.name!r} is computed"
    return None


class _Survey:
    """One look at the graph, with a given set of static nodes."""

    def __init__(
        self, model: Model, shapes: Mapping[str, Shape], static: Mapping[int, NodePlan]
    ) -> None:
        self.model, self.shapes, self.static = model, shapes, static
        self.nodes = list(model.graph.nodes)
        # What is split into terms stays float between the nodes.
        self.wanted, self.split = self._read(split=False), self._read(split=True)
        # With everything that could be quantized, then with what is of use.
        self.demanded: set[int] | None = None
        self._forward()
        self.demanded = self._backward()
        self._forward()

    def _read(self, *, split: bool) -> Tensors:
        """What static nodes read, in one term or in several."""
        found = (n for n in self.nodes if id(n) in self.static)
        return {
            id(n.inputs[0]): n.inputs[0]
            for n in found
            if (self.static[id(n)].activation_terms > 1) == split
        }

    def _forward(self) -> None:
        self.quantized: Tensors = dict(self.wanted)
        self.written: dict[int, list[Any]] = {}  # 8-bit outputs of a node
        given: set[int] = set()  # tensors that integer kernels write
        for node in self.nodes:
            outputs = [t for t in self._outputs(node, given) if t.name]
            if outputs:
                self.written[id(node)] = outputs
                given.update(map(id, outputs))
                self.quantized.update((id(t), t) for t in outputs)

    def _outputs(self, node: gs.Node, given: set[int]) -> list[Any]:
        if id(node) in self.static:
            return self._static_outputs(node)
        op = integer_op(node)
        if op is None or not all(id(t) in self.quantized for t in data_inputs(node, op)):
            return []
        if op.keeps:
            free = id(node.inputs[0]) in given
            return list(node.outputs) if free or any(map(self._is_useful, node.outputs)) else []
        end = after_activation(self.model, node.outputs[0])
        return [end] if self._is_useful(end) else []

    def _static_outputs(self, node: gs.Node) -> list[Any]:
        if is_parallel(self.static[id(node)]):
            return []
        if node.op == "Conv":
            return [after_activation(self.model, node.outputs[0])]
        output = node.outputs[0]
        add = sole_add(self.model, node)
        if add is not None and is_gemm(self.model, node, self.shapes):
            output = add.outputs[0]
        elif add is not None:
            wide = len(self.shapes.get(node.inputs[0].name, ())) > 2
            return [] if wide else [output]
        end = after_activation(self.model, output)
        return [end] if self._is_useful(end) else []

    def _is_useful(self, tensor: Any) -> bool:
        return self.demanded is None or id(tensor) in self.demanded

    def _backward(self) -> set[int]:
        """The tensors that static nodes read, directly or through integer operators."""
        demanded = set(self.wanted)
        for node in reversed(self.nodes):
            op = integer_op(node)
            written = self.written.get(id(node), [])
            if op is not None and any(id(t) in demanded for t in written):
                demanded.update(map(id, data_inputs(node, op)))
        return demanded

    def islands(self) -> list[int]:
        """Depthwise Convs of which neither neighbour is an integer kernel."""
        given = {id(t) for written in self.written.values() for t in written}
        return [
            id(node)
            for node in self.nodes
            if id(node) in self.static
            and _is_depthwise(node)
            and id(node.inputs[0]) not in given
            and not any(self._is_useful(t) for t in self.written.get(id(node), ()))
        ]

    def groups(self) -> Iterator[Group]:
        """The quantized tensors, those with one range together."""
        inside: dict[int, int] = {}  # tensor -> one of its group that holds its values
        for node in self.nodes:
            op = integer_op(node)
            if id(node) not in self.written or op is None:
                continue
            if op.keeps:
                inside.update((id(t), id(node.inputs[0])) for t in self.written[id(node)])
        for node in self.nodes:
            if node.op == "Concat" and id(node) in self.written:
                self._share(node, inside)
        members: dict[int, list[int]] = {}
        for key in self.quantized:
            members.setdefault(_root(inside, key), []).append(key)
        for root, keys in members.items():
            names = tuple(self.quantized[key].name for key in keys)
            yield Group(names, self.quantized[root].name, min(map(self._level, keys)))
        for key, tensor in self.split.items():
            if key not in self.quantized:
                yield Group((tensor.name,), tensor.name, limits=_limits(tensor))

    def _level(self, key: int) -> float:
        """The value at which a HardSigmoid that reads the tensor becomes 0."""
        for node in consumers(self.quantized[key]):
            if node.op == "HardSigmoid" and id(node) in self.written:
                alpha, beta = hard_sigmoid(node)
                level = -beta / alpha
                return level if _limits(self.quantized[key])[0] <= level else 0.0
        return 0.0

    def _share(self, concat: gs.Node, inside: dict[int, int]) -> None:
        """Let what only a Concat reads have its range: else it would be rounded twice.

        A Relu, Clip or HardSigmoid that saturation stands in for has to have its own range, unless
        that of the Concat cannot be wider: without saturation it would be computed in float.
        """
        output = self.written[id(concat)][0]
        for tensor in concat.inputs:
            root = _root(inside, id(tensor))
            if not _holds(_limits(tensor), _limits(output)):
                continue  # a wider range would not saturate where the Relu or HardSigmoid does
            if len(consumers(tensor)) == 1 and root == id(tensor) != _root(inside, id(output)):
                inside[id(tensor)] = id(output)


def _root(inside: Mapping[int, int], key: int) -> int:
    while key in inside:
        key = inside[key]
    return key


def _limits(tensor: Any) -> tuple[float, float]:
    """What a tensor cannot pass, from the operators before it."""
    node = tensor.inputs[0] if tensor.inputs else None
    while node is not None and (op := integer_op(node)) is not None and op.keeps:
        before = node.inputs[0]
        node = before.inputs[0] if before.inputs else None
    if node is None:
        return -math.inf, math.inf
    if node.op in ("HardSigmoid", "Sigmoid", "Softmax"):
        return 0.0, 1.0
    if node.op == "Concat":
        lows, highs = zip(*map(_limits, node.inputs), strict=True)
        return min(lows), max(highs)
    return activation_bounds(node) or (-math.inf, math.inf)


def _holds(outer: tuple[float, float], inner: tuple[float, float]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _is_depthwise(node: gs.Node) -> bool:
    return (
        node.op == "Conv"
        and int(node.attrs.get("group", 1)) > 1
        and int(node.inputs[1].shape[1]) == 1
    )
