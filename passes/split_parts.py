"""A model in parallel layout -> parts, one per term index, each cut into stages.

Part k holds the basis nodes whose term index is k modulo the number of parts. A stage ends where
sums over the parts are due; the next one begins with them. Everything between two sums is computed
by every part for itself, so that nothing but the partial sums leaves a part.

A node belongs to the first stage in which its inputs are known: sums that do not wait for each
other end the same stage, which gives the fewest stages. A tensor that a later stage needs is an
output of its own stage. What depends on constants alone is repeated wherever it is read, so that
onnxruntime folds it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs
from onnx import TensorProto, TypeProto

from onnxq.errors import ConfigError, ModelError
from onnxq.model import Model, graphs, is_constant, is_initializer, values
from onnxq.passes.edit import Names
from onnxq.passes.stage_model import as_model, is_portable, reads, tensor_types
from onnxq.passes.term_sums import TermSum, find_sums

# Draws of parts that run side by side would not be the same.
_RANDOM = frozenset(
    (
        *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike"),
        *("RandomUniform", "RandomUniformLike"),
    )
)


@dataclass(frozen=True)
class Stage:
    """One stage of one part.

    Attributes:
        model: what it computes, or None where it has nothing to do.
        inputs: names of model inputs, of sums over the parts, and of outputs of earlier stages.
        outputs: names of partial sums, of tensors for later stages, and of model outputs.
        partials: output that is this part's share of a sum, by the name of the sum.
    """

    model: Model | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    partials: Mapping[str, str]


@dataclass(frozen=True)
class SplitModel:
    """A model as parts.

    Attributes:
        stages: [stage][part].
        sums: [stage] the sums over the parts that follow it.
        shapes: dimensions of each sum by its name, None where they depend on the input.
    """

    stages: tuple[tuple[Stage, ...], ...]
    sums: tuple[tuple[TermSum, ...], ...]
    shapes: Mapping[str, tuple[int | None, ...]]


def split_parts(model: Model, parts: int) -> SplitModel:
    """Cut a model into parts and stages; it is used up, since its nodes go into the stages.

    Raises:
        ConfigError: `parts` is less than 2, or more than the terms of every node.
        ModelError: no node is a sum of basis nodes; the model draws random numbers; the type of a
            tensor at a cut cannot be inferred, or that of a sum is not float32.
    """
    sums = find_sums(model)
    _check(model, sums, parts)
    cutter = _Cutter(model, sums, parts)
    shapes = {found.output.name: cutter.sum_shape(found) for found in sums}
    work = [cutter.part(k) for k in range(parts)]
    count = 1 + max(s for w in work for s in w.nodes)
    stages = tuple(tuple(cutter.stage(work[k], s) for k in range(parts)) for s in range(count))
    by_stage = tuple(
        tuple(t for t in sums if cutter.level[t.output.name] == s + 1) for s in range(count)
    )
    return SplitModel(stages, by_stage, shapes)


def _check(model: Model, sums: Sequence[TermSum], parts: int) -> None:
    if parts < 2:
        raise ConfigError(f"--parts {parts}: must be 2 or more")
    if not sums:
        raise ModelError(
            "the model has no parallel basis nodes to share out (those in bodies of If and Loop "
            "stay whole): make it with `onnxq quantize --layout parallel --terms 2` or more terms"
        )
    most = max(len({addend.term for addend in found.addends}) for found in sums)
    if parts > most:
        raise ConfigError(f"--parts {parts}: no node has more than {most} terms; give fewer parts")
    for _, graph in graphs(model):
        for node in graph.nodes:
            if node.op in _RANDOM or _trains(node):
                raise ModelError(
                    f"{node.op} {node.name!r} draws random numbers, and parts that run side by "
                    "side would each draw their own: a model with it cannot be split"
                )
    for tensor in model.graph.outputs:
        if is_initializer(tensor):
            raise ModelError(f"output {tensor.name!r} is a constant: remove it to split the model")


def _trains(node: gs.Node) -> bool:
    """Whether a Dropout may drop anything."""
    if node.op != "Dropout" or len(node.inputs) < 3 or not node.inputs[2].name:
        return False
    flag = node.inputs[2]
    return not is_constant(flag) or bool(values(flag))


@dataclass(eq=False)
class _Work:
    """What one part does, by stage: node positions, tensors read, written, and partial sums."""

    nodes: dict[int, set[int]] = field(default_factory=dict)
    inputs: dict[int, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[int, dict[str, Any]] = field(default_factory=dict)
    partials: dict[int, dict[str, list[Any]]] = field(default_factory=dict)


class _Cutter:
    def __init__(self, model: Model, sums: Sequence[TermSum], parts: int) -> None:
        self.model, self.sums, self.parts = model, sums, parts
        self.nodes: list[gs.Node] = list(model.graph.nodes)
        self.names = Names(model)
        self.types = tensor_types(model)
        inside = {id(add) for found in sums for add in found.adds}
        self.producer = {
            tensor.name: i
            for i, node in enumerate(self.nodes)
            if id(node) not in inside
            for tensor in node.outputs
            if tensor.name
        }
        self.level: dict[str, int] = {}
        self.repeated: set[int] = set()
        self._find_levels(inside)

    def _find_levels(self, inside: set[int]) -> None:
        """Stage of each tensor: the number of sums in a row that it waits for."""
        ends = {id(found.adds[-1]): found for found in self.sums}
        constant: set[str] = set()
        for i, node in enumerate(self.nodes):
            if id(node) in ends:
                found = ends[id(node)]
                last = max(self.level[addend.tensor.name] for addend in found.addends)
                self.level[found.output.name] = last + 1
            if id(node) in inside:
                continue
            read = [t for t in reads(node) if not is_initializer(t)]
            fixed = all(t.name in constant for t in read)
            written = [t.name for t in node.outputs if t.name]
            if fixed:
                constant.update(written)
            if fixed or not all(is_portable(self.types.get(name)) for name in written):
                self.repeated.add(i)
            level = max((self.level.get(t.name, 0) for t in read), default=0)
            self.level.update(dict.fromkeys(written, level))

    def part(self, k: int) -> _Work:
        """Everything that part `k` has to compute, found backwards from what it hands out."""
        work = _Work()
        waiting: list[tuple[Any, int]] = []
        for found in self.sums:
            stage = self.level[found.output.name] - 1
            own = [a.tensor for a in found.addends if a.term % self.parts == k]
            if own:
                work.partials.setdefault(stage, {})[found.output.name] = own
            for tensor in own:
                waiting.append((tensor, stage))
                if len(own) == 1:
                    work.outputs.setdefault(stage, {})[tensor.name] = tensor
        for tensor in self.model.graph.outputs:
            if tensor.name in self.producer:
                home = self.level[tensor.name]
                work.outputs.setdefault(home, {})[tensor.name] = tensor
                waiting.append((tensor, home))
        while waiting:
            waiting += self._require(work, *waiting.pop())
        return work

    def _require(self, work: _Work, tensor: Any, stage: int) -> Iterator[tuple[Any, int]]:
        """Have a tensor at hand in a stage; gives the tensors that this takes, and where."""
        if is_initializer(tensor):
            return
        position = self.producer.get(tensor.name)
        if position is None:  # an input of the model, or a sum
            work.inputs.setdefault(stage, {})[tensor.name] = tensor
            return
        home = stage if position in self.repeated else self.level[tensor.name]
        if home != stage:
            work.inputs.setdefault(stage, {})[tensor.name] = tensor
            work.outputs.setdefault(home, {})[tensor.name] = tensor
        here = work.nodes.setdefault(home, set())
        if position not in here:
            here.add(position)
            yield from ((needed, home) for needed in reads(self.nodes[position]))

    def stage(self, work: _Work, s: int) -> Stage:
        """The model of one stage."""
        positions = sorted(work.nodes.get(s, ()))
        if not positions:
            return Stage(None, (), (), {})
        inputs = list(work.inputs.get(s, {}).values())
        outputs = list(work.outputs.get(s, {}).values())
        nodes = [self.nodes[i] for i in positions]
        partials = {}
        for name, own in work.partials.get(s, {}).items():
            total = own[0]
            for tensor in own[1:]:
                total = self._add(nodes, name, total, tensor)
            if len(own) > 1:
                outputs.append(total)
            partials[name] = total.name
        given = {id(tensor) for tensor in self.model.graph.inputs}
        for tensor in (*inputs, *outputs):
            if id(tensor) not in given:
                self._declare(tensor)
        made = as_model(self.model, nodes, inputs, outputs)
        return Stage(made, _names(inputs), _names(outputs), partials)

    def sum_shape(self, found: TermSum) -> tuple[int | None, ...]:
        """Dimensions of a sum, None where they depend on the input."""
        self._declare(found.output)
        if found.output.dtype != TensorProto.FLOAT:
            raise ModelError(
                f"the terms of node {found.node!r} are not summed in float32, which is all that "
                "parts exchange: leave it out with `onnxq quantize --exclude`"
            )
        return tuple(found.output.shape)

    def _add(self, nodes: list[gs.Node], name: str, one: Any, other: Any) -> Any:
        """One more Add of a part that holds several terms of a node."""
        total = gs.Variable(self.names.tensor(f"{name}/partial"))
        self.types[total.name] = self.types[name]
        node = gs.Node("Add", self.names.node(f"{name}/partial"), {}, [one, other], [total])
        nodes.append(node)
        return total

    def _declare(self, tensor: Any) -> None:
        """Type and rank of a tensor at a cut, which the format wants to know."""
        kind = self.types.get(tensor.name, TypeProto()).tensor_type
        if not kind.elem_type or not kind.HasField("shape"):
            raise ModelError(
                f"type and rank of tensor {tensor.name!r} cannot be inferred, so that the model "
                "cannot be cut there: run onnx.shape_inference, or onnxruntime's symbolic one, on "
                "the float model first"
            )
        tensor.dtype = kind.elem_type
        tensor.shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim
        )


def _names(tensors: Sequence[Any]) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in tensors)
