"""What must hold after every pass. The rules are a table: a name, and a check that finds faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxq.errors import PassError
from onnxq.model import Model, graphs, is_initializer


@dataclass(frozen=True)
class Signature:
    """Names of the inputs and outputs of a model's main graph."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def signature(model: Model) -> Signature:
    """The signature that no pass may change (initializers listed as inputs are not part of it)."""
    graph = model.graph
    return Signature(tuple(t.name for t in graph.inputs), tuple(t.name for t in graph.outputs))


def _unique_node_names(model: Model, _: Signature) -> Iterator[str]:
    count = Counter(node.name for _, graph in graphs(model) for node in graph.nodes)
    yield from (f"{n} nodes are named {name!r}" for name, n in count.items() if n > 1 and name)


def _unique_producers(model: Model, _: Signature) -> Iterator[str]:
    for where, graph in graphs(model):
        count = Counter(t.name for node in graph.nodes for t in node.outputs if t.name)
        for name, n in count.items():
            if n > 1:
                yield f"tensor {name!r} is produced by {n} nodes{_in(where)}"


def _inputs_not_produced(model: Model, _: Signature) -> Iterator[str]:
    for where, graph in graphs(model):
        given = {t.name for t in graph.inputs}
        for node in graph.nodes:
            for tensor in node.outputs:
                if tensor.name in given:
                    yield f"{node.op} {node.name!r} writes the input {tensor.name!r}{_in(where)}"


def _one_tensor_per_name(model: Model, _: Signature) -> Iterator[str]:
    for where, graph in graphs(model):
        seen: dict[str, int] = {}
        for node in graph.nodes:
            for tensor in (*node.inputs, *node.outputs):
                if tensor.name and seen.setdefault(tensor.name, id(tensor)) != id(tensor):
                    yield f"two distinct tensors are named {tensor.name!r}{_in(where)}"


def _sorted_and_complete(model: Model, _: Signature) -> Iterator[str]:
    yield from _unproduced(model.graph, set(), "")


def _unproduced(graph: gs.Graph, outer: set[str], where: str) -> Iterator[str]:
    known = outer | {t.name for t in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if tensor.name and not is_initializer(tensor) and tensor.name not in known:
                yield (
                    f"{node.op} {node.name!r} reads {tensor.name!r}, which no earlier node, input "
                    f"or initializer provides{_in(where)}"
                )
        for key, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from _unproduced(value, known, f"{node.name}/{key}")
        known |= {t.name for t in node.outputs}
    for tensor in graph.outputs:
        if tensor.name not in known and not is_initializer(tensor):
            yield f"output {tensor.name!r} is not produced{_in(where)}"


def _same_signature(model: Model, before: Signature) -> Iterator[str]:
    now = signature(model)
    if now.inputs != before.inputs:
        yield f"the graph inputs changed from {list(before.inputs)} to {list(now.inputs)}"
    if now.outputs != before.outputs:
        yield f"the graph outputs changed from {list(before.outputs)} to {list(now.outputs)}"


RULES: Mapping[str, Callable[[Model, Signature], Iterator[str]]] = {
    "unique node names": _unique_node_names,
    "one producer per tensor": _unique_producers,
    "inputs are given, not produced": _inputs_not_produced,
    "one tensor per name": _one_tensor_per_name,
    "sorted, acyclic, nothing dangling": _sorted_and_complete,
    "signature unchanged": _same_signature,
}


def verify(model: Model, before: Signature, pass_name: str) -> None:
    """Check all rules.

    Raises:
        PassError: names the pass, the rule, and the first node or tensor at fault.
    """
    for rule, faults in RULES.items():
        for fault in faults(model, before):
            raise PassError(
                f"pass {pass_name} broke the graph ({rule}): {fault}. This is a fault of onnxq: "
                "please report it with the model"
            )


def _in(where: str) -> str:
    return f" in {where}" if where else ""
