"""Writes the pages that repeat what the code says: python docs/generate.py

passes.md  from the docstrings of the passes
forms.md   from the tables of forms and of what integers gain (passes/forms.py, passes/gains.py)
"""

from __future__ import annotations

import inspect
from pathlib import Path

from onnxq import passes
from onnxq.passes import PIPELINE
from onnxq.passes.forms import FORMS
from onnxq.passes.gains import GAINS

FOLDER = Path(__file__).parent
ON_DEMAND = (passes.Equalize, passes.SplitHardSwish)
PLANNING = (
    passes.SelectNodes,
    passes.SearchScales,
    passes.SelectTensors,
    passes.SearchRanges,
    passes.FitPairs,
    passes.FitBias,
)
EXPANSION = (passes.Expand, passes.InsertQDQ)


def pages() -> dict[str, str]:
    """The text of each generated page, by file name."""
    return {"passes.md": render_passes(), "forms.md": render_forms()}


def render_passes() -> str:
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
    for title, kinds in (
        ("Exact rewrites on demand", ON_DEMAND),
        ("Planning: the graph is only read", PLANNING),
        ("Expansion", EXPANSION),
    ):
        parts += [f"## {title}", ""]
        for kind in kinds:
            parts += _section(kind)
    return "\n".join(parts).rstrip() + "\n"


def render_forms() -> str:
    """The text of docs/forms.md."""
    parts = [
        "# Forms",
        "",
        "Which nodes are written for which operator, bits and CPU, the kernel of onnxruntime that",
        "they reach, and why. Generated from `passes/forms.py` by `python docs/generate.py`; a",
        "test builds each form and looks for its kernel in the graph that onnxruntime makes of it.",
        "`onnxq doctor` says which target this machine is. Bits are those of one integer product:",
        "merged terms count together.",
        "",
        "| operator | activations | bits | layout | target | activation·weight | nodes | kernel "
        "| why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for form in FORMS:
        low, high = form.bits
        cells = (
            form.op,
            form.activations,
            str(low) if low == high else f"{low}–{high}",
            ", ".join(form.layouts),
            ", ".join(form.targets),
            "float" if form.pair is None else str(form.pair),
            form.nodes,
            ", ".join(form.kernels),
            f"{form.reason}; {form.fact}",
        )
        parts.append("| " + " | ".join(cell.replace("|", "∣") for cell in cells) + " |")
    return "\n".join(parts + _gains()) + "\n"


def _gains() -> list[str]:
    """The section on what is computed in integers by default."""
    parts = [
        "",
        "## What is computed in integers by default",
        "",
        "`--activations auto`, from `passes/gains.py`: dynamic activations where the target gains",
        "by them; float compute, with terms merged and folded at load, elsewhere, and for every",
        "other operator. An option that needs one kind of compute decides for all nodes:",
        "`--block-size`, `--matmul`, `--offset on` and merged terms that are no digits of 8 bits",
        "for none; `--activation-terms`, `--activation-bits`, `--products`, `--outliers`,",
        "`--max-latency` below 1x and `--minimize latency` for dynamic; `--ranges` for static.",
        "Single MatMuls are timed by `benchmarks/gains.py`.",
        "",
        "| operator | target | in integers | why | measured |",
        "|---|---|---|---|---|",
    ]
    for gain in GAINS:
        cells = (gain.op, ", ".join(gain.targets), gain.condition, gain.reason, gain.fact)
        parts.append("| " + " | ".join(cells) + " |")
    return parts


def _section(kind: type) -> list[str]:
    doc = inspect.cleandoc(kind.__doc__ or "")
    text, _, rule = doc.partition("Given:")
    return [f"### {kind.__name__}", "", text.strip(), "", "```", f"Given:{rule}".strip(), "```", ""]


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"wrote {FOLDER / name}")
