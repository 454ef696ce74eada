"""The model as passes and the pipeline see it, and what they may ask about its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from onnx import ModelProto
from onnx_graphsurgeon.ir.graph import Graph
from onnx_graphsurgeon.ir.tensor import Constant

from onnxq.model.dtypes import Array
from onnxq.model.stored import read


@dataclass(frozen=True)
class Source:
    """What the file said beyond its graph, and the data files that are still being read."""

    proto: ModelProto
    file: Path | None = None  # absolute, so that a change of the working folder does not matter
    data_files: frozenset[Path] = frozenset()


@dataclass
class Model:
    """A model in memory.

    `graph` is a `gs.Graph`, edited in place by passes. `overridable` holds the names of the
    initializers that are graph inputs too, so that a caller of the model may replace them. Discard
    a name from this set to freeze that initializer: it is constant from then on, and saved as a
    plain initializer. Change the set, do not put another in its place.
    """

    graph: Any
    path: Path | None
    overridable: set[str]
    source: Source = field(repr=False)

    @cached_property
    def all_graphs(self) -> list[Any]:
        """The main graph and all bodies, found once: passes do not add or remove any."""
        return [graph for _, graph in graphs(self)]

    @property
    def opset(self) -> int:
        """Version of the default operator domain."""
        return int(self.graph.opset)

    @property
    def ir_version(self) -> int:
        """IR version of the file format."""
        return int(self.graph.ir_version)


def graphs(model: Model) -> Iterator[tuple[str, Any]]:
    """The main graph with path `""`, then the bodies of If, Loop and Scan, each with its path.

    A path reads like `If_3/then_branch`; a body inside a body continues its outer path. A node
    without a name is called by its operator and its position.
    """
    yield "", model.graph
    yield from _bodies(model.graph, "")


def _bodies(graph: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for index, node in enumerate(list(graph.nodes)):
        for name, value in list(node.attrs.items()):
            if isinstance(value, Graph):
                path = f"{prefix}{node.name or f'{node.op}_{index}'}/{name}"
                yield path, value
                yield from _bodies(value, f"{path}/")


def is_constant(tensor: Any) -> bool:
    """True for a `gs.Constant` whose value nobody can replace when the model runs."""
    if not isinstance(tensor, Constant):
        return False
    replaceable = getattr(tensor._values, "overridable", None)
    return replaceable is None or replaceable[1] not in replaceable[0]


def is_initializer(tensor: Any) -> bool:
    """True for a `gs.Constant`, also one that can be overridden when the model runs."""
    return isinstance(tensor, Constant)


def values(constant: Any) -> Array:
    """Read-only values of a `gs.Constant`, memory-mapped where they are in an external file.

    Integers below one byte come as int8 or uint8, all other types as they are (bfloat16 and float8
    as ml_dtypes). Nothing is cached, and the constant is exported as before.

    Raises:
        ModelError: the data are damaged.

    """
    return read(constant._values)


def get_metadata(node: Any) -> dict[str, str]:
    """The metadata of a `gs.Node`: what the file has, and what passes have set. A copy."""
    return dict(vars(node).get("metadata") or {})


def set_metadata(node: Any, entries: Mapping[str, str] | None = None, **more: str) -> None:
    """Add entries to a node's metadata; they are exported as its `metadata_props`."""
    node.metadata = {**get_metadata(node), **(entries or {}), **more}
