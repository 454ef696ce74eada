"""Candidates for a plan whose nodes are some in float compute and some in integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from onnxq.candidates import Candidate
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan


@dataclass(frozen=True)
class _OnlyFor(Candidate):
    """A candidate that pays in one kind of compute alone.

    Attributes:
        floats: whether that is float compute.
    """

    floats: bool = True

    def apply(self, entry: NodePlan, weight: Weight) -> NodePlan | None:
        """The entry with this change, or None where the node cannot or should not have it."""
        if (entry.activations == "none") != self.floats:
            return None
        return super().apply(entry, weight)


def mixed(floats: Sequence[Candidate], integers: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Both sets in one: each node may have those of its own kind of compute.

    Args:
        floats: for nodes in float compute.
        integers: for those in integer compute.
    """
    found = [one if one in integers else _only(one, floats=True) for one in floats]
    found += [_only(one, floats=False) for one in integers if one not in floats]
    return tuple(sorted(found, key=lambda one: not one.quantized))  # what is left in float: last


def _only(one: Candidate, *, floats: bool) -> Candidate:
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(Candidate)}
    return _OnlyFor(**fields, floats=floats)
