"""Terminal output of the commands, from their results."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from onnxq.benchmarking import Benchmark
from onnxq.comparison import Comparison
from onnxq.doctor import Diagnosis
from onnxq.folding import FoldReport
from onnxq.inspection import Inspection
from onnxq.parts import SplitReport
from onnxq.progressive import TermsReport
from onnxq.report import Report
from onnxq.sweep import Sweep

_MIB = 2**20
_KIB = 2**10


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints names as they are: `[conv]` and `:one:` are no markup."""
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False)


def make_page(report: Report) -> str:
    """The summary of `quantize` as HTML."""
    console = Console(
        file=io.StringIO(), record=True, width=120, markup=False, emoji=False, highlight=False
    )
    show_report(console, report)
    return console.export_html()


def progress_bar(console: Console) -> tuple[Progress, Callable[[str, int, int], None]]:
    """A progress display (to be entered as a context) and the callback that moves it."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log gets no bars
    )
    tasks: dict[str, object] = {}

    def update(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done)  # type: ignore[arg-type]

    return progress, update


def show_diagnosis(console: Console, found: Diagnosis) -> None:
    """What `doctor` found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for what, value in (*found.facts, ("target", f"{found.target} ({found.why})")):
        table.add_row(what, value)
    for kernel in found.support:
        have = "yes" if kernel.present else f"no, from onnxruntime {kernel.since}"
        table.add_row(kernel.kernel, have)
    table.add_row("cache", found.cache or "none")
    console.print(table)
    pairs = ("uint8·int8", "uint8·uint8", "int8·uint8", "int8·int8")
    times = Table(title="\none product, one thread, time over float's (activation·weight)")
    for name in ("workload", "operator", *pairs):
        times.add_column(name, justify="right" if name in pairs else "left")
    for row in found.kernels:
        cells = (row.uint8_int8, row.uint8_uint8, row.int8_uint8, row.int8_int8)
        times.add_row(
            row.workload, row.op, *("–" if c is None else f"{c.median:.2f}" for c in cells)
        )
    console.print(times)
    for line in found.advice:
        console.print(f"- {line}")


def show_split(console: Console, report: SplitReport) -> None:
    """What `split` made."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("parts", f"{report.parts}, in {report.stages} stages")
    reduced = "" if report.reduced_bytes is None else f", {_bytes(report.reduced_bytes)}"
    table.add_row("all-reduces", f"{report.all_reduces} a run{reduced}")
    sizes = ", ".join(_bytes(size) for size in report.part_bytes)
    table.add_row("size", f"{_bytes(report.source_bytes)} → {sizes}")
    for reason, names in _by_reason(report.whole):
        table.add_row("in every part", f"{_some(names)}: {reason}")
    if report.difference is not None:
        table.add_row("difference", f"{report.difference:.1e} of the largest output")
    for warning in report.warnings:
        table.add_row("warning", warning)
    console.print(table)


def show_sweep(console: Console, found: Sweep) -> None:
    """The points of a sweep, the smallest first."""
    table = Table(title=f"sweep, {found.stated}", title_justify="left")
    for name in ("plan", "size", "× float", "bits", "rel. error", "top-1 lost", "latency"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for point in found.points:
        lost = point.measured.top1
        table.add_row(
            point.name + ("" if point.on_front else " (behind the front)"),
            _bytes(point.size),
            f"{point.size_ratio:.3f}",
            f"{point.weight_bits:.2f}",
            f"{point.measured.relative_error:.2e}",
            "–" if lost is None else f"{100 * lost.value:.2f} pt",
            "–" if point.latency_ratio is None else f"{point.latency_ratio:.2f}",
        )
    console.print(table)


def show_terms(console: Console, report: TermsReport, against: str) -> None:
    """What `truncate` or `extend` did, and the errors against the model that is named."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    changes = {node: f"{a} → {b} terms" for node, (a, b) in report.changed.items()}
    for change, names in _by_reason(changes):
        table.add_row("changed", f"{_some(names)}: {change}")
    ratio = report.size_after / report.size_before
    sizes = f"{_bytes(report.size_before)} → {_bytes(report.size_after)} ({ratio:.3f} ×)"
    table.add_row("size", sizes)
    for warning in report.warnings:
        table.add_row("warning", warning)
    console.print(table)
    if report.comparison is not None:
        show_comparison(console, report.comparison, with_ratios=False, against=against)


def show_report(console: Console, report: Report) -> None:
    """The summary table of `quantize`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("quantized", f"{report.quantized} nodes")
    for kind, count in report.kinds.items():
        table.add_row("", f"{count} × {kind}")
    for reason, names in _by_reason(report.left_alone):
        table.add_row("left alone", f"{_some(names)}: {reason}")
    for note, names in _by_reason(report.notes):
        table.add_row("note", f"{_some(names)}: {note}")
    for line in report.planning:
        table.add_row("planning", line)
    if report.folded:
        folds = ", ".join(f"{name} {count}" for name, count in report.folded.items())
        table.add_row("folds", folds)
    ratio = report.size_after / report.size_before
    table.add_row(
        "size", f"{_bytes(report.size_before)} → {_bytes(report.size_after)} ({ratio:.3f} ×)"
    )
    table.add_row("weight bits", f"{report.weight_bits:.2f} per parameter (float: 32)")
    if report.opset_after != report.opset_before:
        table.add_row("opset", f"{report.opset_before} → {report.opset_after}")
    console.print(table)
    if report.comparison is not None:
        show_comparison(console, report.comparison, with_ratios=False)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")


def show_fold(console: Console, report: FoldReport) -> None:
    """The summary of `fold`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, nodes in report.folded.items():
        table.add_row(name, f"{len(nodes)}: {_some(list(nodes))}")
    for reason, names in _by_reason(report.left_alone):
        table.add_row("left alone", f"{_some(names)}: {reason}")
    before, after = sum(report.before.values()), sum(report.after.values())
    table.add_row("nodes", f"{before} → {after}")
    for kind in sorted(set(report.before) | set(report.after)):
        counts = report.before.get(kind, 0), report.after.get(kind, 0)
        if counts[0] != counts[1]:
            table.add_row("", f"{kind} {counts[0]} → {counts[1]}")
    table.add_row("size", f"{_bytes(report.size_before)} → {_bytes(report.size_after)}")
    console.print(table)
    if report.comparison is not None:
        show_comparison(console, report.comparison, with_ratios=False)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")


def show_comparison(
    console: Console,
    found: Comparison,
    *,
    with_ratios: bool = True,
    against: str = "the float model",
) -> None:
    """The error table, and the ratios of `compare`."""
    kind = "made-up samples (N(0, 1) or 0/1)" if found.made_up_inputs else "samples"
    table = Table(title=f"error against {against} on {found.samples} {kind}")
    table.title_justify = "left"
    table.add_column("output", overflow="fold")
    for name in ("sqnr_db", "mae", "max_abs_error", "cosine", "top1_agreement"):
        table.add_column(name, justify="right")
    for output in found.outputs:
        table.add_row(
            output.name,
            "inf" if math.isinf(output.sqnr_db) else f"{output.sqnr_db:.2f}",
            f"{output.mae:.3g}",
            f"{output.max_abs_error:.3g}",
            f"{output.cosine:.6f}",
            "–" if output.top1_agreement is None else f"{output.top1_agreement:.4f}",
        )
    console.print(table)
    if found.made_up_inputs:
        console.print("(made-up inputs show that it runs, not how right it is: give --data)")
    if found.float_accuracy is not None and found.quantized_accuracy is not None:
        console.print(
            f"accuracy: float {found.float_accuracy:.2%}, quantized {found.quantized_accuracy:.2%}"
        )
    if with_ratios:
        console.print(f"size: {found.size_ratio:.3f} × float")
        if found.latency_ratio is not None:
            console.print(f"latency: {found.latency_ratio:.2f} × float (median, runs in turns)")


def show_benchmark(console: Console, found: Benchmark) -> None:
    """The table of `bench`, and what it was measured on."""
    paths = [Path(model.model) for model in found.models]
    alike = len({path.name for path in paths}) < len(set(paths))
    table = Table(title=f"ratios to {paths[0]}", title_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("ms", "latency", "25–75 %", "load", "memory", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for path, model in zip(paths, found.models, strict=True):
        ratio = model.latency_ratio
        table.add_row(
            str(path) if alike else path.name,
            f"{model.latency_ms.median:.3g}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}–{ratio.high:.2f}",
            f"{model.load_ratio:.2f}",
            "–" if model.memory_ratio is None else f"{model.memory_ratio:.2f}",
            f"{model.size_ratio:.3f}",
        )
    console.print(table)
    inputs = ", ".join(
        f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in found.inputs.items()
    )
    kind = "made-up inputs" if found.made_up_inputs else "inputs"
    threads = "default threads" if found.threads is None else f"{found.threads} threads"
    console.print(f"latency: medians of {found.rounds} runs in turns, {threads}; {kind}: {inputs}")
    console.print("load, memory: of a process of its own (peak above what it held before)")


def show_inspection(console: Console, found: Inspection) -> None:
    """The tables of `inspect`."""
    console.print(f"opset {found.opset}, {found.nodes} nodes")
    if found.quantized:
        table = Table(title="quantized by onnxq", title_justify="left")
        for name in ("node", "operator", "terms", "bits", "layout", "activations"):
            table.add_column(name, overflow="fold")
        for node in found.quantized:
            table.add_row(
                node.name,
                node.op_type,
                str(node.terms),
                str(node.bits),
                node.layout if node.terms > 1 else "–",
                node.activations
                + (f" × {node.activation_terms}" if node.activation_terms > 1 else ""),
            )
        console.print(table)
    if found.candidates:
        table = Table(title="candidates", title_justify="left")
        for name in ("node", "operator", "weight", "would be", "reason"):
            table.add_column(name, overflow="fold")
        for candidate in found.candidates:
            shape = "×".join(map(str, candidate.shape)) or "–"
            table.add_row(
                candidate.name, candidate.op_type, shape, candidate.action, candidate.reason or ""
            )
        console.print(table)
    if not found.quantized and not found.candidates:
        console.print("no node with weights that onnxq knows")


def _by_reason(reasons: dict[str, str]) -> list[tuple[str, list[str]]]:
    pairs = sorted((reason, name) for name, reason in reasons.items())
    return [(key, [n for _, n in rest]) for key, rest in groupby(pairs, key=lambda pair: pair[0])]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _bytes(count: int) -> str:
    return f"{count / _MIB:.2f} MiB" if count >= _MIB else f"{count / _KIB:.1f} KiB"
