"""A model run in segments, between them the tensors that are still needed, of all samples.

A segment ends where nodes are to be planned: their inputs are there, of every sample, and nothing
behind them has run. Two variants go side by side: the float model, and the model whose planned
nodes have their quantized weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, numpy_helper
from onnx.helper import make_node, make_tensor_value_info, np_dtype_to_tensor_dtype

from onnxq.errors import CalibrationError, ValidationError
from onnxq.feeds import Feed
from onnxq.model.order import reads
from onnxq.session import open_session, run

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

# Without inputs, and yet no constant.
_RANDOM = ("RandomNormal", "RandomUniform")


@dataclass(frozen=True)
class Segment:
    """What is run between two groups of chosen nodes.

    Attributes:
        nodes: positions in the graph, in order. Nodes that compute constants are repeated in every
            segment that reads them, so that nothing constant is kept once per sample.
        inputs: the tensors it reads that are not constant and that it does not compute.
        outputs: what it computes that must be kept.
        live: everything that must be kept once it has run: what a node not yet run reads.
        group: the chosen nodes whose inputs are all there then.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    live: frozenset[str]
    group: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a planned node becomes in the quantized variant.

    Attributes:
        slot: the input that holds its weight.
        weight: in the stored shape and dtype.
        shift: added to the output, in a shape that broadcasts; None for nothing.
    """

    slot: int
    weight: Array
    shift: Array | None


def cut(
    graph: GraphProto, chosen: Collection[str], beside: Mapping[str, str] | None = None
) -> list[Segment]:
    """Cut a sorted graph before the chosen nodes, given by name.

    A node is in group k if k chosen nodes lie on the longest way to it. Only nodes that lead to a
    chosen one are run. If, Loop and Scan are run as any node; what is in them cannot be chosen. A
    chosen node whose inputs are all constant is in no group.

    `beside` names for some of the chosen nodes another tensor, which does not depend on them: it is
    kept, too, where it is there before their group.
    """
    needs = [sorted(reads(node)) for node in graph.node]
    beside = beside or {}
    needed = _needed(graph, needs, chosen, set(beside.values()))
    level = dict.fromkeys(_fed(graph) & needed, 0)  # of each tensor that is not constant
    runs_at: dict[int, int] = {}
    constants: dict[str, int] = {}  # what computes them
    for i, node in enumerate(graph.node):
        before = [level[name] for name in needs[i] if name in level]
        if not before and node.op_type not in _RANDOM:
            constants |= dict.fromkeys(node.output, i)
            continue
        runs_at[i] = max(before, default=0) + (node.name in chosen)
        level |= dict.fromkeys((name for name in node.output if name), runs_at[i])
    read_until: dict[str, int] = {}
    for i, at in runs_at.items():
        if graph.node[i].name in chosen or needed.intersection(graph.node[i].output):
            for name in needs[i]:
                read_until[name] = max(read_until.get(name, 0), at)
        extra = beside.get(graph.node[i].name)
        if extra in level and level[extra] < at:
            read_until[extra] = max(read_until.get(extra, 0), at)
    last = max((at for i, at in runs_at.items() if graph.node[i].name in chosen), default=0)
    segments = []
    for here in range(last):
        own = [
            i
            for i, at in runs_at.items()
            if at == here and needed.intersection(graph.node[i].output)
        ]
        made = {name for i in own for name in graph.node[i].output}
        live = frozenset(n for n, at in level.items() if at <= here < read_until.get(n, 0))
        segments.append(
            Segment(
                nodes=tuple(_with_constants(own, needs, constants)),
                inputs=tuple(sorted({n for i in own for n in needs[i] if n in level} - made)),
                outputs=tuple(sorted(made & live)),
                live=live,
                group=tuple(
                    graph.node[i].name
                    for i, at in runs_at.items()
                    if at == here + 1 and graph.node[i].name in chosen
                ),
            )
        )
    return segments


def _fed(graph: GraphProto) -> set[str]:
    """The inputs that a run has to give."""
    stored = {tensor.name for tensor in graph.initializer}
    return {value.name for value in graph.input} - stored


def _needed(
    graph: GraphProto, needs: Sequence[Sequence[str]], chosen: Collection[str], more: set[str]
) -> set[str]:
    """The tensors that lead to a chosen node, or to one of some more."""
    needed = set(more)
    for node, names in zip(reversed(graph.node), reversed(needs), strict=True):
        if node.name in chosen or needed.intersection(node.output):
            needed.update(names)
    return needed - {""}


def with_constants(graph: GraphProto, nodes: Sequence[int]) -> list[int]:
    """Positions of some nodes that are not constant, and of those that compute their constants."""
    needs = [sorted(reads(node)) for node in graph.node]
    varies = _fed(graph)
    constants: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        if varies.intersection(needs[i]) or node.op_type in _RANDOM:
            varies.update(node.output)
        else:
            constants |= dict.fromkeys(node.output, i)
    return _with_constants(nodes, needs, constants)


def _with_constants(
    own: Sequence[int], needs: Sequence[Sequence[str]], constants: Mapping[str, int]
) -> list[int]:
    found, waiting = set(own), list(own)
    while waiting:
        for name in needs[waiting.pop()]:
            maker = constants.get(name)
            if maker is not None and maker not in found:
                found.add(maker)
                waiting.append(maker)
    return sorted(found)


def live_bytes(proto: ModelProto, segments: Sequence[Segment], feed: Feed) -> int:
    """The most bytes that one sample's live tensors take, in one variant.

    Raises:
        CalibrationError: the model fails on the sample.
    """
    kept = set().union(*(segment.live for segment in segments))
    nodes = sorted({i for segment in segments for i in segment.nodes})
    inputs = {name: np.asarray(array) for name, array in feed.items()}
    outputs = sorted(kept - set(inputs))
    found = dict(inputs)
    if outputs:
        session = open_part(proto, nodes, inputs, outputs)
        found |= run_part(session, {i.name: inputs[i.name] for i in session.get_inputs()}, outputs)
    totals = (sum(found[name].nbytes for name in segment.live) for segment in segments)
    return max(totals, default=0)


class Frontier:
    """Walks a model from group to group, all samples abreast.

    Iterating runs the next segment in both variants and yields its group, whose inputs `inputs`
    then gives. Before it goes on, the caller says with `replace` what each node of the group has
    become; a node without a replacement stays float.
    """

    def __init__(
        self,
        proto: ModelProto,
        segments: Sequence[Segment],
        feeds: Sequence[Feed],
        threads: int | None = None,
    ) -> None:
        self._proto, self._segments, self._threads = proto, segments, threads
        self._nodes = {node.name: node for node in proto.graph.node}
        start = [{name: np.asarray(array) for name, array in feed.items()} for feed in feeds]
        self._float: list[Tensors] = start
        self._quantized: list[Tensors] = [dict(tensors) for tensors in start]
        self._replaced: dict[str, Replacement] = {}

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        """The groups, in order.

        Raises:
            CalibrationError: the model fails on a sample, or a value between segments is no tensor.
        """
        for segment in self._segments:
            self._advance(segment)
            yield segment.group

    def replace(self, name: str, replacement: Replacement) -> None:
        """Let a node of the current group compute with this weight from now on."""
        self._replaced[name] = replacement

    def inputs(self, name: str, slot: int) -> tuple[list[Array], list[Array]]:
        """An input of a node of the current group, of each sample: (float, quantized).

        Both lists hold the same objects where nothing quantized lies before the node.
        """
        tensor = self._nodes[name].input[slot]
        return [t[tensor] for t in self._float], [t[tensor] for t in self._quantized]

    def known(self, tensor: str) -> tuple[list[Array], list[Array]] | None:
        """A tensor of each sample, (float, quantized), if it is kept between groups just now."""
        if any(tensor not in t for t in (*self._float, *self._quantized)):
            return None
        return [t[tensor] for t in self._float], [t[tensor] for t in self._quantized]

    def _advance(self, segment: Segment) -> None:
        own = {self._proto.graph.node[i].name for i in segment.nodes}
        replaced = {name: r for name, r in self._replaced.items() if name in own}
        same = not replaced and all(
            quantized[name] is exact[name]
            for exact, quantized in zip(self._float, self._quantized, strict=True)
            for name in segment.inputs
        )
        self._step(segment, self._float, {})
        if not same:
            self._step(segment, self._quantized, replaced)
            return
        for exact, quantized in zip(self._float, self._quantized, strict=True):
            quantized.update({name: exact[name] for name in segment.outputs})
            _drop(quantized, segment.live)

    def _step(
        self, segment: Segment, samples: list[Tensors], replaced: Mapping[str, Replacement]
    ) -> None:
        if segment.outputs:
            inputs = {name: samples[0][name] for name in segment.inputs}
            session = open_part(
                self._proto,
                segment.nodes,
                inputs,
                segment.outputs,
                replaced=replaced,
                threads=self._threads,
            )
            for tensors in samples:
                feed = {name: tensors[name] for name in segment.inputs}
                tensors.update(run_part(session, feed, segment.outputs))
                _drop(tensors, segment.live)
        for tensors in samples:
            _drop(tensors, segment.live)


def _drop(tensors: Tensors, live: frozenset[str]) -> None:
    for name in set(tensors) - live:
        del tensors[name]


def run_part(session: ort.InferenceSession, feed: Tensors, outputs: Sequence[str]) -> Tensors:
    """The outputs of a part, by name.

    Raises:
        CalibrationError: the run fails, or a value is no tensor.
    """
    try:
        found = run(session, feed)
    except ValidationError as error:
        raise CalibrationError(f"calibration: {error}; check the samples") from None
    for name, value in zip(outputs, found, strict=True):
        if not isinstance(value, np.ndarray):
            raise CalibrationError(
                f"calibration: {name!r} is no tensor, and cannot be kept between nodes: leave the "
                "nodes behind it out with --exclude"
            )
    return dict(zip(outputs, found, strict=True))


def open_part(
    proto: ModelProto,
    positions: Sequence[int],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    replaced: Mapping[str, Replacement] | None = None,
    threads: int | None = None,
) -> ort.InferenceSession:
    """A part of the model, from some of its tensors to others.

    Args:
        proto: the model.
        positions: of the nodes of the part, those that compute its constants included.
        inputs: examples of the tensors it may read.
        outputs: what it gives, in this order.
        replaced: what nodes have become, by name.
        threads: of onnxruntime; its default if not given.

    Raises:
        CalibrationError: it is too large, or onnxruntime cannot load it.
    """
    part = ModelProto(ir_version=proto.ir_version)
    part.opset_import.extend(proto.opset_import)
    part.functions.extend(proto.functions)
    part.graph.name = "segment"
    for i in positions:
        node = proto.graph.node[i]
        replacement = (replaced or {}).get(node.name)
        if replacement is None:
            part.graph.node.append(node)
        else:
            _put_replaced(part.graph, node, replacement)
    read = {name for node in part.graph.node for name in reads(node)}
    part.graph.initializer.extend(t for t in proto.graph.initializer if t.name in read)
    part.graph.sparse_initializer.extend(proto.graph.sparse_initializer)
    for name, array in inputs.items():
        if name in read or name in outputs:
            kind = np_dtype_to_tensor_dtype(array.dtype)
            part.graph.input.append(make_tensor_value_info(name, kind, None))
    # onnxruntime infers the types of outputs
    part.graph.output.extend(ValueInfoProto(name=name) for name in outputs)
    try:
        content = part.SerializeToString()
    except Exception as error:  # protobuf's EncodeError, which has no typed home
        raise CalibrationError(
            "calibration: a part of the model passes protobuf's 2 GiB: quantize it without "
            "calibration data"
        ) from error
    try:
        return open_session(content, threads=threads)
    except ValidationError as error:
        raise CalibrationError(f"calibration: a part of the model: {error}") from None


def _put_replaced(graph: GraphProto, node: NodeProto, replacement: Replacement) -> None:
    name = f"{node.name}/onnxq/weight"
    graph.initializer.append(numpy_helper.from_array(replacement.weight, name))
    changed = NodeProto()
    changed.CopyFrom(node)
    changed.input[replacement.slot] = name
    graph.node.append(changed)
    if replacement.shift is not None:
        product, shift = f"{node.name}/onnxq/product", f"{node.name}/onnxq/shift"
        graph.initializer.append(numpy_helper.from_array(replacement.shift, shift))
        changed.output[0] = product
        graph.node[-1].output[0] = product
        graph.node.append(make_node("Add", [product, shift], [node.output[0]]))
