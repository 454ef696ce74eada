"""Fewer terms per node, without the float model: the terms of a series stand in order of weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_graphsurgeon as gs

from onnxq.errors import ModelError
from onnxq.model import Model, get_metadata, graphs, set_metadata
from onnxq.passes.base import PassResult
from onnxq.passes.edit import consumers, is_graph_output, remove_node, replace_input
from onnxq.passes.round_terms import round_terms
from onnxq.passes.stored_terms import ADDED_TERM
from onnxq.passes.term_sums import NODE, TERM
from onnxq.plan import NodePlan, Plan

_Terms = frozenset[int]


@dataclass(frozen=True)
class TruncateTerms:
    """Keep the first terms of every node that onnxq has expanded; nodes with fewer stay.

    Given:   conv1/term0, conv1/term1 -> conv1/sum, or W/term0 + W/term1 -> conv1
    Result:  with terms=1: conv1/term0 alone, which writes what conv1/sum wrote; W/term0 -> conv1

    What the dropped terms alone have needed goes with them: nodes, integers and scales. Terms that
    are digits of one number are rounded to it; all others stay bit for bit. A first term that holds
    the centre tap alone is not counted: it stays beside the first terms that hold the whole kernel.
    Which terms are digits, or of the centre, the plan says, without which none are.
    """

    terms: int
    plan: Plan | None = None

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place.

        Raises:
            ModelError: the sum that a node's metadata speak of is not in the graph, or a term that
                the plan speaks of.
        """
        before = term_counts(model)
        keep = dict.fromkeys(before, self.terms)
        if self.plan is not None:
            keep |= {entry.name: kept_terms(entry, self.terms) for entry in self.plan.quantized}
        found = [_Graph(model, graph, keep) for _, graph in graphs(model)]
        for each in found:
            each.check()
        if self.plan is not None:
            round_terms(model, self.plan, keep)
        # what a body merges may be stored in the graph around it: cut all, then sweep
        for each in found:
            each.cut()
        homes = {id(node): graph for _, graph in graphs(model) for node in graph.nodes}
        _sweep(model, homes, [tensor for each in found for tensor in each.dropped])
        after = term_counts(model)
        return PassResult(tuple(name for name in before if after.get(name) != before[name]))


def kept_terms(entry: NodePlan, terms: int) -> int:
    """How many terms a node keeps, at most, where `terms` are to be kept."""
    return terms + int(entry.centre)


def term_counts(model: Model) -> dict[str, int]:
    """How many terms the weight of each expanded node has, by the original node's name."""
    counts: dict[str, int] = {}
    for _, graph in graphs(model):
        for node in graph.nodes:
            metadata = get_metadata(node)
            if NODE in metadata and (terms := terms_of(metadata)):
                name = metadata[NODE]
                counts[name] = max(counts.get(name, 0), max(terms) + 1)
    return counts


def terms_of(metadata: dict[str, str]) -> _Terms:
    """The weight terms in a basis node; none for any other node."""
    parts = metadata.get(TERM, "").split("+")
    return frozenset(int(part) for part in parts if part.isascii() and part.isdecimal())


@dataclass(eq=False)
class _Graph:
    """One graph: which Adds have to go, and what they leave unread."""

    model: Model
    graph: gs.Graph
    keep: Mapping[str, int]  # by the original node's name
    addends: dict[tuple[int, int], _Terms] = field(default_factory=dict)  # of (sum, tensor)
    merged: dict[int, _Terms] = field(default_factory=dict)  # terms that Adds bring to a node
    added: dict[int, int] = field(default_factory=dict)  # of such an Add: how many terms are kept
    summed: set[int] = field(default_factory=set)  # nodes that a sum reads
    dropped: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        summed = {get_metadata(n).get(NODE) for n in self.graph.nodes if _is_sum(n)}
        for node in self.graph.nodes:
            metadata = get_metadata(node)
            if ADDED_TERM in metadata:
                self._follow_merged(node, int(metadata[ADDED_TERM]))
            elif metadata.get(NODE) in summed:
                self._follow(node, metadata)

    def _kept(self, metadata: Mapping[str, str]) -> int:
        return self.keep.get(metadata.get(NODE, ""), 0)

    def _follow(self, node: gs.Node, metadata: dict[str, str]) -> None:
        """Write down the terms behind what the next sums of this original node read."""
        terms = terms_of(metadata)
        for tensor in node.inputs if _is_sum(node) else []:
            terms |= self.addends.get((id(node), id(tensor)), _Terms())
        if not terms:
            return
        for tensor, reader in _behind(node):
            if get_metadata(reader).get(NODE) == metadata[NODE] and _is_sum(reader):
                key = id(reader), id(tensor)
                self.addends[key] = self.addends.get(key, _Terms()) | terms
                self.summed.add(id(node))

    def _follow_merged(self, node: gs.Node, term: int) -> None:
        for _, reader in _behind(node):
            metadata = get_metadata(reader)
            if terms_of(metadata):
                self.added[id(node)] = max(self.added.get(id(node), 0), self._kept(metadata))
                self.merged[id(reader)] = self.merged.get(id(reader), _Terms()) | {term}

    def check(self) -> None:
        """Find the Add of every term that has to go, before anything is changed."""
        for node in self.graph.nodes:
            terms = terms_of(get_metadata(node))
            high = {term for term in terms if term >= self._kept(get_metadata(node))}
            whole = high == terms and id(node) in self.summed
            if not whole and not high <= self.merged.get(id(node), _Terms()):
                raise ModelError(
                    f"node {node.name!r} says that it holds term {get_metadata(node)[TERM]} of "
                    "a series, but the sum is not as onnxq writes it: the file was changed since; "
                    "quantize the float model again"
                )

    def cut(self) -> None:
        """Take the dropped terms out of all sums."""
        for node in list(self.graph.nodes):
            metadata = get_metadata(node)
            if ADDED_TERM in metadata:
                if int(metadata[ADDED_TERM]) >= self.added.get(id(node), 0):
                    self._keep(node, [node.inputs[0]])
            elif _is_sum(node):
                self._cut_sum(node)
            elif terms := terms_of(metadata):
                kept = sorted(term for term in terms if term < self._kept(metadata))
                if kept and len(kept) < len(terms):
                    set_metadata(node, {TERM: "+".join(map(str, kept))})

    def _cut_sum(self, node: gs.Node) -> None:
        most = self._kept(get_metadata(node))

        def stays(tensor: Any) -> bool:
            terms = self.addends.get((id(node), id(tensor)))
            return terms is None or min(terms) < most

        kept = [tensor for tensor in node.inputs if stays(tensor)]
        if kept and len(kept) < len(node.inputs):
            self._keep(node, kept)

    def _keep(self, node: gs.Node, kept: list[Any]) -> None:
        """Let a sum add up fewer tensors, or go, where one is left."""
        self.dropped += [t for t in node.inputs if not any(t is other for other in kept)]
        if len(kept) > 1:
            node.inputs = kept
            return
        (tensor,), output, name = kept, node.outputs[0], get_metadata(node).get(NODE)
        readers = consumers(output)
        inner = all(get_metadata(reader).get(NODE) == name for reader in readers)
        remove_node(self.graph, node)
        if ADDED_TERM in get_metadata(node) or (inner and not is_graph_output(self.model, output)):
            for reader in readers:
                replace_input(reader, output, tensor)
                self._rename_addend(reader, output, tensor)
            return
        # a tensor of the original model: it keeps its name, and gets another producer
        producer = tensor.inputs[0]
        slot = next(i for i, other in enumerate(producer.outputs) if other is tensor)
        for reader in consumers(tensor):
            replace_input(reader, tensor, output)
        producer.outputs[slot] = output

    def _rename_addend(self, reader: gs.Node, old: Any, new: Any) -> None:
        if (id(reader), id(old)) in self.addends:
            self.addends[id(reader), id(new)] = self.addends.pop((id(reader), id(old)))


def _is_sum(node: gs.Node) -> bool:
    """Whether a node adds up basis nodes, or a bias to such a sum."""
    metadata = get_metadata(node)
    return node.op in ("Add", "Sum") and NODE in metadata and TERM not in metadata


def _behind(node: gs.Node) -> Iterator[tuple[Any, gs.Node]]:
    """The nearest nodes after one that say of which original node they are, and what they read."""
    waiting, seen = list(node.outputs), set()
    while waiting:
        tensor = waiting.pop()
        for reader in consumers(tensor):
            if NODE in get_metadata(reader):
                yield tensor, reader
            elif id(reader) not in seen:
                seen.add(id(reader))
                waiting += reader.outputs


def _sweep(model: Model, homes: dict[int, gs.Graph], tensors: list[Any]) -> None:
    """Remove what computed these tensors alone."""
    waiting = list(tensors)
    while waiting:
        for node in list(waiting.pop().inputs):
            read = any(consumers(t) or is_graph_output(model, t) for t in node.outputs)
            if not read and id(node) in homes:
                waiting += node.inputs
                remove_node(homes.pop(id(node)), node)
