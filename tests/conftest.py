"""What holds for every test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache() -> Iterator[None]:
    """No test writes what it measures into the user's cache, nor reads it from there."""
    before = os.environ.get("ONNXQ_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ONNXQ_CACHE"] = folder
        yield
    if before is None:
        del os.environ["ONNXQ_CACHE"]
    else:
        os.environ["ONNXQ_CACHE"] = before
