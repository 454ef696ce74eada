"""Terms that cover a part of a weight: a second term for some channels, the centre tap, the offset.

python benchmarks/points.py [--only share|rounded|search|size|offset|latency|centre] [--model rlfn]

Float compute, merged, per channel; rounded to nearest where nothing else is said. Errors are those
of the output against the float model's, on samples that choosing the channels did not see.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import numpy_helper
from real import CLASSIFIERS, MODELS, classifier_data, samples
from rich.console import Console
from rich.table import Table

from onnxq.calibrate_weights import calibrate_weights
from onnxq.calibration import Calibration, open_calibration
from onnxq.comparison import paired_ratios, time_in_turns
from onnxq.kernels_ref import ErrorSums
from onnxq.kernels_ref.multipoint import greedy_scales
from onnxq.model import Model, load, raise_opset, to_proto
from onnxq.observing import observer
from onnxq.passes import Expand, SearchScales, SelectNodes, required_opset
from onnxq.passes.plan_points import PlanPoints, with_points
from onnxq.passes.search_scales import match_plan
from onnxq.pipeline import canonicalize
from onnxq.plan import Plan
from onnxq.session import input_specs, open_session, run

CALIBRATION = 64
SHARES = (0.0, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)
SHARES_ROUNDED = (0.0, 0.05, 0.15, 0.5, 1.0)
ROOT = Path(__file__).parents[1]
Points = Mapping[str, np.ndarray]


@dataclass
class Subject:
    """A model, samples to calibrate on, and others to judge it on."""

    name: str
    source: onnx.ModelProto
    calibration: dict[str, np.ndarray]
    held: dict[str, np.ndarray]

    def canonical(self) -> Model:
        model = load(self.source)
        canonicalize(model)
        return model

    @cached_property
    def feeds(self) -> list[dict[str, np.ndarray]]:
        count = len(next(iter(self.held.values())))
        return [{k: v[i : i + 1] for k, v in self.held.items()} for i in range(count)]

    @cached_property
    def wanted(self) -> list[np.ndarray]:
        session = open_session(self.source.SerializeToString(), threads=1)
        return [run(session, feed)[0] for feed in self.feeds]

    def plan(self, *, offset: bool = False, **options: Any) -> Plan:
        settings = {"activations": "none", "layout": "merged", "terms": 2, **options}
        plan = SelectNodes(**settings)(self.canonical())
        nodes = [n.model_copy(update={"offset": offset and n.quantized}) for n in plan.nodes]
        return plan.model_copy(update={"nodes": nodes})

    def judge(self, plan: Plan) -> tuple[float, float | None]:
        """(relative error, agreement) of the model that the plan makes."""
        return self.judge_proto(self.make(plan))

    def make(self, plan: Plan) -> onnx.ModelProto:
        model = self.canonical()
        complete = SearchScales()(model, plan.model_copy(deep=True))
        raised = raise_opset(model, required_opset(complete))
        Expand(complete)(raised)
        return to_proto(raised)

    def judge_proto(self, proto: onnx.ModelProto) -> tuple[float, float | None]:
        session = open_session(proto.SerializeToString(), threads=1)
        sums = ErrorSums()
        for feed, wanted in zip(self.feeds, self.wanted, strict=True):
            sums.add(wanted, run(session, feed)[0])
        return sums.relative_error, sums.top1_agreement

    @cached_property
    def samples(self) -> Calibration:
        session = open_session(self.source.SerializeToString(), threads=1)
        return open_calibration(self.calibration, input_specs(session))

    def round(self, plan: Plan) -> Plan:
        """The plan with weights rounded to the calibration samples."""
        return calibrate_weights(self.canonical(), plan, self.samples, threads=1)[0]

    def errors(self, plan: Plan, data: bool) -> Points:
        if not data:
            return PlanPoints().errors(self.canonical(), plan)
        found, model = self.samples, self.canonical()
        observe = observer(model, found, found.failing)
        return PlanPoints(observe=observe, samples=CALIBRATION).errors(model, plan)


def subjects(only: str, count: int) -> Iterator[Subject]:
    for name in (*CLASSIFIERS, "sr_rlfn_x4"):
        if only not in name:
            continue
        if name in CLASSIFIERS:
            arrays = {"input": classifier_data(name, CALIBRATION + count)["input"]}
        else:
            arrays = samples(name, CALIBRATION + 8)
        parts = ({k: v[:CALIBRATION] for k, v in arrays.items()},
                 {k: v[CALIBRATION:] for k, v in arrays.items()})  # fmt: skip
        yield Subject(name, onnx.load(MODELS / f"{name}.onnx"), *parts)


def worst_share(errors: Points, share: float) -> dict[str, np.ndarray]:
    """A second point for that share of all channels whose error with one is the largest."""
    first = np.concatenate([e[:, 0] for e in errors.values()])
    count = round(share * len(first))
    limit = np.sort(first)[::-1][count - 1] if count else np.inf
    return {name: np.where(e[:, 0] >= limit, 2, 1).astype(np.int8) for name, e in errors.items()}


def weight_bits(plan: Plan, points: Points, bits: int) -> float:
    """Mean bits per weight."""
    total = spent = 0.0
    for node in plan.quantized:
        size = float(np.prod(node.shape))
        total += size
        spent += size * bits * float(points[node.name].mean())
    return spent / total


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="left" if column in ("model", "form") else "right")
    return made


def show(found: tuple[float, float | None]) -> tuple[str, str]:
    error, agreement = found
    return f"{error:.4f}", "–" if agreement is None else f"{agreement:.3f}"


def share(only: str, count: int) -> None:
    """How many channels need a second point."""
    for subject in subjects(only, count):
        for form, options in (
            ("joint scales", {"series": "joint"}),
            ("with offset", {"series": "digit", "offset": True}),
        ):
            made = table(
                f"{subject.name}: a second 4-bit term for the worst channels, {form}",
                "channels", "weights", "rel. error, no data", "agreement",
                "rel. error, 64 samples", "agreement ",
            )  # fmt: skip
            plan = subject.plan(**options)
            by_data = [subject.errors(plan, data) for data in (False, True)]
            for part in SHARES:
                row = [f"{part:.0%}"]
                for errors in by_data:
                    points = worst_share(errors, part)
                    if len(row) == 1:
                        row.append(f"{weight_bits(plan, points, 1) - 1:.0%}")
                    row += show(subject.judge(with_points(plan, points)))
                made.add_row(*row)
            Console(width=110).print(made)


def rounded(only: str, count: int) -> None:
    """The same, with weights rounded to 64 samples."""
    for subject in subjects(only, count):
        made = table(
            f"{subject.name}: a second 4-bit term for the worst channels, rounded to 64 samples",
            "channels", "weights", "rel. error", "agreement",
        )  # fmt: skip
        plan = subject.plan()
        errors = subject.errors(plan, True)
        for part in SHARES_ROUNDED:
            points = worst_share(errors, part)
            found = subject.judge(subject.round(with_points(plan, points)))
            share_of_weights = f"{weight_bits(plan, points, 1) - 1:.0%}"
            made.add_row(f"{part:.0%}", share_of_weights, *show(found))
        Console(width=110).print(made)


def greedy_plan(subject: Subject, plan: Plan) -> Plan:
    """The plan with the paper's scales: each term's the best for what the ones before leave."""
    scaled = plan.model_copy(deep=True)
    for entry, (_, weight) in match_plan(subject.canonical(), scaled):
        scaled.scales[entry.name] = greedy_scales(
            weight.matrix(), bits=entry.bits, terms=2, granularity=entry.matrix_granularity()
        )
    return scaled


def search(only: str, count: int) -> None:
    """Joint, greedy, fixed-ratio and digit scales for two terms of every channel, and of some."""
    kinds = ("greedy", "fixed_ratio", "digit", "joint")
    title = "Two terms: how their scales are found; rel. error (agreement)"
    made = table(title, "model", "bits", "channels", *kinds)
    for subject in subjects(only, count):
        for bits in (2, 3, 4):
            errors = subject.errors(subject.plan(series="joint", bits=bits), False)
            for part in (0.15, 1.0):
                points = worst_share(errors, part)
                row = [subject.name, str(bits), f"{part:.0%}"]
                for series in kinds:
                    kind = "joint" if series == "greedy" else series
                    plan = with_points(subject.plan(series=kind, bits=bits), points)
                    if series == "greedy":
                        plan = _partly_greedy(subject, plan, points)
                    row.append("{} ({})".format(*show(subject.judge(plan))))
                made.add_row(*row)
    Console(width=130).print(made)


def _partly_greedy(subject: Subject, plan: Plan, points: Points) -> Plan:
    """Greedy scales; the first does not depend on the number of points."""
    two = plan.model_copy(
        update={"nodes": [n.model_copy(update={"terms": 2}) for n in plan.nodes], "points": {}}
    )
    scaled = greedy_plan(subject, two)
    scaled.points.update(points)
    return scaled


def size(only: str, count: int) -> None:
    """Points against the same bits for all, and against second terms for whole nodes."""
    made = table("The same bits per weight, spent in three ways; rel. error (agreement)",
                 "model", "bits per weight", "uniform", "whole nodes", "channels",
                 "channels, 64 samples")  # fmt: skip
    for subject in subjects(only, count):
        plan = subject.plan(series="joint")
        free, informed = (subject.errors(plan, data) for data in (False, True))
        for bits in (4, 5, 6, 7, 8):
            uniform = subject.plan(series="joint", terms=1, bits=bits)
            row = [subject.name, str(bits), "{} ({})".format(*show(subject.judge(uniform)))]
            for points in (
                at_bits(plan, whole_nodes(free), bits),
                at_bits(plan, free, bits),
                at_bits(plan, informed, bits),
            ):
                row.append("{} ({})".format(*show(subject.judge(with_points(plan, points)))))
            made.add_row(*row)
    Console(width=130).print(made)


def whole_nodes(errors: Points) -> Points:
    """All channels of a node taken for as bad as their mean."""
    return {name: np.broadcast_to(e.mean(axis=0), e.shape) for name, e in errors.items()}


def at_bits(plan: Plan, errors: Points, bits: float) -> dict[str, np.ndarray]:
    """Second points for the worst channels, until the weights have so many bits on average."""
    sizes = {n.name: np.prod(n.shape) / len(errors[n.name]) for n in plan.quantized}
    first = np.concatenate([errors[name][:, 0] for name in sizes])
    each = np.concatenate([np.full(len(errors[name]), s) for name, s in sizes.items()])
    order = np.argsort(-first, kind="stable")
    spent = np.cumsum(each[order])
    points = np.ones(len(first), np.int8)
    points[order[spent <= each.sum() * (bits - 4) / 4 + 0.5]] = 2
    ends = np.cumsum([len(errors[name]) for name in sizes])
    return dict(zip(sizes, np.split(points, ends[:-1]), strict=True))


def offset(only: str, count: int) -> None:
    """One and two terms of 2, 3 and 4 bits with and without a constant per channel."""
    forms = {
        "digit": {"series": "digit"},
        "joint": {"series": "joint"},
        "offset": {"series": "digit", "offset": True},
    }
    made = table(
        "Offset per output channel; rel. error (agreement)", "model", "bits", "terms", *forms
    )
    for subject in subjects(only, count):
        for bits in (2, 3, 4):
            for terms in (1, 2):
                found = [
                    subject.judge(subject.plan(bits=bits, terms=terms, **options))
                    for options in forms.values()
                ]
                shown = ["{} ({})".format(*show(each)) for each in found]
                made.add_row(subject.name, str(bits), str(terms), *shown)
    Console(width=110).print(made)


def latency(only: str, count: int) -> None:
    """Integer compute (dynamic) of partial terms; one thread, in turns."""
    for subject in subjects(only, min(count, 50)):
        dynamic = partial(subject.plan, activations="dynamic")
        plan = dynamic(series="joint", layout="parallel")
        digits = dynamic(series="digit", layout="merged")
        errors = subject.errors(plan, False)
        some = {part: worst_share(errors, part) for part in (0.05, 0.15, 0.3)}
        forms = {
            "1 term": dynamic(series="digit", terms=1),
            "1 term with offset": dynamic(series="digit", terms=1, offset=True),
            **{
                f"2 terms, {part:.0%} of channels": with_points(plan, points)
                for part, points in some.items()
            },
            "2 terms": plan,
            "2 digits merged, 15 % of channels": with_points(digits, some[0.15]),
            "2 digits merged": digits,
        }
        made = [subject.make(each) for each in forms.values()]
        protos = [subject.source, *made]
        sessions = [open_session(p.SerializeToString(), threads=1) for p in protos]
        runs = [partial(run, session, subject.feeds[0]) for session in sessions]
        times = paired_ratios(time_in_turns(runs, warmup=2, rounds=21, seconds=120))
        rows = table(
            f"{subject.name}: dynamic integer compute",
            "form", "latency / float", "rel. error", "agreement",
        )  # fmt: skip
        for column, (form, proto) in enumerate(zip(forms, made, strict=True), start=1):
            ratio = f"{np.median(times[:, column]):.2f}"
            rows.add_row(form, ratio, *show(subject.judge_proto(proto)))
        Console(width=100).print(rows)


def folded() -> Iterator[Subject]:
    """Models whose kernels are folded from branches."""
    sys.path.insert(0, str(ROOT / "models"))
    from resnet50 import build_mobileone_like

    archive = np.load(ROOT / "models" / "digits_test.npz")
    source = onnx.load(ROOT / "models" / "digits_repvgg.onnx")
    name = source.graph.input[0].name
    images = {name: archive[next(k for k in archive.files if k != "label")][:400]}
    yield Subject("digits_repvgg", source, images, images)
    made = build_mobileone_like()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((100, 3, 32, 32)).astype(np.float32)
    yield Subject("mobileone_like", made, {"input": x}, {"input": x})


def centre() -> None:
    """The centre tap as a term of its own, at 4 bits."""
    made = table("Centre tap as a term of its own, 4 bits, joint; rel. error (agreement)",
                 "model", "centre / rest", "1 term", "centre, rest apart", "centre, rest whole",
                 "more bytes", "same bytes as points", "2 terms")  # fmt: skip
    for subject in folded():
        plan = subject.plan(series="joint")
        one = subject.plan(series="joint", terms=1)
        nodes = [n.model_copy(update={"centre": _has_centre(n.shape)}) if n.quantized else n
                 for n in plan.nodes]  # fmt: skip
        only_centre = [n if n.centre else n.model_copy(update={"terms": 1}) for n in nodes]
        centred = plan.model_copy(update={"nodes": only_centre})
        total = sum(float(np.prod(n.shape)) for n in plan.quantized)
        extra = sum(float(np.prod(n.shape[:2])) for n in nodes if n.centre) / total
        points = at_bits(plan, subject.errors(plan, False), 4 + 4 * extra)
        shown = [
            "{} ({})".format(*show(found))
            for found in (
                subject.judge(one),
                subject.judge_proto(_apart(subject, centred)),
                subject.judge(centred),
                subject.judge(with_points(plan, points)),
                subject.judge(plan),
            )
        ]
        made.add_row(subject.name, f"{_dominance(subject, centred):.1f}",
                     *shown[:3], f"{extra:.0%}", *shown[3:])  # fmt: skip
    Console(width=150).print(made)


def _has_centre(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2] > 1 and all(k % 2 for k in shape[2:])


def _dominance(subject: Subject, plan: Plan) -> float:
    """The largest centre weight by the largest other one of a channel, mean over channels."""
    ratios = []
    for entry, (_, weight) in match_plan(subject.canonical(), plan):
        if entry.centre:
            w = np.abs(weight.matrix().reshape(weight.shape))
            middle = tuple(k // 2 for k in weight.shape[2:])
            centre_taps = w[:, :, middle[0], middle[1]].max(axis=1)
            w[:, :, middle[0], middle[1]] = 0
            ratios.append(centre_taps / w.max(axis=(1, 2, 3)))
    return float(np.concatenate(ratios).mean())


def _apart(subject: Subject, plan: Plan) -> onnx.ModelProto:
    """The other variant: the second term holds the kernel without its centre tap."""
    from onnxq.kernels_ref import PerAxis, expand

    model = subject.canonical()
    new = {}
    for entry, (_, weight) in match_plan(model, plan):
        w = weight.matrix()
        if entry.centre:
            taps = int(np.prod(weight.shape[2:]))
            columns = np.arange(weight.shape[1]) * taps + taps // 2
            parts = np.zeros_like(w), w.copy()
            parts[0][:, columns] = w[:, columns]
            parts[1][:, columns] = 0
        else:
            parts = (w,)
        quantized = sum(
            expand("joint", p, bits=4, terms=1, granularity=PerAxis(0)).dequantize() for p in parts
        )
        new[weight.tensor.name] = weight.from_matrix(quantized).reshape(weight.shape)
    proto = to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.name in new:
            array = np.ascontiguousarray(new[tensor.name], np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def main(
    only: Annotated[
        str, typer.Option(help="share, rounded, search, size, offset, latency or centre.")
    ] = "",
    model: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    count: Annotated[int, typer.Option(help="Images that a classifier is judged on.")] = 200,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    for each in (share, rounded, search, size, offset, latency):
        if only in each.__name__:
            each(model, count)
    if only in "centre":
        centre()


if __name__ == "__main__":
    typer.run(main)
