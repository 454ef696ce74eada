"""Blocks and stages of a model: the parts at whose ends quantized weights are judged.

A block ends where one tensor alone carries on what the main graph has computed, so that residual
blocks stay whole; a stage, of several blocks, where the spatial size changes. Where skip
connections span everything a part may also end at a few live tensors (RepAPQ, arXiv 2402.16121,
has blocks and stages of its networks; finding them in a graph is our own). Long stages are cut.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto

from onnxq.model.order import reads

# Planned nodes of a part that is not cut further.
LARGEST_BLOCK = 4
# Live tensors at which a larger part may be cut.
MOST_LIVE = 3
# Blocks of a stage: every change of a block is judged by running what follows in its stage.
LONGEST_STAGE = 4


@dataclass(frozen=True)
class Block:
    """A part of the main graph.

    Attributes:
        nodes: positions in the graph, in order; those that compute constants are left out.
        inputs: the tensors that are live before it.
        outputs: those that are live behind it: where it is judged.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Blocks after each other; the last one's outputs are where the stage is judged."""

    blocks: tuple[Block, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors that are live behind it."""
        return self.blocks[-1].outputs


def find_blocks(
    graph: GraphProto,
    chosen: Collection[str],
    sizes: Mapping[str, tuple[int, ...]],
    *,
    largest: int = LARGEST_BLOCK,
    most_live: int = MOST_LIVE,
) -> list[Stage]:
    """The stages of a sorted graph, which together hold every node that is not constant.

    Args:
        graph: of the float model.
        chosen: names of the planned nodes; a block holds at least one, but for the last of all.
        sizes: shapes of tensors, as far as they are known; axes from the third on are the spatial
            size, that of the largest of several live tensors counts.
        largest: planned nodes of a block from which on it is cut at several live tensors, too.
        most_live: so many at most.

    A graph without planned nodes has no stages.
    """
    walk = _Walk.of(graph)
    planned = [at for at, i in enumerate(walk.order) if graph.node[i].name in chosen]
    if not planned:
        return []
    ends = _finer(walk, _single_ends(walk), planned, largest, most_live)
    blocks = _blocks(graph, walk, ends, planned)
    stages: list[list[Block]] = []
    before: tuple[int, ...] | None = None
    for block in blocks:
        space = _space(block.outputs, sizes)
        # The block that changes the size begins the next stage.
        same = space is None or before is None or space == before
        if stages and same and len(stages[-1]) < LONGEST_STAGE:
            stages[-1].append(block)
        else:
            stages.append([block])
        before = space if space is not None else before
    return [Stage(tuple(found)) for found in stages]


@dataclass(frozen=True)
class _Walk:
    """The nodes that are not constant, and behind each of them the live tensors."""

    order: tuple[int, ...]
    start: tuple[str, ...]
    live: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, graph: GraphProto) -> _Walk:
        stored = {tensor.name for tensor in graph.initializer}
        fed = [value.name for value in graph.input if value.name not in stored]
        varies = set(fed)
        order = []
        needs = [reads(node) for node in graph.node]
        for i, node in enumerate(graph.node):
            if varies.intersection(needs[i]):
                order.append(i)
                varies.update(name for name in node.output if name)
        last: dict[str, int] = {}
        for at, i in enumerate(order):
            last |= dict.fromkeys(needs[i] & varies, at)
        # The model's outputs are kept, but only the last cut is at them.
        current = [name for name in fed if name in last]
        start, live = tuple(current), []
        ends = {value.name for value in graph.output}
        for at, i in enumerate(order):
            current += [name for name in graph.node[i].output if name in last]
            current = [name for name in current if last[name] > at]
            live.append(tuple(current))
        if live:
            live[-1] = tuple(sorted(ends & varies))
        return cls(tuple(order), start, tuple(live))


def _single_ends(walk: _Walk) -> list[int]:
    """Places behind which one tensor alone is live, and the end."""
    last = len(walk.order) - 1
    return [at for at, live in enumerate(walk.live) if len(live) == 1 or at == last]


def _finer(
    walk: _Walk, ends: list[int], planned: Sequence[int], largest: int, most_live: int
) -> list[int]:
    """The ends, and in parts of too many planned nodes more of them, where fewest are live."""
    found: list[int] = []
    begin = 0
    for end in ends:
        inside = [at for at in planned if begin <= at <= end]
        while len(inside) > largest:
            # Between the second of these planned nodes and the one that would be too many.
            place = min(range(inside[1], inside[largest]), key=lambda at: (len(walk.live[at]), -at))
            if len(walk.live[place]) > most_live:
                inside = inside[largest:]
                continue
            found.append(place)
            inside = [at for at in inside if at > place]
        found.append(end)
        begin = end + 1
    return found


def _blocks(graph: GraphProto, walk: _Walk, ends: list[int], planned: Sequence[int]) -> list[Block]:
    """Each ends as late as can be before the next planned node: with its activation and pooling."""
    blocks: list[Block] = []
    begin, inputs = 0, walk.start
    for place, end in enumerate(ends):
        last = place == len(ends) - 1
        has = any(begin <= at <= end for at in planned)
        more = not last and any(end < at <= ends[place + 1] for at in planned)
        if not last and not (has and more):
            continue
        nodes = walk.order[begin : end + 1]
        at_hand = {*inputs, *(name for i in nodes for name in graph.node[i].output)}
        # Outputs of the model that an earlier block computes are not judged again.
        outputs = tuple(name for name in walk.live[end] if name in at_hand)
        blocks.append(Block(nodes, inputs, outputs))
        begin, inputs = end + 1, outputs
    return blocks


def _space(
    tensors: tuple[str, ...], sizes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    known = [sizes[name][2:] for name in tensors if name in sizes]
    return max(known, key=lambda space: (len(space), space), default=None)
