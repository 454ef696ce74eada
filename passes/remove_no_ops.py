"""Nodes that change nothing at inference go away, and pairs that undo or repeat each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, element_type, graphs, is_constant, values
from onnxq.passes.base import PassResult
from onnxq.passes.bypass import bypass, why_not_bypassed
from onnxq.passes.edit import consumers, is_graph_output


@dataclass(frozen=True)
class RemoveNoOps:
    """Take out Dropout, casts to the same type, empty pads, and redundant shape changes.

    Given:   Dropout | Cast to the type that is there | Pad by nothing | Transpose -> Transpose |
             Reshape -> Reshape
    Result:  nothing, or the second of the pair, which does the work of both
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for _, graph in graphs(model):
            for node in list(graph.nodes):
                if node.op in _MERGES and _MERGES[node.op](model, graph, node):
                    rewritten.append(node.name)
                if node.op not in _NO_OPS or not _NO_OPS[node.op](node):
                    continue
                reason = why_not_bypassed(model, graph, node)
                if reason:
                    skipped[node.name] = reason
                    continue
                bypass(model, graph, node)
                rewritten.append(node.name)
        return PassResult(tuple(dict.fromkeys(rewritten)), skipped)


def _dropout(node: gs.Node) -> bool:
    mask_used = len(node.outputs) > 1 and bool(node.outputs[1].outputs)
    training = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    inference = training is None or (is_constant(training) and not np.any(values(training)))
    return inference and not mask_used


def _same_cast(node: gs.Node) -> bool:
    have = node.inputs[0].dtype
    return have is not None and element_type(have) == element_type(node.attrs["to"])


def _empty_pad(node: gs.Node) -> bool:
    if "pads" in node.attrs:
        return not any(node.attrs["pads"])
    amounts = node.inputs[1] if len(node.inputs) > 1 else None
    return amounts is not None and is_constant(amounts) and not np.any(values(amounts))


def _identity_transpose(node: gs.Node) -> bool:
    perm = node.attrs.get("perm")
    return perm is not None and list(perm) == list(range(len(perm)))


_NO_OPS: dict[str, Callable[[gs.Node], bool]] = {
    "Dropout": _dropout,
    "Cast": _same_cast,
    "Pad": _empty_pad,
    "Transpose": _identity_transpose,
}


def _merge_transposes(model: Model, graph: gs.Graph, node: gs.Node) -> bool:
    """Let the second of two Transposes do both permutations."""
    first = _sole_producer(model, graph, node, "Transpose")
    if first is None or "perm" not in node.attrs or "perm" not in first.attrs:
        return False
    node.attrs["perm"] = [first.attrs["perm"][axis] for axis in node.attrs["perm"]]
    bypass(model, graph, first)
    return True


def _merge_reshapes(model: Model, graph: gs.Graph, node: gs.Node) -> bool:
    """Drop the first of two Reshapes, where the second does not copy dimensions from it."""
    first = _sole_producer(model, graph, node, "Reshape")
    if first is None or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
        return False
    if node.attrs.get("allowzero", 0) or not np.all(values(node.inputs[1])):
        return False
    bypass(model, graph, first)
    return True


_MERGES: dict[str, Callable[[Model, gs.Graph, gs.Node], bool]] = {
    "Transpose": _merge_transposes,
    "Reshape": _merge_reshapes,
}


def _sole_producer(model: Model, graph: gs.Graph, node: gs.Node, op_type: str) -> Any:
    """The node of `op_type` in this graph whose output only `node` reads, or None."""
    x = node.inputs[0]
    producer = x.inputs[0] if x.inputs else None
    if producer is None or producer.op != op_type or len(consumers(x)) > 1:
        return None
    if is_graph_output(model, x) or not any(producer is other for other in graph.nodes):
        return None
    return producer
