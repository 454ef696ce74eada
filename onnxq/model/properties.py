"""What a model says of itself as a whole: its `metadata_props`."""

from __future__ import annotations

from collections.abc import Mapping

from onnxq.model.types import Model


def get_properties(model: Model) -> dict[str, str]:
    """The model's metadata by key. A copy."""
    return {entry.key: entry.value for entry in model.source.proto.metadata_props}


def set_properties(model: Model, entries: Mapping[str, str]) -> None:
    """Set entries of the model's metadata, and leave the others as they are."""
    props = model.source.proto.metadata_props
    known = {entry.key: entry for entry in props}
    for key, value in entries.items():
        entry = known[key] if key in known else props.add(key=key)
        entry.value = value
