"""Being written."""

from __future__ import annotations

from onnxq.passes.site import Site


def lower_nbits(site: Site) -> None:
    """Being written."""
    raise NotImplementedError
