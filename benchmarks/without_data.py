"""What planning can do without data: kernels for smooth inputs, biases by BatchNormalization.

python benchmarks/without_data.py [--only resnet] [--bits 4] [--terms 1] [--noise]

Float compute, one scale per channel. `--noise`: made-up images as calibration samples instead.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from real import CLASSIFIERS, MODELS, classifier_data, samples
from rich.console import Console
from rich.table import Table

from onnxq.calibrate_weights import calibrate_weights
from onnxq.kernels_ref import ErrorSums
from onnxq.model import Model, load, raise_opset, to_proto
from onnxq.passes import PIPELINE, Expand, SearchScales, SelectNodes, SplitBatchNorm, required_opset
from onnxq.passes.channel_statistics import ChannelMoments, channel_statistics
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.plan import Plan
from onnxq.session import open_session, run
from onnxq.without_data import complete

DEMO = Path(__file__).parents[1] / "models"
OTHERS = ("ch_PP-OCRv3_det_infer", "version-RFB-320", "sr_rlfn_x4", "magika_standard_v3_3")
JUDGED = {"cifar10_resnet20": 300, "digits_repvgg": 450}
NOISE = 32
Moments = Mapping[str, ChannelMoments]


class Subject:
    """A model, what its BatchNormalizations tell, and samples to judge it on."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        folder = DEMO if name == "digits_repvgg" else MODELS
        self.source = onnx.load(folder / f"{name}.onnx")
        data = self._data(JUDGED.get(name, count))
        self.feeds = [
            {key: array[i : i + 1] for key, array in data.items()}
            for i in range(len(next(iter(data.values()))))
        ]
        self.wanted = self._outputs(self.source)

    def _data(self, count: int) -> dict[str, np.ndarray]:
        if self.name == "digits_repvgg":
            return {"image": np.load(DEMO / "digits_test.npz")["image"][:count]}
        if self.name in CLASSIFIERS:
            return {"input": classifier_data(self.name, count)["input"]}
        return samples(self.name, 4 if self.name == "sr_rlfn_x4" else count)

    def canonical(self) -> tuple[Model, Moments]:
        model, moments = load(self.source), {}
        for pass_ in PIPELINE:
            if isinstance(pass_, SplitBatchNorm):
                moments = channel_statistics(model)
            pass_(model)
        return model, moments

    def _outputs(self, proto: onnx.ModelProto) -> list[np.ndarray]:
        session = open_session(proto.SerializeToString(), threads=1)
        return [run(session, feed)[0] for feed in self.feeds]

    def judge(self, model: Model, plan: Plan) -> str:
        raised = raise_opset(model, required_opset(plan))
        Expand(plan)(raised)
        sums = ErrorSums()
        for wanted, found in zip(self.wanted, self._outputs(to_proto(raised)), strict=True):
            sums.add(wanted, found)
        classes = self.name in CLASSIFIERS or self.name == "digits_repvgg"
        return f"{sums.relative_error:.4f}" + (f" ({sums.top1_agreement:.3f})" if classes else "")

    def made_up(self, smooth: bool) -> list[dict[str, np.ndarray]]:
        """Images of the inputs' shape, mean 0 and deviation 1."""
        rng = np.random.default_rng(0)
        (key, one), *_ = self.feeds[0].items()
        return [{key: picture(rng, one.shape, smooth)} for _ in range(NOISE)]


def picture(rng: np.random.Generator, shape: tuple[int, ...], smooth: bool) -> np.ndarray:
    """Normal noise; smooth: with the spectrum of photographs, 1/frequency."""
    x = rng.standard_normal(shape)
    if smooth:
        fy, fx = (np.fft.fftfreq(n)[:, None] * n for n in shape[2:])
        size = np.sqrt(np.square(fy) + np.square(fx.T))
        spectrum = np.fft.fft2(x) / np.maximum(size, 1.0)
        x = np.fft.ifft2(spectrum).real
        x += x.mean(axis=1, keepdims=True) * 2  # colours are less than brightness
        x = (x - x.mean()) / x.std()
    return x.astype(np.float32)


def planned(model: Model, bits: int, terms: int, *, offset: bool = True) -> Plan:
    select = SelectNodes(bits=bits, terms=terms, activations="none", layout="merged", offset=offset)
    return SearchScales()(model, select(model))


def nearest(model: Model, plan: Plan) -> Plan:
    """The plan with the integers that rounding to nearest gives, which `complete` keeps."""
    integers = {}
    for entry, (_, weight) in match_plan(model, plan):
        series = node_series(weight, entry, plan)
        integers[entry.name] = tuple(term.q.astype(np.int8) for term in series.terms)
    return plan.model_copy(update={"integers": integers})


def steps(subject: Subject, bits: int, terms: int) -> list[str]:
    row = []
    for offset in (True, False):
        for rounded, corrected in ((False, False), (False, True), (True, False), (True, True)):
            model, moments = subject.canonical()
            plan = planned(model, bits, terms, offset=offset)
            if not rounded:
                plan = nearest(model, plan)
            plan, _ = complete(model, plan, moments if corrected else {})
            row.append("–" if corrected and not moments else subject.judge(model, plan))
    return row


def noise(subject: Subject, bits: int, terms: int) -> list[str]:
    model, moments = subject.canonical()
    row = [subject.judge(model, complete(model, planned(model, bits, terms), moments)[0])]
    for smooth in (False, True):
        for options in ({}, {"rounding": "nearest", "measure": "absmax"}):
            model, _ = subject.canonical()
            plan = planned(model, bits, terms, offset=bool(options))
            found, _ = calibrate_weights(model, plan, subject.made_up(smooth), **options)
            row.append(subject.judge(model, found))
    return row


def main(
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    bits: Annotated[int, typer.Option(help="Bits of a term.")] = 4,
    terms: Annotated[int, typer.Option(help="Terms per weight.")] = 1,
    count: Annotated[int, typer.Option(help="Samples to judge on.")] = 48,
    made_up: Annotated[bool, typer.Option("--noise", help="Calibrate on noise.")] = False,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    columns = (
        ("without data", "normal noise", "its means alone", "1/f noise", "its means alone")
        if made_up
        else ("offset", "bias", "smooth", "both", "no offset", "bias", "smooth", "both")
    )
    table = Table(title=f"{terms} × {bits} bits; rel. error (agreement)", title_justify="left")
    for column in ("model", *columns):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("digits_repvgg", *CLASSIFIERS, *OTHERS):
        if only in name:
            subject = Subject(name, count)
            if made_up and subject.feeds[0][next(iter(subject.feeds[0]))].ndim != 4:
                continue
            table.add_row(name, *(noise if made_up else steps)(subject, bits, terms))
            print(name, flush=True)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
