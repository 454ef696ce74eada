"""The series of weights and activations on real models, without data: the paper's tables.

Every Conv and MatMul is computed in integers, depthwise ones too (which `onnxq quantize` leaves in
float where that is faster), so that W2A2 means all of them. Bits in all are bits × terms, products
the integer products per node (triangular rule, unless --products all). Classifiers: relative error
of the logits and agreement of the top class with the float model's, on real images. MiniLM:
relative error of the token embeddings and mean cosine of the sentence embeddings.

python benchmarks/series.py tables [--models cifar10_resnet20,…] [--bits 8x8,4x4,…] [--full]
python benchmarks/series.py curves [--models …] [--picture curves.svg]

Source of the experiment: arXiv 2412.06865 (W4A4, W3A3, W2A2 with several terms).
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import typer
from activation_terms import Setting
from real import CLASSIFIERS, MODELS, samples
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.kernels_ref.products import kept_products

Array = npt.NDArray[Any]

NAMES = (*CLASSIFIERS, "minilm_l6_v2")
BITS = (8, 4, 3, 2)
TERMS = (1, 2, 3, 4)
# Weights of 24 bits in all: next to their error, that of the activations is the only one.
FINE = (8, 3)
EVERY = ",".join(NAMES)
DIAGONAL = ",".join(f"{bits}x{bits}" for bits in BITS)
# Weights alone: until float32 rounding is all that is left, or as many as a plan may have.
FLOAT_BITS, MOST_TERMS = 32, 8
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Count = Annotated[int, typer.Option(help="Images, or sequences of 64 tokens.")]
Models = Annotated[str, typer.Option(help="Names, separated by commas.")]


@dataclass(frozen=True)
class Reference:
    """A model, its inputs, and its float outputs."""

    name: str
    feed: dict[str, Array]
    outputs: Array

    @classmethod
    def of(cls, name: str, count: int) -> Reference:
        feed = samples(name, count)
        return cls(name, feed, _outputs(MODELS / f"{name}.onnx", feed))

    @property
    def path(self) -> Path:
        return MODELS / f"{self.name}.onnx"

    @property
    def first(self) -> dict[str, Array]:
        return {key: value[:1] for key, value in self.feed.items()}

    def judge(self, target: Path) -> tuple[float, float]:
        """(Relative error, agreement of the top class or mean cosine)."""
        actual = _outputs(target, self.feed)
        error = np.linalg.norm(actual - self.outputs) / np.linalg.norm(self.outputs)
        if self.name in CLASSIFIERS:
            same = actual.argmax(1) == self.outputs.argmax(1)
            return float(error), float(same.mean())
        one, other = (_unit(tokens.mean(1)) for tokens in (self.outputs, actual))
        return float(error), float((one * other).sum(1).mean())


def _outputs(path: Path, feed: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    count = len(next(iter(feed.values())))
    runs = ({key: value[i : i + 1] for key, value in feed.items()} for i in range(count))
    return np.concatenate([session.run(None, one)[0] for one in runs])


def _unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def _references(models: str, count: int) -> list[Reference]:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    return [Reference.of(name, count) for name in models.split(",")]


@app.command()
def tables(
    count: Count = 100,
    models: Models = EVERY,
    bits: Annotated[str, typer.Option(help="Weights x activations, or all.")] = DIAGONAL,
    full: Annotated[bool, typer.Option(help="Every number of terms with every other.")] = False,
    products: Annotated[str, typer.Option(help="triangular or all.")] = "triangular",
) -> None:
    """Error and agreement against bits and terms of weights and activations."""
    pairs = list(product(BITS, BITS)) if bits == "all" else list(map(_pair, bits.split(",")))
    terms = list(product(TERMS, TERMS)) if full else [(n, n) for n in TERMS]
    for reference in _references(models, count):
        measure = "agreement" if reference.name in CLASSIFIERS else "cosine"
        table = Table(title=f"{reference.name}, {count} samples, no data", title_justify="left")
        table.add_column("bits W×A")
        for name in ("terms", "bits in all", "products", "rel. error", measure):
            table.add_column(name, justify="right")
        for (wide, narrow), (n, m) in product(pairs, terms):
            setting = Setting(wide, n, narrow, m, products, depthwise=True)  # type: ignore[arg-type]
            table.add_row(*_row(reference, setting))
        Console(width=90).print(table)


def _pair(text: str) -> tuple[int, int]:
    weight, activation = text.split("x")
    return int(weight), int(activation)


def _row(reference: Reference, setting: Setting) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "q.onnx"
        setting.write(reference.path, target, reference.first)
        error, agreement = reference.judge(target)
    kept = kept_products(setting.terms, setting.activation_terms, setting.products)
    weight, activation = setting.weight_bits, setting.activation_bits
    return [
        f"{weight}×{activation}",
        f"{setting.terms}×{setting.activation_terms}",
        f"{weight * setting.terms}×{activation * setting.activation_terms}",
        str(len(kept)),
        f"{error:.2e}",
        f"{agreement:.5f}" if reference.name not in CLASSIFIERS else f"{agreement:.2f}",
    ]


@dataclass(frozen=True)
class Curve:
    """Errors of one model with 1, 2, … terms, and what the bound falls by per term."""

    model: str
    what: str
    bits: int
    factor: int
    errors: list[float]

    @property
    def measured(self) -> list[float]:
        return [a / b for a, b in zip(self.errors, self.errors[1:], strict=False)]


@app.command()
def curves(
    count: Count = 16,
    models: Models = EVERY,
    bits: Annotated[str, typer.Option(help="Bits per term.")] = "4,2",
    picture: Annotated[Path | None, typer.Option(help="Draw them (needs matplotlib).")] = None,
) -> None:
    """Error against the number of terms: of weights, of activations, of both."""
    found = [
        curve
        for reference in _references(models, count)
        for width in map(int, bits.split(","))
        for curve in _curves(reference, width)
    ]
    table = Table(title=f"relative error by terms, {count} samples", title_justify="left")
    for name in ("model", "terms of", "bits", "error with 1, 2, … terms", "falls by", "bound"):
        table.add_column(name)
    for curve in found:
        errors = " ".join(f"{error:.1e}" for error in curve.errors)
        factors = " ".join(f"{factor:.3g}" for factor in curve.measured)
        table.add_row(curve.model, curve.what, str(curve.bits), errors, factors, str(curve.factor))
    Console(width=140).print(table)
    if picture is not None:
        _draw(found, picture)


def _curves(reference: Reference, bits: int) -> Iterator[Curve]:
    """Weights alone: fixed ratio. With activations: the default series (digits)."""
    depth = min(MOST_TERMS, FLOAT_BITS // bits)
    weights = {"weight_bits": bits, "activations": "none", "series": "fixed_ratio"}
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "q.onnx"
        for n in range(1, depth + 1):
            onnxq.quantize(reference.path, target, terms=n, data=reference.first, **weights)
            errors.append(reference.judge(target)[0])
        yield Curve(reference.name, "weights", bits, 2**bits - 2, errors)
        activations = [Setting(*FINE, bits, m, "all", depthwise=True) for m in TERMS]
        both = [Setting(bits, n, bits, n, depthwise=True) for n in TERMS]
        for what, settings in (("activations", activations), ("both", both)):
            errors = []
            for setting in settings:
                setting.write(reference.path, target, reference.first)
                errors.append(reference.judge(target)[0])
            yield Curve(reference.name, what, bits, 2**bits - 1, errors)


def _draw(found: list[Curve], picture: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (the extra `plot` has it)")
        return
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    whats = list(dict.fromkeys(curve.what for curve in found))
    figure = Figure(figsize=(4 * len(whats), 3.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, len(whats), sharey=True, squeeze=False)[0]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(c.model for c in found))}
    for axis, what in zip(axes, whats, strict=True):
        for curve in (c for c in found if c.what == what):
            terms = range(1, len(curve.errors) + 1)
            style = {4: "-o", 2: "--s"}.get(curve.bits, ":^")
            label = f"{curve.model}, {curve.bits} bits"
            axis.semilogy(terms, curve.errors, style, color=colours[curve.model], label=label)
        most = max(len(curve.errors) for curve in found if curve.what == what)
        axis.set(title=f"terms of {what}", xlabel="terms", xticks=range(1, most + 1))
        axis.grid(visible=True, axis="y", alpha=0.3)
    axes[0].set_ylabel("relative error of the output")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside right center")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    app()
