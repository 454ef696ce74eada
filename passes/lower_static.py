"""Being written."""

from __future__ import annotations

from collections.abc import Mapping

from onnxq.passes.site import Site
from onnxq.plan import Range


def lower_static(site: Site, ranges: Mapping[str, Range]) -> None:
    """Being written."""
    raise NotImplementedError
