"""What a pass is: a frozen dataclass that rewrites the graphs of a model in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from onnxq.model import Model


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the names of the nodes it rewrote, and why it left candidates alone."""

    rewritten: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return bool(self.rewritten)


class GraphPass(Protocol):
    """A graph rewrite; its options are its fields, so that a pass is a value.

    It takes the model rather than one graph, because names must stay unique across the bodies of
    If / Loop / Scan, and whether an initializer may be edited is known to the model alone.
    """

    def __call__(self, model: Model) -> PassResult:
        """Rewrite `model` in place."""
        ...
