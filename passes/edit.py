"""The few edits that passes share: unique names, new nodes in place, rewired tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.model import Model, constant, graphs, set_metadata


class Names:
    """Hands out tensor and node names that no graph of the model uses yet."""

    def __init__(self, model: Model) -> None:
        self._nodes: set[str] = set()
        self._tensors: set[str] = set()
        for _, graph in graphs(model):
            for node in graph.nodes:
                self._nodes.add(node.name)
                self._tensors.update(t.name for t in (*node.inputs, *node.outputs))
            self._tensors.update(t.name for t in (*graph.inputs, *graph.outputs))

    def node(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, … if a node has that name."""
        return _take(wanted, self._nodes)

    def free_node(self, name: str) -> None:
        """Let the name of a node that was removed be taken again."""
        self._nodes.discard(name)

    def tensor(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, … if a tensor has that name."""
        return _take(wanted, self._tensors)


def _take(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


class Builder:
    """Makes nodes and constants and puts them into one graph just before a given node.

    Args:
        graph: the graph that gets the nodes.
        before: the new nodes stand before this one, or, once it is removed, in its place, so that
            the graph stays sorted.
        names: the names of the whole model.
        pass_name: written to each marked node as metadata `onnxq.pass`.
        scalars: the shared constants made so far for this graph, by name.
    """

    def __init__(
        self,
        graph: gs.Graph,
        before: gs.Node,
        names: Names,
        pass_name: str,
        scalars: dict[str, Any] | None = None,
    ) -> None:
        self._graph = graph
        self._at = position(graph, before)
        self._names = names
        self._pass = pass_name
        self._scalars = {} if scalars is None else scalars

    @property
    def graph(self) -> gs.Graph:
        """The graph that gets the nodes."""
        return self._graph

    def skip(self) -> None:
        """Move the place of insertion behind the node that it stood before."""
        self._at += 1

    def back(self, count: int) -> None:
        """Move the place of insertion, after `count` nodes ahead of it were removed."""
        self._at -= count

    def variable(self, name: str) -> gs.Variable:
        """A tensor with a name of its own, for a node still to come."""
        return gs.Variable(self._names.tensor(name))

    def constant(self, name: str, array: npt.NDArray[Any], data_type: int | None = None) -> Any:
        """A constant with a name of its own; `data_type` packs 4-bit types."""
        return constant(self._names.tensor(name), np.asarray(array), data_type=data_type)

    def scalar(self, value: np.generic) -> Any:
        """A scalar constant, one per value and type."""
        key = f"{value.dtype.name}/{value}"
        if key not in self._scalars:
            self._scalars[key] = self.constant(f"onnxq/{key}", np.asarray(value))
        return self._scalars[key]

    def shared(self, name: str, array: npt.NDArray[Any]) -> Any:
        """The constant of that name, made once for the graph."""
        if name not in self._scalars:
            self._scalars[name] = self.constant(name, array)
        return self._scalars[name]

    def add(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[Any],
        *,
        attrs: dict[str, Any] | None = None,
        output: Any = None,
        outputs: Sequence[str] = (),
        metadata: dict[str, str] | None = None,
    ) -> Any:
        """Insert a node and return its output tensor (all of them, if `outputs` names them)."""
        made = [gs.Variable(self._names.tensor(o)) for o in outputs]
        if not made:
            made = [gs.Variable(self._names.tensor(name)) if output is None else output]
        node = gs.Node(
            op=op_type,
            name=self._names.node(name),
            attrs=dict(attrs or {}),
            inputs=list(inputs),
            outputs=made,
        )
        if metadata is not None:
            set_metadata(node, {"onnxq.pass": self._pass, **metadata})
        self._graph.nodes.insert(self._at, node)
        self._at += 1
        return made if outputs else made[0]


def position(graph: gs.Graph, node: gs.Node) -> int:
    """Index of this very node object in the graph (gs compares nodes by value)."""
    return next(i for i, other in enumerate(graph.nodes) if other is node)


def remove_node(graph: gs.Graph, node: gs.Node) -> None:
    """Detach a node from its tensors and take it out of the graph."""
    node.inputs.clear()
    node.outputs.clear()
    del graph.nodes[position(graph, node)]


def replace_input(node: gs.Node, old: Any, new: Any) -> None:
    """Put `new` wherever `node` reads `old`, compared by identity."""
    for i, tensor in enumerate(list(node.inputs)):
        if tensor is old:
            node.inputs[i] = new


def consumers(tensor: Any) -> list[gs.Node]:
    """The nodes that read a tensor, each once; a copy, since gs's own list changes under edits."""
    seen: dict[int, gs.Node] = {id(node): node for node in tensor.outputs}
    return list(seen.values())


def is_graph_output(model: Model, tensor: Any) -> bool:
    """Whether a tensor leaves any graph of the model."""
    return any(tensor is out for graph in model.all_graphs for out in graph.outputs)
