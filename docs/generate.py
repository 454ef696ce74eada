"""Writes docs/passes.md from the docstrings of the passes: python docs/generate.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from onnxq.passes import PIPELINE, Expand, SearchScales, SelectNodes

TARGET = Path(__file__).with_name("passes.md")


def render() -> str:
    """The text of docs/passes.md."""
    parts = [
        "# Passes",
        "",
        "Generated from the docstrings by `python docs/generate.py`.",
        "",
        "## Exact float folds, in the order they run",
        "",
    ]
    for pass_ in PIPELINE:
        parts += _section(type(pass_))
    parts += ["## Planning and expansion", ""]
    for kind in (SelectNodes, SearchScales, Expand):
        parts += _section(kind)
    return "\n".join(parts).rstrip() + "\n"


def _section(kind: type) -> list[str]:
    doc = inspect.cleandoc(kind.__doc__ or "")
    text, _, rule = doc.partition("Given:")
    return [f"### {kind.__name__}", "", text.strip(), "", "```", f"Given:{rule}".strip(), "```", ""]


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")
