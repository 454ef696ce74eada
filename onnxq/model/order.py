"""Topological order of a graph's nodes."""

from __future__ import annotations

import heapq

from onnx import GraphProto, NodeProto

from onnxq.errors import ModelError
from onnxq.model.protos import bodies, label


def sort_nodes(graph: GraphProto, where: str) -> None:
    """Sort the nodes in place if need be; nodes that are in order keep their order.

    onnxruntime runs an unsorted model, the ONNX specification forbids it: sorting serves both.

    Raises:
        ModelError: the nodes form a cycle.

    """
    needs = [reads(node) for node in graph.node]
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    before = [{producer[name] for name in names if name in producer} for names in needs]
    if all(i < index for index, group in enumerate(before) for i in group):
        return
    order = _kahn(before)
    if len(order) < len(before):
        stuck = sorted(set(range(len(before))) - set(order))
        names = ", ".join(label(graph.node[i], i) for i in stuck[:4])
        more = f" and {len(stuck) - 4} more" if len(stuck) > 4 else ""
        raise ModelError(
            f"{where}: the graph has a cycle through or before {names}{more}: "
            "repair the model or export it again"
        )
    nodes = [NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)


def reads(node: NodeProto) -> set[str]:
    """Names a node needs from its own graph or from outside: inputs and what its bodies capture."""
    names = {name for name in node.input if name}
    for _, body in bodies(node):
        inner = {value.name for value in body.input} | {t.name for t in body.initializer}
        inner |= {s.values.name for s in body.sparse_initializer}
        inner |= {name for child in body.node for name in child.output}
        used = {value.name for value in body.output}
        for child in body.node:
            used |= reads(child)
        names |= used - inner
    return names


def _kahn(before: list[set[int]]) -> list[int]:
    waiting = [len(group) for group in before]
    after: list[list[int]] = [[] for _ in before]
    for index, group in enumerate(before):
        for i in group:
            after[i].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for i in after[index]:
            waiting[i] -= 1
            if waiting[i] == 0:
                heapq.heappush(ready, i)
    return order
