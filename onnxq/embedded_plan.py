"""The plan inside the file that it made, so that the file can be extended later."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from onnxq.errors import ModelError
from onnxq.model import Model, get_properties, set_properties
from onnxq.plan import Plan

KEY = "onnxq.plan"
# What is each node's own; the settings that most nodes share are written once.
_OWN = ("name", "op_type", "weight", "shape", "crc32")
_UNUSED = {"reason", "note"}
_PARTS = ("equalized", "corrected", "partial", "common", "nodes")


@dataclass(frozen=True)
class EmbeddedPlan:
    """What a file says of its making.

    Attributes:
        plan: the nodes that are quantized, and ranges; without scales, which are in the graph.
        equalized: whether channels were equalized before planning.
        corrected: the nodes whose bias holds what planning added to it.
        partial: the nodes with terms that cover a part of the weight, or with an offset.
    """

    plan: Plan
    equalized: bool = False
    corrected: frozenset[str] = frozenset()
    partial: frozenset[str] = frozenset()


def embed_plan(model: Model, plan: Plan, *, equalized: bool = False) -> None:
    """Write a plan into the metadata of the model that it made.

    Arrays are left out: integers and scales are in the model.
    """
    partial = {n.name for n in plan.quantized if n.centre or n.offset} | plan.points.keys()
    made = EmbeddedPlan(plan, equalized, frozenset(plan.bias), frozenset(partial))
    write_embedded(model, made)


def write_embedded(model: Model, embedded: EmbeddedPlan) -> None:
    """Write what a file says of its making into its metadata, as compact JSON."""
    plan = embedded.plan
    nodes = [node.model_dump(mode="json", exclude=_UNUSED) for node in plan.quantized]
    common = _common(nodes)
    document = {
        "format_version": plan.format_version,
        "equalized": embedded.equalized,
        "corrected": _indices(plan, embedded.corrected),
        "partial": _indices(plan, embedded.partial),
        "common": common,
        "nodes": [
            {key: value for key, value in node.items() if key in _OWN or value != common[key]}
            for node in nodes
        ],
        "ranges": plan.ranges,
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    set_properties(model, {KEY: text})


def _indices(plan: Plan, names: frozenset[str]) -> list[int]:
    return [i for i, node in enumerate(plan.quantized) if node.name in names]


def _common(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """The most frequent value of each setting."""
    keys = [key for key in (nodes[0] if nodes else {}) if key not in _OWN]
    most = {key: Counter(json.dumps(n[key]) for n in nodes).most_common(1)[0][0] for key in keys}
    return {key: json.loads(text) for key, text in most.items()}


def embedded_plan(model: Model) -> EmbeddedPlan | None:
    """The plan that a model holds, or None.

    Raises:
        ModelError: it is damaged, or from another version of onnxq.
    """
    text = get_properties(model).get(KEY)
    if text is None:
        return None
    try:
        document = json.loads(text)
        equalized, corrected, partial, common, nodes = map(document.pop, _PARTS)
        nodes = [{**common, **node} for node in nodes]
        plan = Plan.model_validate({**document, "nodes": nodes})
        marked = [frozenset(plan.nodes[i].name for i in each) for each in (corrected, partial)]
    except (ValueError, LookupError, TypeError, AttributeError, ValidationError):
        where = model.path or "model in memory"
        raise ModelError(
            f"{where}: the plan in its metadata ({KEY}) is damaged, or of another version of "
            "onnxq: quantize the float model again"
        ) from None
    return EmbeddedPlan(plan, bool(equalized), *marked)
