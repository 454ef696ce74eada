"""Adaptive bits against the same bits everywhere, what a tolerance costs, and what a default does.

python benchmarks/adaptive.py sizes      error at equal file sizes
python benchmarks/adaptive.py tolerance  average weight bits that a tolerance takes
python benchmarks/adaptive.py defaults   settings without data, on every model
python benchmarks/adaptive.py flips      what top1 is expected to lose, and what is lost
python benchmarks/adaptive.py made-up    defaults without data, errors on made-up and real inputs
Everything is judged on samples that neither calibration nor search saw.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Annotated

import numpy as np
import typer
from accuracy import RLFN, reduced
from real import CLASSIFIERS, MODELS, REAL, classifier_data, samples
from rich.console import Console
from rich.table import Table

from onnxq.allocate import Goal, Infeasible, allocate, allocate_without_data, split
from onnxq.budgeted import TRIED_ROWS
from onnxq.calibrate_weights import calibrate_weights
from onnxq.candidates import EFFICIENT, INTEGER, bits, units
from onnxq.feeds import load_data, made_up_feeds
from onnxq.meter import Meter
from onnxq.model import load, to_proto
from onnxq.options import Options
from onnxq.passes import SelectNodes
from onnxq.passes.node_samples import MOST_ROWS
from onnxq.pipeline import canonicalize
from onnxq.plan import Plan
from onnxq.report import weight_bits
from onnxq.rounding_factors import with_rounding
from onnxq.search import TRIALS, Search
from onnxq.sensitivity import measure
from onnxq.session import input_specs, open_session, run
from onnxq.tolerance import Tolerance
from onnxq.trial import Trial

FIVE = (
    "mobilenet_v1_0.75_224",
    "squeezenet1.1",
    "cifar10_resnet20",
    "sr_rlfn_x4",
    "minilm_l6_v2",
)
UNIFORM = (
    bits(4, block_size=64),
    bits(4, block_size=32),
    bits(5),
    bits(6),
    bits(8),
    bits(4, terms=3),
)
# The signal to noise ratio stands for a tenth of a decibel of PSNR, which is counted, too.
TOLERANCES = {"sr_rlfn_x4": "sqnr=40dB", "minilm_l6_v2": "cosine=0.999"}
CALIBRATION = {"minilm_l6_v2": 32}
THREADS = 1  # several would wait for each other where the machine does other work, too
UNSEEN = {"cifar10_resnet20": 1936, "sr_rlfn_x4": 16, "minilm_l6_v2": 32}
app = typer.Typer(add_completion=False)
console = Console(width=150)
Only = Annotated[str, typer.Option(help="Part of a model's name.")]
Rounded = Annotated[bool, typer.Option(help="Round to the calibration samples.")]


class Real:
    """A canonical model, calibration feeds, and unseen ones with their labels."""

    def __init__(self, name: str, calibration: int = 64, unseen: int = 236) -> None:
        self.model = load(MODELS / f"{name}.onnx")
        canonicalize(self.model)
        self.plan = SelectNodes(bits=4, terms=1, activations="none", layout="merged")(self.model)
        self.session = open_session(to_proto(self.model).SerializeToString(), threads=THREADS)
        count = CALIBRATION.get(name, calibration)
        total = count + UNSEEN.get(name, unseen)
        label = None
        if name in CLASSIFIERS:
            data = classifier_data(name, total)
            label = data.pop("label")
        else:
            data = samples(name, total)
        feeds = list(load_data(data, input_specs(self.session)))
        if name == RLFN:
            feeds = reduced(total)
        self.calibration, self.unseen = feeds[:count], feeds[count:]
        self.label = None if label is None else label[count:]
        self.wanted = [run(self.session, feed) for feed in self.unseen]

    def judge(self, written):
        """(Measured without labels, accuracy lost with labels in points) on unseen samples."""
        session = open_session(written, threads=THREADS)
        meter, counted = Meter(), Meter()
        for i, (feed, wanted) in enumerate(zip(self.unseen, self.wanted, strict=True)):
            got = run(session, feed)
            meter.add(wanted, got)
            if self.label is not None:
                counted.add(wanted, got, self.label[i : i + 1])
        lost = None if self.label is None else 100 * counted.measured().top1.value
        return meter.measured(), lost

    def refine(self, fit, notes, rows=MOST_ROWS):
        def refined(model, plan):
            made, said = calibrate_weights(model, plan, fit, rows=rows, threads=THREADS)
            notes.extend(said)
            return made

        return refined


def psnr_lost(written) -> float:
    """Y-PSNR lost on set5, in dB."""
    from PIL import Image

    found = []
    folder = REAL / "data" / "set5"
    sessions = [open_session(MODELS / "sr_rlfn_x4.onnx"), open_session(written)]
    low = sorted(p for p in folder.rglob("*") if p.is_file() and "lr" in str(p).lower())
    high = sorted(p for p in folder.rglob("*") if p.is_file() and "hr" in str(p).lower())
    for one, other in zip(low, high, strict=True):
        x = np.asarray(Image.open(one).convert("RGB"), np.float32).transpose(2, 0, 1)[None]
        y = np.asarray(Image.open(other).convert("RGB"), np.float32).transpose(2, 0, 1)[None]
        row = []
        for session in sessions:
            made = np.clip(np.round(session.run(None, {"lr": x})[0]), 0, 255)
            weight = np.array([65.481, 128.553, 24.966])[:, None, None] / 255
            gap = np.sum((made - y)[..., 4:-4, 4:-4] * weight, axis=1)
            row.append(10 * np.log10(255**2 / np.mean(gap**2)))
        found.append(row)
    exact, quantized = np.mean(found, axis=0)
    return float(exact - quantized)


def nominal_bits(plan) -> float:
    """Bits of the integers per parameter, scales not counted; 32 for nodes left in float."""
    counts = [float(np.prod(node.shape)) if node.shape else 0.0 for node in plan.nodes]
    bits = [32 if node.reason is not None else node.terms * node.bits for node in plan.nodes]
    return float(np.dot(counts, bits) / sum(counts))


def shown(wanted, measured) -> str:
    """What was measured, with its standard error in percent of it."""
    loss = wanted.loss(measured)
    share = 100 * loss.spread / loss.value if loss.value else 0.0
    return f"{wanted.shown(measured)} ±{share:.0f}%"


def _there() -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)


@app.command()
def sizes(only: Only = "", rounded: Rounded = False) -> None:
    _there()
    names = ("model", "uniform", "size", "bits", "rel. error", "adaptive bits", "rel. error")
    table = Table(*names, "top-1 lost uniform", "adaptive")
    for name in (n for n in FIVE if only in n):
        real = Real(name)
        fit, judge = split(real.calibration, refined=rounded)
        refine = real.refine(fit, []) if rounded else None
        costs = measure(real.model, real.plan, EFFICIENT, fit, threads=THREADS)
        if rounded:
            costs = with_rounding(real.model, real.plan, costs, fit)
        with Trial(real.model, judge, THREADS) as trial:
            costs = trial.exact_bytes(costs, real.plan)
            for candidate in UNIFORM:
                option = EFFICIENT.index(candidate)
                coarse = EFFICIENT.index(bits(int(candidate.change["bits"])))
                coarse = coarse if candidate.change["block_size"] else option
                same = tuple(option if np.isfinite(r[option]) else coarse for r in costs.error)
                plan = costs.plan(real.plan, same)
                uniform = trial.write(refine(real.model, plan) if refine else plan)
                goal = Goal(max_bytes=len(uniform), minimize="error")
                search = Search(real.model, real.plan, goal, costs, trial, refine=refine)
                found = search.least_error()
                measured, lost = real.judge(uniform)
                ours, our_loss = real.judge(trial.write(found.plan))
                table.add_row(
                    name,
                    candidate.name,
                    str(len(uniform)),
                    f"{weight_bits(plan):.2f}",
                    f"{100 * measured.relative_error:.3f}%",
                    f"{weight_bits(found.plan):.2f}",
                    f"{100 * ours.relative_error:.3f}%",
                    "–" if lost is None else f"{lost:.2f}",
                    "–" if our_loss is None else f"{our_loss:.2f}",
                )
                print(*table.columns[0]._cells[-1:], [c._cells[-1] for c in table.columns[1:]])
    console.print(table)


@app.command()
def tolerance(
    only: Only = "",
    rounded: Rounded = False,
    samples: Annotated[int, typer.Option(help="Of the calibration samples, to round to.")] = 64,
    trials: Annotated[int, typer.Option(help="Measurements of the whole model.")] = 6,
    unseen: Annotated[int, typer.Option(help="Images to judge on.")] = 436,
    factors: Annotated[bool, typer.Option(help="Correct sensitivities for rounding.")] = True,
) -> None:
    _there()
    names = ("model", "tolerance", "bits", "nominal", "size", "searched", "unseen", "counted")
    names = (*names, "chosen", "CPU s")
    table = Table(*names)
    for name in (n for n in FIVE if only in n):
        real = Real(name, unseen=unseen)
        fit, judge = split(real.calibration, refined=rounded)
        wanted = Tolerance.parse(TOLERANCES.get(name, "top1=0.5pt"))
        start = time.process_time()
        try:
            found = allocate(
                real.model,
                real.plan,
                fit,
                Goal(tolerance=wanted),
                refine=real.refine(list(fit)[:samples], [], TRIED_ROWS) if rounded else None,
                finish=real.refine(real.calibration[:samples], []) if rounded else None,
                rounded=rounded and factors,
                trials=trials if rounded else TRIALS,
                judge=judge,
                threads=THREADS,
            )
        except Infeasible as error:
            print(error)
            found = error.closest
        spent = time.process_time() - start
        with Trial(real.model, (), THREADS) as trial:
            written = trial.write(found.plan)
            share = f"{len(written) / trial.float_bytes:.3f}"
        measured, lost = real.judge(written)
        counted = "–" if lost is None else f"{lost:+.2f}pt"
        if name == "sr_rlfn_x4":
            counted = f"{psnr_lost(written):+.3f}dB"
        row = (
            name,
            str(wanted),
            f"{weight_bits(found.plan):.2f}",
            f"{nominal_bits(found.plan):.2f}",
            share,
            shown(wanted, found.measured),
            shown(wanted, measured),
            counted,
            " ".join(f"{k}:{v}" for k, v in found.chosen.items()),
            f"{spent:.0f}",
        )
        print(row, [(s, shown(wanted, m)) for s, m in found.trials], flush=True)
        table.add_row(*row)
    console.print(table)


@app.command()
def defaults(only: Only = "") -> None:
    _there()
    table = Table("model", "setting", "size", "bits", "estimate", "rel. error", "top-1 lost")
    for path in (p for p in sorted(MODELS.glob("*.onnx")) if only in p.stem):
        real = Real(path.stem, calibration=1, unseen=200 if path.stem in CLASSIFIERS else 8)
        plans = {}
        for width, terms in ((4, 1), (4, 2), (8, 1), (4, 3), (8, 2)):
            select = SelectNodes(bits=width, terms=terms, activations="none", layout="merged")
            plans[f"{width}x{terms}"] = select(real.model), None
        for percent in (20, 10, 5, 2, 1):
            goal = Goal(tolerance=Tolerance.parse(f"error={percent}%"))
            found = allocate_without_data(real.model, real.plan, goal)
            plans[f"error={percent}%"] = found.plan, found.predicted
        with Trial(real.model, (), THREADS) as trial:
            for setting, (plan, predicted) in plans.items():
                written = trial.write(plan)
                measured, lost = real.judge(written)
                row = (
                    path.stem,
                    setting,
                    f"{len(written) / trial.float_bytes:.3f}",
                    f"{weight_bits(plan):.2f}",
                    "–" if predicted is None else f"{100 * predicted**0.5:.2f}%",
                    f"{100 * measured.relative_error:.2f}%",
                    "–" if lost is None else f"{lost:+.2f}",
                )
                print(*row, flush=True)
                table.add_row(*row)
    console.print(table)


@app.command()
def flips(only: Only = "", unseen: Annotated[int, typer.Option(help="Images.")] = 436) -> None:
    """Weights rounded to nearest: expected from 64 samples, of unseen ones, and what happened."""
    _there()
    names = ("model", "weights", "expected from 64", "of unseen", "happened", "counted by labels")
    table = Table(*names)
    for name in (n for n in CLASSIFIERS if only in n):
        real = Real(name, unseen=unseen)
        fit, judge = split(real.calibration, refined=True)
        every = units(real.model, real.plan)
        with Trial(real.model, judge, THREADS, fit) as trial:
            for candidate in (EFFICIENT[3], EFFICIENT[4]):
                entries = [(unit.apply(candidate) or unit.entries)[0] for unit in every]
                written = trial.write(Plan(nodes=entries))
                measured, lost = real.judge(written)
                found = [100 * m.top1.value for m in (trial.measure(written), measured)]
                row = (name, candidate.name, *(f"{x:.2f}" for x in found))
                row = (*row, f"{100 * happened(real, written):.2f}", f"{lost:.2f}")
                print(*row, flush=True)
                table.add_row(*row)
    console.print(table)


def happened(real: Real, written) -> float:
    """What the flips on unseen samples cost by the float model's own probabilities.

    The mean for the quantized output and for one that errs as much to the other side: that halves
    the variance.
    """
    session = open_session(written, threads=THREADS)
    wanted = np.concatenate([w[0].reshape(1, -1) for w in real.wanted]).astype(np.float64)
    got = np.concatenate([run(session, feed)[0].reshape(1, -1) for feed in real.unseen])
    likely = np.exp(wanted - wanted.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    rows, own = np.arange(len(wanted)), wanted.argmax(axis=1)
    both = [output.argmax(axis=1) for output in (got, 2 * wanted - got)]
    return float(np.mean([likely[rows, own] - likely[rows, other] for other in both]))


@app.command()
def made_up(
    only: Only = "", count: Annotated[int, typer.Option(help="Real samples.")] = 12
) -> None:
    """What `quantize` does without data: sizes, and errors on made-up and on real inputs."""
    _there()
    table = Table("model", "default", "estimate alone", "tried on made-up inputs", "said")
    for path in sorted((p for p in MODELS.glob("*.onnx") if only in p.stem), key=_bytes):
        for activations, candidates in (("dynamic", INTEGER), ("none", EFFICIENT)):
            model = load(path)
            canonicalize(model)
            options = Options(activations=activations)
            plan = options.select()(model)
            session = open_session(to_proto(model).SerializeToString(), threads=THREADS)
            specs = input_specs(session)
            feeds = made_up_feeds(specs, {}, partial(run, session))
            quantized = [one for one in candidates if one.quantized]
            goal = Goal(tolerance=Tolerance.parse(options.tolerance_for(plan)))
            row = [path.stem, f"{activations}, {goal.tolerance}"]
            with Trial(model, load_data(samples(path.stem, count), specs), THREADS) as trial:
                for inputs in ((), feeds):
                    try:
                        found = allocate_without_data(
                            model, plan, goal, candidates=quantized, made_up=inputs, threads=THREADS
                        )
                    except Infeasible as error:
                        found = error.closest
                    written = trial.write(found.plan)
                    error = 100 * trial.measure(written).relative_error
                    row.append(f".{1000 * len(written) // trial.float_bytes:03}, {error:.2g} %")
            row.append(found.stated)
            print(*row, sep=" | ", flush=True)
            table.add_row(*row)
    console.print(table)


def _bytes(path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    app()
