"""Weights that are computed from constants become initializers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import ModelError
from onnxq.model import Model, constant, evaluate, get_metadata, graphs, is_constant
from onnxq.passes.base import PassResult
from onnxq.passes.edit import consumers, is_graph_output, remove_node, replace_input
from onnxq.passes.parameters import is_parameter

# What exporters put between a stored weight and the node that reads it.
_FOLDABLE = {
    "Identity",
    "Cast",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "DequantizeLinear",
    "Concat",
    "Slice",
    "Mul",
    "Add",
    "Sub",
    "Div",
    "Neg",
    "Sqrt",
    "Reciprocal",
}
# What TorchScript computes the amounts of a Pad with; folded for them alone, since these may grow.
_AMOUNTS = {"ConstantOfShape", "Shape", "Gather", "Size"}


@dataclass(frozen=True)
class FoldConstants:
    """Compute once what lies between stored weights and the parameter they become.

    The chain is run in onnxruntime, so that the values are those that the model would use. Weights
    of an already quantized model (DequantizeLinear beside quantized activations, or onnxq's own
    terms) are left as they are: folding would undo the quantization.

    Given:   initializer -> Cast | Transpose | Reshape | DequantizeLinear … -> weight of a Conv …,
             amounts of a Pad
    Result:  initializer
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            known: dict[int, gs.Node] = {}  # nodes all of whose inputs are constant
            for node in list(graph.nodes):
                foldable = node.op in _FOLDABLE or node.op in _AMOUNTS
                if foldable and node.inputs and _all_constant(node, known):
                    known[id(node)] = node
            for node in list(known.values()):
                output = node.outputs[0]
                ends = [reader for reader in consumers(output) if id(reader) not in known]
                if not any(_wanted(reader, node, known) for reader in ends):
                    continue
                reason = _reason(model, node, known)
                if reason:
                    skipped[node.name] = reason
                    continue
                try:
                    _fold(model, node, known)
                except ModelError as error:
                    skipped[node.name] = str(error)
                    continue
                rewritten.append(node.name)
            _drop_unread(model, graph, known)
        return PassResult(tuple(rewritten), skipped)


def _all_constant(node: gs.Node, known: dict[int, gs.Node]) -> bool:
    return all(
        not t.name or is_constant(t) or (t.inputs and id(t.inputs[0]) in known) for t in node.inputs
    )


def _wanted(reader: gs.Node, node: gs.Node, known: dict[int, gs.Node]) -> bool:
    """Whether a reader takes what a node computes as a parameter, or as the amounts of a Pad."""
    if reader.op == "Pad":
        return True
    grows = any(link.op in _AMOUNTS for link in _chain(node, known))
    return is_parameter(reader, node.outputs[0]) and not grows


def _reason(model: Model, node: gs.Node, known: dict[int, gs.Node]) -> str | None:
    output = node.outputs[0]
    if is_graph_output(model, output):
        return "its output is an output of the graph"
    chain = _chain(node, known)
    for reader in consumers(output):
        if "onnxq.term" in get_metadata(reader):
            return "holds a term of a model that onnxq has quantized"
        if any(n.op == "DequantizeLinear" for n in chain) and _reads_quantized(reader):
            return f"{reader.op} {reader.name!r} is quantized already (DequantizeLinear inputs)"
    return None


def _reads_quantized(reader: gs.Node) -> bool:
    """Whether another input comes from DequantizeLinear of a tensor that is computed."""
    producers = [tensor.inputs[0] for tensor in reader.inputs if tensor.inputs]
    return any(
        node.op == "DequantizeLinear" and not is_constant(node.inputs[0]) for node in producers
    )


def _chain(node: gs.Node, known: dict[int, gs.Node]) -> list[gs.Node]:
    """A node and its constant ancestors, in graph order."""
    found: dict[int, gs.Node] = {}

    def visit(current: gs.Node) -> None:
        if id(current) in found:
            return
        for tensor in current.inputs:
            if tensor.inputs and id(tensor.inputs[0]) in known:
                visit(tensor.inputs[0])
        found[id(current)] = current

    visit(node)
    return list(found.values())


def _fold(model: Model, node: gs.Node, known: dict[int, gs.Node]) -> None:
    output = node.outputs[0]
    array = evaluate(model, _chain(node, known), output)
    folded = constant(output.name, np.ascontiguousarray(array))
    for reader in consumers(output):
        replace_input(reader, output, folded)


def _drop_unread(model: Model, graph: gs.Graph, known: dict[int, gs.Node]) -> None:
    for node in reversed(list(known.values())):
        output = node.outputs[0]
        if not output.outputs and not is_graph_output(model, output):
            remove_node(graph, node)
