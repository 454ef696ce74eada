"""The exact float folds alone: a simpler float model that computes the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from pydantic import BaseModel, ConfigDict

from onnxq.comparison import Comparison
from onnxq.model import Model, graphs, load
from onnxq.pipeline import canonicalize, unfolded
from onnxq.report import with_size
from onnxq.validation import (
    DataSource,
    HoldsModel,
    Validation,
    check_targets,
    reference_of,
    size_of,
    write_checked,
)

# Folding rounds every weight once; more than this is worth a look.
ROUNDING = 1e-4


class FoldReport(BaseModel):
    """What the folds did. `before` and `after` count nodes by operator, bodies included."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    folded: dict[str, tuple[str, ...]]
    left_alone: dict[str, str]
    before: dict[str, int]
    after: dict[str, int]
    size_before: int
    size_after: int
    comparison: Comparison | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FoldResult(HoldsModel):
    """What `fold` made: the report, where the model was written, and the model."""

    report: FoldReport
    path: Path | None
    _model: Model


def fold(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    data: DataSource = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> FoldResult:
    """Run the exact float folds of PIPELINE and nothing else, validate, and write.

    Args:
        model: path, or a model in memory (which is not changed).
        output: where to write; None keeps the result in memory.
        data: samples to validate on, an .npz or a mapping input name -> array.
        input_shapes: shapes of the made-up inputs used without data.

    Raises:
        ModelError: the model cannot be read or is invalid.
        ConfigError: the data do not fit, or the output is the input.
        ValidationError: the result does not load, or its outputs have other shapes or are not
            finite. Nothing is written then.
    """
    source = load(model)
    check_targets(source, {"output": output}, {"data": data})
    before = count_operators(source)
    check = Validation(reference_of(model), data, input_shapes or {})
    passes = canonicalize(source)
    after = write_checked(source, output, check)
    report = FoldReport(
        folded={name: result.rewritten for name, result in passes.items() if result.rewritten},
        left_alone=unfolded(passes, source),
        before=before,
        after=count_operators(source),
        size_before=size_of(model),
        size_after=after,
        comparison=with_size(check.found, (size_of(model), after)),
        warnings=(*check.warnings, *_differs(check.found)),
    )
    return FoldResult(report, None if output is None else Path(output), source)


def _differs(found: Comparison | None) -> tuple[str, ...]:
    if found is None:
        return ()
    return tuple(
        f"output {output.name!r} differs by {output.relative_error:.1e} of its size, more than "
        "rounding: compare on real samples with --data"
        for output in found.outputs
        if output.relative_error > ROUNDING
    )


def count_operators(model: Model) -> dict[str, int]:
    """Nodes by operator, bodies included, most frequent first."""
    count: dict[str, int] = {}
    for _, graph in graphs(model):
        for node in graph.nodes:
            count[node.op] = count.get(node.op, 0) + 1
    return dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))
