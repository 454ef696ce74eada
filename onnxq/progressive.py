"""A file of several terms is progressive: terms can be dropped from it, and added to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from onnxq.comparison import Comparison
from onnxq.embedded_plan import EmbeddedPlan, embed_plan, embedded_plan, write_embedded
from onnxq.errors import ConfigError, ModelError
from onnxq.kernels_ref import Series
from onnxq.kernels_ref.continuation import continue_series
from onnxq.model import Model, load
from onnxq.passes import Equalize, SelectNodes
from onnxq.passes.recover_terms import TermReader
from onnxq.passes.search_scales import Progress, match_plan, no_progress
from onnxq.passes.truncate_terms import TruncateTerms, kept_terms, term_counts
from onnxq.pipeline import apply, canonicalize, rewrite
from onnxq.plan import NodePlan, Plan
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

ModelSource = str | os.PathLike[str] | onnx.ModelProto
MAX_TERMS = 8


class TermsReport(BaseModel):
    """What changed.

    `changed` maps a node to its number of terms before and after. `comparison` is with the model
    that was truncated, or with the float model that an extension was made from; None if the inputs
    made up for it do not run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    terms: int
    changed: dict[str, tuple[int, int]]
    unchanged: int
    size_before: int
    size_after: int
    comparison: Comparison | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class TermsResult(HoldsModel):
    """What `truncate` or `extend` made: the report, where the model was written, and the model."""

    report: TermsReport
    path: Path | None
    _model: Model


def truncate(
    model: ModelSource,
    output: str | os.PathLike[str] | None,
    terms: int,
    *,
    data: DataSource = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> TermsResult:
    """Keep the first terms of each node of a quantized model; the float model is not needed.

    Args:
        model: path, or a model in memory (which is not changed), written by onnxq.
        output: where to write; None keeps the result in memory.
        terms: how many terms to keep, 1 or more; nodes with fewer stay as they are. A first term
            of the centre tap is not counted, as it is not where terms are asked for.
        data: samples to compare both models on, an .npz or a mapping input name -> array.
        input_shapes: shapes of the made-up inputs used without data.

    Raises:
        ModelError: the model cannot be read, is not quantized by onnxq, or was changed since.
        ConfigError: terms is less than 1, the data do not fit, or the output is the input.
        ValidationError: the result does not load, or its outputs have other shapes or are not
            finite. Nothing is written then.
    """
    _check_terms(terms)
    source = load(model)
    check_targets(source, {"output": output}, {"data": data})
    before = _expanded(source)
    embedded = embedded_plan(source)
    check = Validation(reference_of(model), data, input_shapes or {})
    apply(TruncateTerms(terms, None if embedded is None else embedded.plan), source)
    if embedded is not None:
        write_embedded(source, _truncated(source, embedded, terms))
    after = write_checked(source, output, check)
    warnings = [] if embedded is None else _centres(embedded.plan, terms)
    if before == term_counts(source):
        warnings.insert(0, _nothing(terms, "more", "dropped", centres=bool(warnings)))
    sizes = size_of(model), after
    report = _report(terms, before, source, check, sizes=sizes, warnings=warnings)
    return TermsResult(report, None if output is None else Path(output), source)


def extend(
    model: ModelSource,
    float_model: ModelSource,
    output: str | os.PathLike[str] | None,
    terms: int,
    *,
    data: DataSource = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress = no_progress,
) -> TermsResult:
    """Add terms to the nodes of a quantized model; the terms that it has stay, bit for bit.

    Args:
        model: path, or a model in memory (which is not changed), written by onnxq.
        float_model: the model that it was quantized from.
        output: where to write; None keeps the result in memory.
        terms: how many terms each node shall have, up to 8; nodes with more stay as they are.
        data: samples to compare with the float model on, an .npz or a mapping name -> array.
        input_shapes: shapes of the made-up inputs used without data.
        progress: called with (what, done, total).

    Raises:
        ModelError: a model cannot be read, is not quantized by onnxq, or was changed since.
        ConfigError: terms is out of range, the file does not hold its plan, it was made from
            another float model, its form takes no further terms, or the data do not fit.
        ValidationError: the result does not load, or its outputs have other shapes or are not
            finite. Nothing is written then.
    """
    _check_terms(terms, MAX_TERMS)
    source = load(model)
    floats = load(float_model)
    inputs = {"data": data, "float model": _path_of(floats)}
    check_targets(source, {"output": output}, inputs)
    before = _expanded(source)
    embedded = _extendable(source)
    check = Validation(reference_of(float_model), data, input_shapes or {})
    canonicalize(floats)
    if embedded.equalized:
        apply(Equalize(), floats)
    plan = _extended(source, embedded.plan, floats, terms)
    if all(node.terms >= terms for node in embedded.plan.nodes):
        made, warnings = source, [_nothing(terms, "fewer", "added")]
    else:
        fresh, equalize = load(float_model), embedded.equalized
        made = rewrite(fresh, SelectNodes(), plan, progress, equalize=equalize).model
        embed_plan(made, plan, equalized=equalize)
        warnings = _lost_corrections(embedded, terms)
    after = write_checked(made, output, check)
    sizes = size_of(model), after
    report = _report(terms, before, made, check, sizes=sizes, warnings=warnings)
    return TermsResult(report, None if output is None else Path(output), made)


def _check_terms(terms: int, most: int | None = None) -> None:
    if terms < 1 or (most is not None and terms > most):
        limits = "1 or more" if most is None else f"1 to {most}"
        raise ConfigError(f"--terms {terms}: give {limits}")


def _path_of(model: Model) -> Path | None:
    return model.source.file


def _expanded(model: Model) -> dict[str, int]:
    """The number of terms of each expanded node; there is at least one."""
    counts = term_counts(model)
    if not counts:
        where = model.path or "the model"
        raise ModelError(f"{where} is not quantized by onnxq: use `onnxq quantize` first")
    return counts


def _truncated(model: Model, embedded: EmbeddedPlan, terms: int) -> EmbeddedPlan:
    """What a file says of its making once its nodes have fewer terms."""
    nodes = [
        _with_terms(node, min(node.terms, kept_terms(node, terms))) for node in embedded.plan.nodes
    ]
    reader = TermReader(model)
    # a first term covers all channels
    whole = {
        node.name
        for node in nodes
        if node.name in embedded.partial
        and node.terms == 1
        and not node.offset
        and reader.has_scales(node)
    }
    plan = embedded.plan.model_copy(update={"nodes": nodes})
    return replace(embedded, plan=plan, partial=embedded.partial - whole)


def _centres(plan: Plan, terms: int) -> list[str]:
    """Says of which nodes a term more is kept than was asked for."""
    found = [node.name for node in plan.nodes if node.centre and node.terms > terms]
    if not found:
        return []
    return [
        f"{len(found)} nodes keep {terms + 1} terms (first: {found[0]!r}): one holds the centre "
        "tap of the kernel alone, and is of no use without the next"
    ]


def _extendable(model: Model) -> EmbeddedPlan:
    embedded = embedded_plan(model)
    if embedded is None:
        raise ConfigError(
            f"{model.path or 'the model'} does not hold the plan that it was made with: quantize "
            "the float model again, with as many --terms as are wanted"
        )
    if embedded.partial:
        raise ConfigError(
            f"node {min(embedded.partial)!r} was made with terms of some channels or taps only, or "
            "an offset, and takes no further terms: quantize the float model again, with as many "
            "--terms as are wanted"
        )
    return embedded


def _extended(source: Model, plan: Plan, floats: Model, terms: int) -> Plan:
    """The plan with further terms, and the integers and scales of all of them."""
    try:
        sites = match_plan(floats, plan)
    except ConfigError as error:
        difference = str(error).partition(": ")[2].rpartition(";")[0]
        raise ConfigError(
            f"{floats.path or 'the float model'} is not the model that "
            f"{source.path or 'the quantized one'} was made from: {difference}"
        ) from None
    reader = TermReader(source)
    extended = Plan(nodes=[], ranges=plan.ranges)
    for entry, (_, weight) in sites:
        series = continue_series(
            reader.series(entry, weight), weight.matrix(), max(entry.terms, terms)
        )
        extended.nodes.append(_entry_of(entry, series))
        extended.scales[entry.name] = tuple(term.scale for term in series.terms)
        extended.integers[entry.name] = tuple(t.q.astype(np.int8) for t in series.terms)
    return extended


def _entry_of(entry: NodePlan, series: Series) -> NodePlan:
    """The entry with the terms of a longer series, in a form that takes them.

    Raises:
        ConfigError: there is none.
    """
    if len(series) == entry.terms:
        return entry
    merged = entry.layout == "merged"
    bits = len(series) * entry.bits
    if merged and entry.activations != "none" and (series.kind != "digit" or bits > 8):
        raise ConfigError(
            f"node {entry.name!r} takes no further terms: it sums them as one 8-bit integer; "
            "quantize the float model again with --layout parallel, or with --activations none"
        )
    # MatMulNBits multiplies by one term, and there is no such sum of them before the product
    form = "folded" if merged else entry.form
    return _with_terms(entry, len(series), series=series.kind, form=form)


def _with_terms(entry: NodePlan, terms: int, **more: Any) -> NodePlan:
    return entry.model_copy(update={"terms": terms, **more})


def _nothing(terms: int, than: str, done: str, *, centres: bool = False) -> str:
    besides = " besides that of a centre tap" if centres else ""
    return f"no node has {than} than {terms} terms{besides}: nothing was {done}"


def _lost_corrections(embedded: EmbeddedPlan, terms: int) -> list[str]:
    """What a corrected bias made up for is smaller where there are more terms; not elsewhere."""
    full = [n.name for n in embedded.plan.nodes if n.terms >= terms]
    lost = [name for name in full if name in embedded.corrected]
    if not lost:
        return []
    return [
        f"{len(lost)} nodes that had {terms} terms before (first: {lost[0]!r}) lose the bias "
        "correction of their planning: quantize the float model again if that matters"
    ]


def _report(
    terms: int,
    before: Mapping[str, int],
    model: Model,
    check: Validation,
    *,
    sizes: tuple[int, int],
    warnings: Sequence[str],
) -> TermsReport:
    after = term_counts(model)
    changed = {n: (before[n], after[n]) for n in before if before[n] != after[n]}
    return TermsReport(
        terms=terms,
        changed=changed,
        unchanged=len(before) - len(changed),
        size_before=sizes[0],
        size_after=sizes[1],
        comparison=with_size(check.found, sizes),
        warnings=(*check.warnings, *warnings),
    )
