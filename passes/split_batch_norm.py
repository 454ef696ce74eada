"""BatchNormalization after a Concat of convolutions moves up, one part to each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, get_metadata, graphs, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.batch_norm import in_training_mode
from onnxq.passes.edit import Builder, Names, consumers, is_graph_output, remove_node


@dataclass(frozen=True)
class SplitBatchNorm:
    """Split a BatchNormalization by channels over the convolutions whose Concat it follows.

    Given:   Conv_1, …, Conv_n -> Concat (channels) -> BatchNormalization
    Result:  (Conv_i -> BatchNormalization_i) … -> Concat, ready for FoldBatchNorm
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        names = Names(model)
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in [n for n in graph.nodes if n.op == "BatchNormalization"]:
                concat = _concat_before(graph, node)
                if concat is None:
                    continue
                reason = _reason(model, graph, node, concat)
                if reason:
                    skipped[node.name] = reason
                    continue
                _rewrite(graph, node, concat, names)
                rewritten.append(node.name)
        return PassResult(tuple(rewritten), skipped)


def _concat_before(graph: gs.Graph, norm: gs.Node) -> gs.Node | None:
    x = norm.inputs[0]
    before = x.inputs[0] if x.inputs else None
    if before is None or before.op != "Concat":
        return None
    return before if any(before is other for other in graph.nodes) else None


def _reason(model: Model, graph: gs.Graph, norm: gs.Node, concat: gs.Node) -> str | None:
    if concat.attrs.get("axis") != 1:
        return f"Concat {concat.name!r} does not join channels (axis 1)"
    joined = concat.outputs[0]
    if len(consumers(joined)) > 1 or is_graph_output(model, joined):
        return f"the output of Concat {concat.name!r} is also read elsewhere"
    if in_training_mode(norm):
        return "is in training mode"
    if not all(is_constant(t) for t in norm.inputs[1:5]):
        return "its parameters are not constant"
    for part in concat.inputs:
        conv = part.inputs[0] if part.inputs else None
        if conv is None or conv.op != "Conv" or not any(conv is n for n in graph.nodes):
            return f"not every input of Concat {concat.name!r} comes from a Conv"
        if not is_constant(conv.inputs[1]) or "onnxq.term" in get_metadata(conv):
            return f"the weight of Conv {conv.name!r} is not constant"
        if len(consumers(part)) > 1 or is_graph_output(model, part):
            return f"the output of Conv {conv.name!r} is also read elsewhere"
    if len({id(part) for part in concat.inputs}) != len(concat.inputs):
        return f"Concat {concat.name!r} joins a tensor with itself"
    return None


def _rewrite(graph: gs.Graph, norm: gs.Node, concat: gs.Node, names: Names) -> None:
    parameters = [np.asarray(values(t)) for t in norm.inputs[1:5]]
    builder = Builder(graph, concat, names, "fold")
    start = 0
    for i, part in enumerate(list(concat.inputs)):
        stop = start + int(part.inputs[0].inputs[1].shape[0])
        name = f"{norm.name}/part{i}"
        pieces = [
            builder.constant(f"{name}/{what}", np.ascontiguousarray(array[start:stop]))
            for what, array in zip(("scale", "bias", "mean", "var"), parameters, strict=True)
        ]
        concat.inputs[i] = builder.add(
            "BatchNormalization", name, [part, *pieces], attrs=norm.attrs
        )
        start = stop
    output = norm.outputs[0]
    remove_node(graph, norm)
    concat.outputs[0] = output
