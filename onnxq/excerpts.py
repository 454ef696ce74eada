"""One node of a model file, with what a rewriting has made of it, as a model of its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxq.model.protos import bodies

Array = npt.NDArray[Any]

# What onnxruntime fuses with the float node, and what a rewritten one leaves to a pass of its own.
_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")


class Place(NamedTuple):
    """Where a node is in any rewriting of its model: between tensors whose names stay.

    Attributes:
        inputs: the tensors that it reads, constants aside.
        outputs: those that it writes, or the end of what is fused with it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Excerpts:
    """Cuts nodes out of the main graph of a model.

    Args:
        written: the model; a path where its data lie in a file of their own.
    """

    def __init__(self, written: bytes | Path) -> None:
        self._folder = "" if isinstance(written, bytes) else str(written.parent)
        self._proto = (
            ModelProto.FromString(written)
            if isinstance(written, bytes)
            else onnx.load(written, load_external_data=False)
        )
        graph = self._proto.graph
        self._fixed = {tensor.name: tensor for tensor in graph.initializer}
        self._position = {o: i for i, node in enumerate(graph.node) for o in node.output if o}
        self._ends = {value.name for value in graph.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for reader, name in _reads(graph):
            self._readers.setdefault(name, []).append(reader)

    def place(self, name: str) -> Place | None:
        """Where the node of this name is, or None if it is not in the main graph.

        A bias that is added behind it and the activation after that are its own, where nothing
        else reads what is between: onnxruntime fuses them.
        """
        node = next((node for node in self._proto.graph.node if node.name == name), None)
        if node is None or any(True for _ in bodies(node)):
            return None
        inputs = dict.fromkeys(i for i in node.input if i and i not in self._fixed)
        outputs = tuple(o for o in node.output if o)
        if len(outputs) == 1:
            outputs = (self._end(outputs[0]),)
        return Place(tuple(inputs), outputs)

    def _end(self, tensor: str) -> str:
        for what in (("Add",), _FUSED):
            readers = self._readers.get(tensor, [])
            if tensor in self._ends or len(readers) != 1 or readers[0].op_type not in what:
                continue
            after = readers[0]
            if all(i == tensor or not i or i in self._fixed for i in after.input):
                tensor = after.output[0]
        return tensor

    def cut(self, place: Place, values: Mapping[str, Array]) -> ModelProto | None:
        """The nodes between the tensors of a place; None if they need others, or hold bodies.

        Args:
            place: of this model, or of the one that this was made from.
            values: of the place's inputs; the new model has their types and shapes.
        """
        graph = self._proto.graph
        wanted, positions, fixed = list(place.outputs), set[int](), dict[str, TensorProto]()
        while wanted:
            name = wanted.pop()
            if not name or name in place.inputs or name in fixed:
                continue
            if name in self._fixed:
                fixed[name] = self._fixed[name]
                continue
            position = self._position.get(name)
            if position is None:
                return None
            if position not in positions:
                positions.add(position)
                wanted += graph.node[position].input
        nodes = [graph.node[position] for position in sorted(positions)]
        if any(True for node in nodes for _ in bodies(node)):
            return None
        made = GraphProto(name="excerpt", node=nodes, initializer=fixed.values())
        for tensor in made.initializer:
            if uses_external_data(tensor):
                load_external_data_for_tensor(tensor, self._folder)
        made.input.extend(_value(name, values[name]) for name in place.inputs)
        made.output.extend(ValueInfoProto(name=name) for name in place.outputs)
        version = max(self._proto.ir_version, 4)  # before, initializers are inputs, too
        return ModelProto(
            ir_version=version, graph=made, opset_import=list(self._proto.opset_import)
        )


def signature(model: ModelProto) -> Hashable:
    """What the time of a run depends on: two models with the same one differ in numbers alone.

    That is operators, attributes, how they are connected, types and shapes; of constants' values
    int64 ones, which are shapes and indices, and integer scalars, as a zero point of 0 is faster.
    """
    names: dict[str, int] = {"": -1}

    def number(name: str) -> int:
        return names.setdefault(name, len(names))

    graph = model.graph
    inputs = tuple(
        (number(v.name), v.type.SerializeToString(deterministic=True)) for v in graph.input
    )
    fixed = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        reads = [(number(i), _kind(fixed[i]) if i in fixed else None) for i in node.input]
        attributes = sorted(
            (a.name, _kind(a.t) if a.HasField("t") else a.SerializeToString(deterministic=True))
            for a in node.attribute
        )
        writes = tuple(number(o) for o in node.output)
        nodes.append((node.domain, node.op_type, tuple(reads), writes, tuple(attributes)))
    return inputs, tuple(nodes), tuple(number(v.name) for v in graph.output)


def _kind(tensor: TensorProto) -> Hashable:
    size = 1
    for dim in tensor.dims:
        size *= dim
    small = tensor.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE) and size == 1
    told = tensor.data_type == TensorProto.INT64 or small
    numbers = onnx.numpy_helper.to_array(tensor).tobytes() if told else b""
    return tensor.data_type, tuple(tensor.dims), numbers


def _value(name: str, array: Array) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, array.shape)


def _reads(graph: GraphProto) -> Iterator[tuple[NodeProto, str]]:
    """Each node with each tensor that it or its bodies read."""
    for node in graph.node:
        for name in node.input:
            yield node, name
        for _, body in bodies(node):
            for _, name in _reads(body):
                yield node, name
            for value in body.output:
                yield node, value.name
