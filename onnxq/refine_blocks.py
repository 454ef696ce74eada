"""Across-block calibration: planned numbers judged where their block and their stage end.

What is best at a node's own output is not always best behind the activations, additions and nodes
that follow it. Numbers are tried one node after the other, by running that part of the model in
onnxruntime, and judged by MAE(block end) + λ·MAE(stage end) (RepAPQ, arXiv 2402.16121, whose
gradients are here a search over few candidates). A change stays only if samples that had no part
in choosing it agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from onnxq.errors import CalibrationError
from onnxq.feeds import Feed, spread
from onnxq.frontier import Replacement, Tensors, open_part, run_part, with_constants
from onnxq.model import Model, to_proto
from onnxq.passes.block_moves import Move, moves, own_bias
from onnxq.passes.find_blocks import Block, Stage, find_blocks
from onnxq.passes.node_rows import NodeRows
from onnxq.passes.node_samples import HELD_OUT_EVERY, Numbers
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]
Effort = Literal["fast", "normal", "high"]

# How often every node is gone through. It costs more than it brings on most models: high alone.
ROUNDS: Mapping[Effort, int] = {"fast": 0, "normal": 0, "high": 3}
STAGE_WEIGHT = 1.0
# A change has to bring this share of the error, on either part of the samples.
SMALLEST_GAIN = 1e-4
MOST_SAMPLES = 64
BUDGET_BYTES = 1 << 30
# Of every sample: float, float at the end of the stage, quantized, and what is tried.
_VARIANTS = 4


@dataclass(frozen=True, eq=False)
class _Site:
    entry: NodePlan
    weight: Weight
    rows: NodeRows

    def replacement(self, numbers: Numbers) -> Replacement:
        matrix = np.asarray(numbers.series.dequantize(), np.float32)
        shift = self.rows.spread(numbers.bias.astype(np.float32)) if numbers.bias.any() else None
        stored = self.weight.from_matrix(matrix).reshape(self.weight.shape)
        return Replacement(self.weight.slot, stored, shift)


def refine_blocks(
    model: Model,
    plan: Plan,
    samples: Sequence[Feed],
    *,
    effort: Effort = "high",
    stage_weight: float = STAGE_WEIGHT,
    budget_bytes: int = BUDGET_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with scales and biases that make the ends of blocks and stages right.

    Args:
        model: the canonical model; only read.
        plan: as `calibrate_weights` returns it; nodes without integers are left alone.
        samples: feeds for `model`, of which at most 64 are used, every fourth one to judge alone.
        effort: how many rounds over the nodes of every block: at most 3 with high, else
            none; nothing else limits
            the time: the result is the same on every machine.
        stage_weight: λ.
        budget_bytes: for the tensors between blocks, of all samples in four variants; of too many
            samples evenly spread ones are taken, at least 4.
        threads: of onnxruntime; its default if not given.
        progress: called with (what, done, total).

    Returns:
        A new plan, and notes for the user. After Ctrl-C the plan holds the changes until then.

    Raises:
        CalibrationError: the model fails on a sample, or `stage_weight` is negative.
        ConfigError: the plan was made for another model.
        ModelError: the model is larger than 2 GiB.
    """
    if not (np.isfinite(stage_weight) and stage_weight >= 0):
        raise CalibrationError(f"stage_weight is {stage_weight}; give a number >= 0")
    copies = {key: dict(getattr(plan, key)) for key in ("scales", "integers", "bias", "offsets")}
    made = plan.model_copy(update=copies)
    rounds, feeds = ROUNDS[effort], spread(samples, MOST_SAMPLES)
    if rounds == 0 or len(feeds) < HELD_OUT_EVERY:
        reason = "" if rounds == 0 else "refining blocks needs 4 samples or more"
        return made, (reason,) if reason else ()
    search = _Search(
        to_proto(model),
        made,
        rounds,
        stage_weight=stage_weight,
        budget_bytes=budget_bytes,
        threads=threads,
        progress=progress or _silent,
    )
    for entry, (candidate, weight) in match_plan(model, made):
        rows = NodeRows.of(candidate.node, weight)
        if isinstance(rows, NodeRows) and not candidate.inner and entry.name in made.integers:
            search.add(_Site(entry, weight, rows))
    return made, search.run(feeds)


@dataclass(eq=False)
class _Search:
    """Goes from stage to stage; before each of them, its inputs of all samples are at hand."""

    proto: ModelProto
    plan: Plan
    rounds: int
    stage_weight: float
    budget_bytes: int
    threads: int | None
    progress: Progress
    sites: dict[str, _Site] = field(default_factory=dict)
    numbers: dict[str, Numbers] = field(default_factory=dict)
    _kept: int = 0

    def add(self, site: _Site) -> None:
        """Take a planned node in."""
        name = site.entry.name
        bias = self.plan.bias.get(name, np.zeros(site.weight.out, np.float32))
        series = node_series(site.weight, site.entry, self.plan)
        self.sites[name] = site
        self.numbers[name] = Numbers(series, bias.astype(np.float64))

    def run(self, feeds: Sequence[Feed]) -> tuple[str, ...]:
        """Refine all stages; a sentence on what was found."""
        stages, most_bytes = self._stages(feeds[0])
        fit = max(HELD_OUT_EVERY, self.budget_bytes // max(_VARIANTS * most_bytes, 1))
        notes: tuple[str, ...] = ()
        if fit < len(feeds):
            bound = f"memory bound {self.budget_bytes / 2**30:.1f} GiB"
            notes = (f"refining blocks: {fit} of {len(feeds)} samples, {bound}",)
            feeds = spread(feeds, fit)
        total = sum(len(self._planned(block)) for stage in stages for block in stage.blocks)
        exact = [{name: np.asarray(array) for name, array in feed.items()} for feed in feeds]
        quantized = [dict(tensors) for tensors in exact]
        done, tried = 0, 0
        self.progress("refining", 0, total)
        try:
            for stage in stages:
                wanted = [dict(tensors) for tensors in exact]
                for block in stage.blocks:
                    self._advance(block, wanted, {})
                for at, block in enumerate(stage.blocks):
                    self._advance(block, exact, {})
                    part = _Part(
                        self,
                        block,
                        stage.blocks[at + 1 :],
                        exact=exact,
                        wanted=wanted,
                        quantized=quantized,
                    )
                    for name in part.planned:
                        done += 1
                        tried += part.refine(name, self.rounds)
                        self.progress("refining", done, total)
                    self._advance(block, quantized, self._replacements(block))
        except KeyboardInterrupt:
            return (*notes, f"refining blocks: interrupted after {done} of {total} nodes")
        return (*notes, f"refining blocks: {self._kept} of {tried} changes kept")

    def keep(self, name: str, numbers: Numbers) -> None:
        """Let a node have these numbers."""
        self.numbers[name] = numbers
        self.plan.scales[name] = numbers.scales
        if numbers.series.offset is not None:
            self.plan.offsets[name] = numbers.series.offset
        if numbers.bias.any():
            self.plan.bias[name] = numbers.bias.astype(np.float32)
        self._kept += 1

    def _planned(self, block: Block) -> list[str]:
        names = [self.proto.graph.node[i].name for i in block.nodes]
        return [name for name in names if name in self.sites]

    def _replacements(self, *blocks: Block) -> dict[str, Replacement]:
        names = [name for block in blocks for name in self._planned(block)]
        return {name: self.sites[name].replacement(self.numbers[name]) for name in names}

    def _advance(
        self, block: Block, tensors: list[Tensors], replaced: Mapping[str, Replacement]
    ) -> None:
        """Run a block for every sample, and keep its outputs in place of its inputs."""
        session = self.open([block], tensors[0], block.outputs, replaced)
        for i, before in enumerate(tensors):
            tensors[i] = self.outputs(session, before, block.outputs)

    def open(
        self,
        blocks: Iterable[Block],
        example: Tensors,
        outputs: Sequence[str],
        replaced: Mapping[str, Replacement],
    ) -> Any:
        """A session of some blocks, or None where nothing has to be computed."""
        positions = [i for block in blocks for i in block.nodes]
        if not set(outputs) - set(example):
            return None
        computed = [name for name in outputs if name not in example]
        nodes = with_constants(self.proto.graph, positions)
        return open_part(
            self.proto, nodes, example, computed, replaced=replaced, threads=self.threads
        )

    @staticmethod
    def outputs(session: Any, before: Tensors, outputs: Sequence[str]) -> Tensors:
        """What a session of `open` makes of one sample, and what it need not compute."""
        found = {name: before[name] for name in outputs if name in before}
        if session is not None:
            feed = {value.name: before[value.name] for value in session.get_inputs()}
            computed = [name for name in outputs if name not in before]
            found |= run_part(session, feed, computed)
        return found

    def _stages(self, feed: Feed) -> tuple[list[Stage], int]:
        """The stages, and the most bytes that lie between two blocks of this sample."""
        graph, chosen = self.proto.graph, set(self.sites)
        blocks = [b for stage in find_blocks(graph, chosen, {}) for b in stage.blocks]
        tensors: list[Tensors] = [{name: np.asarray(array) for name, array in feed.items()}]
        sizes: dict[str, tuple[int, ...]] = {}
        most_bytes = 0
        for block in blocks:
            self._advance(block, tensors, {})
            sizes |= {name: array.shape for name, array in tensors[0].items()}
            most_bytes = max(most_bytes, sum(array.nbytes for array in tensors[0].values()))
        return find_blocks(graph, chosen, sizes), most_bytes


class _Part:
    """One block and the rest of its stage."""

    def __init__(
        self,
        search: _Search,
        block: Block,
        rest: Sequence[Block],
        *,
        exact: list[Tensors],
        wanted: list[Tensors],
        quantized: list[Tensors],
    ) -> None:
        self._search, self._block, self._rest = search, block, rest
        self._exact, self._wanted, self._quantized = exact, wanted, quantized
        self.planned = search._planned(block)
        self._replaced = search._replacements(block)
        held = range(HELD_OUT_EVERY - 1, len(exact), HELD_OUT_EVERY)
        self._held, self._fit = held, [i for i in range(len(exact)) if i not in held]
        self._rest_session: Any = None
        self._ends: list[Tensors] = []
        self._errors = self._judge({}) if self.planned else np.zeros(len(exact))

    def refine(self, name: str, rounds: int) -> int:
        """Search for better numbers of one node; returns how many were tried."""
        tried, site = 0, self._search.sites[name]
        for _ in range(rounds):
            kept = False
            for move in moves(self._channels(name), own_bias(site.rows.node)):
                tried += 1
                kept |= self._try(name, move)
            if not kept:
                break
        return tried

    def _try(self, name: str, move: Move) -> bool:
        search, site = self._search, self._search.sites[name]
        numbers = move(search.numbers[name])
        before, ends = self._errors, self._ends
        errors = self._judge({name: site.replacement(numbers)})
        parts = (self._fit, self._held)
        limit = 1 - SMALLEST_GAIN
        if all(errors[part].mean() < limit * before[part].mean() for part in parts):
            search.keep(name, numbers)
            self._replaced[name], self._errors = site.replacement(numbers), errors
            return True
        self._ends = ends
        return False

    def _channels(self, name: str) -> tuple[Array, Array] | None:
        """(found, wanted) at the end of the block, [n, out], where they may be the node's own."""
        site, (output, *others) = self._search.sites[name], self._block.outputs
        out, shape = site.weight.out, self._exact[0][output].shape
        axis = 1 if site.rows.node.op == "Conv" else len(shape) - 1
        if others or len(shape) < 2 or shape[axis] != out or name != self.planned[-1]:
            return None
        found, wanted = (
            np.concatenate(
                [np.moveaxis(t[i][output], axis, -1).reshape(-1, out) for i in self._fit]
            )
            for t in (self._ends, self._exact)
        )
        return found, wanted

    def _judge(self, changed: Mapping[str, Replacement]) -> Array:
        """The error per sample, if some nodes had other numbers."""
        search, block = self._search, self._block
        replaced = {**self._replaced, **changed}
        session = search.open([block], self._quantized[0], block.outputs, replaced)
        errors, self._ends = np.empty(len(self._exact)), []
        for i, before in enumerate(self._quantized):
            ends = search.outputs(session, before, block.outputs)
            self._ends.append(ends)
            errors[i] = _error(ends, self._exact[i])
            if self._rest and search.stage_weight:
                errors[i] += search.stage_weight * _error(self._stage_end(ends), self._wanted[i])
        return errors

    def _stage_end(self, ends: Tensors) -> Tensors:
        outputs, search = self._rest[-1].outputs, self._search
        if self._rest_session is None:
            replaced = search._replacements(*self._rest)
            self._rest_session = search.open(self._rest, ends, outputs, replaced)
        return search.outputs(self._rest_session, ends, outputs)


def _error(found: Tensors, wanted: Tensors) -> float:
    """Mean absolute error as a share of the mean absolute value, summed over the tensors."""
    total = 0.0
    for name, array in wanted.items():
        if name in found and array.dtype.kind == "f" and array.size:
            size = float(np.abs(array).mean(dtype=np.float64))
            off = float(np.abs(found[name] - array).mean(dtype=np.float64))
            total += off / max(size, float(np.finfo(np.float32).tiny))
    return total


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""
