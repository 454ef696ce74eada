"""Where the terms of a node are added up: the points at which a model can be cut by term.

The sum stands before the bias and before every nonlinearity, so that it is the only thing that
parts of a model, one per term, have to tell each other (the paper's AbelianAdd).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from onnxq.model import Model, get_metadata

NODE = "onnxq.node"
TERM = "onnxq.term"
ACTIVATION_TERM = "onnxq.activation_term"

_Labels = tuple[str, str]  # of a product: its weight term and its activation term


@dataclass(frozen=True, eq=False)
class Addend:
    """One tensor of a sum, and the index that decides which part computes it."""

    tensor: Any
    term: int


@dataclass(frozen=True, eq=False)
class TermSum:
    """The Adds that sum the terms of one original node.

    Attributes:
        node: name of the original node.
        output: the tensor that holds the whole sum.
        adds: the Add nodes, in graph order.
        addends: what they add up, in their order; two or more.
    """

    node: str
    output: Any
    adds: tuple[gs.Node, ...]
    addends: tuple[Addend, ...]


def find_sums(model: Model) -> list[TermSum]:
    """The sums of basis nodes in the main graph, in graph order; those in bodies are left whole.

    An Add belongs to a sum if it carries `onnxq.node` and both its inputs come from basis nodes of
    that node. The term of an addend is its weight term, so that no weight is needed twice; where
    the weight has one term (or all merged) its activation term; else its place in the sum.
    """
    sums: dict[int, str] = {}
    for node in model.graph.nodes:
        name = get_metadata(node).get(NODE)
        is_add = node.op == "Add" and TERM not in get_metadata(node)
        if name is not None and is_add and all(_terms_behind(t, name, sums) for t in node.inputs):
            sums[id(node)] = name
    leaving = {id(tensor) for graph in model.all_graphs for tensor in graph.outputs}
    found = []
    for node in model.graph.nodes:
        if id(node) in sums and not _is_inner(node.outputs[0], sums, sums[id(node)], leaving):
            found.append(_term_sum(node, sums, leaving))
    return found


def _terms_behind(tensor: Any, name: str, sums: dict[int, str]) -> set[_Labels]:
    """The terms of the basis nodes of `name` from which a tensor comes; empty words for sums.

    The way back ends at every node that carries `onnxq.node`.
    """
    waiting, seen = [tensor], set()
    found: set[_Labels] = set()
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) in seen:
                continue
            seen.add(id(node))
            metadata = get_metadata(node)
            if NODE not in metadata:
                waiting += node.inputs
            elif metadata[NODE] == name and TERM in metadata:
                found.add((metadata[TERM], metadata.get(ACTIVATION_TERM, "")))
            elif sums.get(id(node)) == name:
                found.add(("", ""))
    return found


def _is_inner(tensor: Any, sums: dict[int, str], name: str, leaving: set[int]) -> bool:
    """Whether a partial sum is read by one more Add of the same sum and by nothing else."""
    readers = list(tensor.outputs)
    return len(readers) == 1 and sums.get(id(readers[0])) == name and id(tensor) not in leaving


def _term_sum(last: gs.Node, sums: dict[int, str], leaving: set[int]) -> TermSum:
    name = sums[id(last)]
    adds: list[gs.Node] = []
    tensors: list[Any] = []

    def collect(add: gs.Node) -> None:
        for tensor in add.inputs:
            producer = tensor.inputs[0]
            if id(producer) in sums and _is_inner(tensor, sums, name, leaving):
                collect(producer)
            else:
                tensors.append(tensor)
        adds.append(add)

    collect(last)
    labels = [_terms_behind(tensor, name, sums) for tensor in tensors]
    addends = tuple(map(Addend, tensors, _terms(labels)))
    return TermSum(name, last.outputs[0], tuple(adds), addends)


def _terms(labels: list[set[_Labels]]) -> list[int]:
    """The index of each addend: see `find_sums`."""
    if all(len(each) == 1 for each in labels):
        for which in (0, 1):
            terms = [next(iter(each))[which] for each in labels]
            if len(set(terms)) > 1 and all(t.isascii() and t.isdecimal() for t in terms):
                return [int(term) for term in terms]
    return list(range(len(labels)))
