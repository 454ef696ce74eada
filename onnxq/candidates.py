"""What may be done to a node, to choose from: settings of its plan, with their cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import ValidationError as Invalid

from onnxq.model import Model
from onnxq.passes.plan_points import point_bytes
from onnxq.passes.search_scales import match_plan
from onnxq.passes.select_nodes import default_series
from onnxq.passes.stored_scales import expected_scale_bits
from onnxq.passes.stored_terms import stored_bits
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan

FLOAT_BYTES = 4
# What a term takes in the file beside its numbers: names, a Cast, a Mul, constants' headers. It
# depends on the lengths of names; what it really is, is found by writing small models.
TERM_OVERHEAD = 300
POINTS_OVERHEAD = 850  # the same, of a term that covers some channels
_READING = frozenset({"activation_bits", "activation_terms"})


@dataclass(frozen=True)
class Candidate:
    """A change of a node's plan.

    Attributes:
        name: what reports call it.
        change: fields of NodePlan and their values. `bits` and `terms` alone leave the kind of
            series to the number of terms; an empty change with `quantized` False leaves the node
            in float.
        columns: how many outlier columns of the activation may be multiplied in float. Which ones,
            the entry says; without the node has none.
        share: of the output channels, that have the terms behind the first; which ones, `Costs`
            finds. In merged float compute, where they take no time.
    """

    name: str
    change: Mapping[str, Any] = field(default_factory=dict)
    quantized: bool = True
    columns: int = 0
    share: float = 1.0

    @property
    def reads(self) -> bool:
        """Whether the node's activation is changed, too."""
        return self.columns > 0 or not _READING.isdisjoint(self.change)

    def apply(self, entry: NodePlan, weight: Weight) -> NodePlan | None:
        """The entry with this change, or None where the node cannot have it."""
        if not self.quantized:
            return entry.model_copy(update={"reason": "left in float: its error costs the most"})
        if self.reads and entry.activations != "dynamic":
            return None
        if self.columns and not entry.outliers:
            return None
        if self.share < 1 and not self._can_have_points(entry, weight):
            return None
        changed = dict(self.change)
        changed["outliers"] = entry.outliers if self.columns else ()
        if "series" not in changed and entry.series != "joint":
            changed["series"] = default_series(int(changed.get("terms", entry.terms)))
        block = changed.get("block_size", entry.block_size)
        changed["granularity"] = "per_block" if block else _coarse(entry)
        changed["block_size"] = block
        if block and block >= weight.size // weight.out:
            return None  # a block as long as a row is one scale per channel
        try:
            return NodePlan.model_validate({**entry.model_dump(), **changed})
        except Invalid:
            return None

    def further(self, weight: Weight) -> int:
        """How many output channels have the terms behind the first."""
        return round(self.share * weight.out)

    def _can_have_points(self, entry: NodePlan, weight: Weight) -> bool:
        merged = entry.activations == "none" and entry.layout == "merged"
        return merged and entry.form == "folded" and 0 < self.further(weight) < weight.out


def bits(number: int, *, terms: int = 1, block_size: int | None = None) -> Candidate:
    """Terms of so many bits, one scale per output channel or per block."""
    name = f"{number}x{terms}" + (f"/{block_size}" if block_size else "")
    return Candidate(name, {"bits": number, "terms": terms, "block_size": block_size})


def reading(candidate: Candidate, number: int, terms: int) -> Candidate:
    """The candidate with so many terms of so many bits of the activation, in dynamic compute."""
    return replace(
        candidate,
        name=f"{candidate.name}·{number}x{terms}",
        change={**candidate.change, "activation_bits": number, "activation_terms": terms},
    )


def with_columns(candidate: Candidate, most: int) -> Candidate:
    """The candidate with at most so many outlier columns of the activation in float."""
    return replace(candidate, name=f"{candidate.name}+columns", columns=most)


def with_points(candidate: Candidate, part: int) -> Candidate:
    """The candidate with its further terms for one output channel in `part` alone (multipoint)."""
    return replace(candidate, name=f"{candidate.name}@1/{part}", share=1 / part)


LEFT_IN_FLOAT = Candidate("float", quantized=False)

# Each takes the bits that it has, but in small weights, whose 2 and 3 bits are stored as 4, 5 to 7
# as 8. Two terms of four bits take the space of one of eight, which is more exact. Blocks, with a
# scale of 16 bits for 64, 32 or 16 weights, lie between one width and the next.
EFFICIENT: tuple[Candidate, ...] = (
    bits(2, block_size=32),
    bits(3),
    bits(3, block_size=32),
    bits(4),
    bits(4, block_size=64),
    bits(4, block_size=32),
    bits(4, block_size=16),
    bits(5),
    bits(5, block_size=32),
    bits(6),
    bits(7),
    bits(8),
    bits(4, terms=3),
    bits(8, terms=2),
    LEFT_IN_FLOAT,
)


# Further terms for some channels (`--points auto`): they lie between widths, but hardly ever below
# the line from one to the next; see docs/budgets.md.
WITH_POINTS: tuple[Candidate, ...] = (
    with_points(bits(4, terms=2), 8),
    with_points(bits(4, terms=2), 4),
    with_points(bits(5, terms=2), 16),
    with_points(bits(6, terms=2), 16),
    with_points(bits(6, terms=2), 8),
)


# Integer compute takes a product per term, so that three terms of 4 bits, though smaller, are
# slower than two of 8; and it has no blocks.
_BY_WIDTH = tuple(bits(number) for number in range(3, 9))
INTEGER: tuple[Candidate, ...] = (*_BY_WIDTH, bits(8, terms=2), LEFT_IN_FLOAT)


def integer(
    *, columns: int = 0, terms: bool = False, narrow: bool = False
) -> tuple[Candidate, ...]:
    """`INTEGER`, and more for nodes that need it.

    Args:
        columns: outlier columns of a MatMul's input that may be multiplied in float, at most.
        terms: also with a second term of the activation. It takes next to no bytes, so that
            latency must count for something. Of 7 bits where the weight's error is larger anyway:
            on x86 without VNNI that is faster (forms.py).
        narrow: also with two terms of 7 bits, which are faster there.
    """
    weights = [*_BY_WIDTH, bits(8, terms=2)]
    if narrow:
        weights.append(bits(7, terms=2))
    read: list[Candidate] = []
    if columns:
        read += [with_columns(one, columns) for one in weights]
    if terms:
        two = bits(7 if narrow else 8, terms=2)
        read += [reading(bits(8), 7, 2), reading(two, 7, 2), reading(bits(8, terms=2), 8, 2)]
    return (*weights, *read, LEFT_IN_FLOAT)


@dataclass(frozen=True, eq=False)
class Unit:
    """What must be decided as one: the entries whose nodes read the same weight in the same way."""

    entries: tuple[NodePlan, ...]
    weight: Weight

    @property
    def name(self) -> str:
        """The first entry's."""
        return self.entries[0].name

    def apply(self, candidate: Candidate) -> tuple[NodePlan, ...] | None:
        """The entries changed, or None if one of them cannot be."""
        changed = [candidate.apply(entry, self.weight) for entry in self.entries]
        return None if None in changed else tuple(entry for entry in changed if entry is not None)


def units(model: Model, plan: Plan) -> list[Unit]:
    """The planned nodes, in graph order, those with a common weight together."""
    found: dict[tuple[object, ...], list[tuple[NodePlan, Weight]]] = {}
    for entry, (_, weight) in match_plan(model, plan):
        key = (id(weight.tensor), weight.split, weight.out_axes)
        found.setdefault(key, []).append((entry, weight))
    return [Unit(tuple(e for e, _ in group), group[0][1]) for group in found.values()]


def stored_bytes(entry: NodePlan, weight: Weight) -> int:
    """What an entry's weight takes in the file: packed integers, scales and their nodes."""
    if not entry.quantized:
        return FLOAT_BYTES * weight.size
    rows, length = weight.out, weight.size // weight.out
    scales = 1 if entry.granularity == "per_tensor" else rows
    if entry.block_size:
        block = min(entry.block_size, length)
        blocks = -(-length // block)
        scales, length = rows * blocks, blocks * block
    integers = -(-rows * length * stored_bits(entry, rows * length) // 8)
    return entry.terms * (integers + TERM_OVERHEAD) + expected_scale_bits(entry, scales) // 8


def partial_bytes(entry: NodePlan, weight: Weight, channels: int) -> float:
    """The same where only so many output channels have the terms behind the first."""
    first = stored_bytes(entry.model_copy(update={"terms": 1}), weight)
    more = channels * point_bytes(weight, entry, channels) + POINTS_OVERHEAD
    return first + (entry.terms - 1) * more


def products(entry: NodePlan, weight: Weight) -> int:
    """Multiplications per place at which the weight is applied; integer ones count a quarter.

    Merged or stored for float compute, any number of terms is one product. Outlier columns are a
    float product of their own.
    """
    if not entry.quantized or entry.activations == "none":
        parallel = entry.quantized and entry.layout == "parallel"
        return 4 * weight.size * (entry.terms if parallel else 1)
    terms = 1 if entry.layout == "merged" else entry.terms
    if entry.products == "all":
        count = terms * entry.activation_terms
    elif entry.products == "triangular":
        most = max(terms, entry.activation_terms) + 1
        pairs = np.add.outer(np.arange(1, terms + 1), np.arange(1, entry.activation_terms + 1))
        count = int(np.sum(pairs <= most))
    else:
        count = min(entry.products, terms * entry.activation_terms)
    return weight.size * count + 4 * len(entry.outliers) * weight.out


def applicable(unit: Unit, candidates: Sequence[Candidate]) -> Iterator[tuple[int, Any]]:
    """The candidates that the unit can have: (index, changed entries)."""
    for index, candidate in enumerate(candidates):
        entries = unit.apply(candidate)
        if entries is not None:
            yield index, entries


def _coarse(entry: NodePlan) -> str:
    return "per_channel" if entry.granularity == "per_block" else entry.granularity
