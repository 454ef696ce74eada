"""Which graph declares each constant: gs lets a node read a constant of any graph around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx_graphsurgeon.ir.graph import Graph
from onnx_graphsurgeon.ir.tensor import Constant

from onnxq.model.stash import GraphStash, stash_of

_Path = tuple[int, ...]  # from the main graph down: one number per body


class Owners:
    """For every graph, the constants it declares, in order of first use.

    A constant belongs to the innermost graph around all nodes that read it, and to the graph of
    the file that declared it where that is further out.
    """

    def __init__(self, graph: Any) -> None:
        self._places: dict[int, tuple[Any, _Path]] = {}  # constant -> itself, graph
        self._graphs: dict[_Path, Any] = {}
        self._walk(graph, ())
        for path, inner in self._graphs.items():
            stash: GraphStash | None = stash_of(inner)
            for entry in stash.initializers if stash else []:
                if id(entry.constant) in self._places:
                    self._place(entry.constant, path)
        self._of: dict[int, list[Any]] = {id(inner): [] for inner in self._graphs.values()}
        for constant, path in self._places.values():
            self._of[id(self._graphs[path])].append(constant)

    def of(self, graph: Any) -> list[Any]:
        """Constants that `graph` declares."""
        return self._of[id(graph)]

    def _walk(self, graph: Any, path: _Path) -> None:
        self._graphs[path] = graph
        count = 0
        for node in graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, Constant):
                    self._place(tensor, path)
            for body in bodies_of(node):
                self._walk(body, (*path, count))
                count += 1
        for tensor in graph.outputs:
            if isinstance(tensor, Constant):
                self._place(tensor, path)

    def _place(self, constant: Any, path: _Path) -> None:
        _, known = self._places.get(id(constant), (constant, path))
        shared = 0
        while shared < min(len(known), len(path)) and known[shared] == path[shared]:
            shared += 1
        self._places[id(constant)] = (constant, known[:shared])


def bodies_of(node: Any) -> Iterator[Any]:
    """The subgraphs of a gs node."""
    for value in node.attrs.values():
        if isinstance(value, Graph):
            yield value
