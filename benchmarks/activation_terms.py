"""What terms of the activation gain and cost in dynamic integer compute, without data.

MiniLM: cosine of sentence embeddings with the float model's (mean over the tokens that the mask
keeps; mean and least over sequences), 16 sequences of 64 tokens. MobileNet: agreement of the top
class with the float model's, on the 436 images that nothing is calibrated on. Latency: one thread,
median ratio to float in interleaved runs.

python benchmarks/activation_terms.py minilm|mobilenet [--rounds 10]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import typer
from real import MODELS, imagenet, samples
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.comparison import paired_ratios, time_in_turns

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """Bits and terms of weights and activations; depthwise: also those in integers."""

    weight_bits: int
    terms: int
    activation_bits: int
    activation_terms: int
    products: Literal["all", "triangular"] | int = "triangular"
    layout: Literal["parallel", "merged"] = "parallel"
    depthwise: bool = False

    def write(self, source: Path, target: Path, data: dict[str, Array]) -> onnxq.Plan:
        made = onnxq.quantize(
            source,
            None if self.depthwise else target,
            data=data,
            target="cpu-avx2",
            weight_bits=self.weight_bits,
            terms=self.terms,
            activation_bits=self.activation_bits,
            activation_terms=self.activation_terms,
            products=self.products,
            layout=self.layout,
        )
        if not self.depthwise:
            return made.plan
        update = {
            "activations": "dynamic",
            "activation_bits": self.activation_bits,
            "activation_terms": self.activation_terms,
            "products": self.products,
            "note": None,
        }
        nodes = [
            node.model_copy(update=update) if "depthwise" in (node.note or "") else node
            for node in made.plan.nodes
        ]
        plan = made.plan.model_copy(update={"nodes": nodes})
        return onnxq.quantize(source, target, plan=plan, data=data).plan

    @property
    def row(self) -> list[str]:
        weights = f"{self.weight_bits}×{self.terms}" + (" merged" * (self.layout == "merged"))
        activations = f"{self.activation_bits}×{self.activation_terms}"
        return [weights, activations, str(self.products) + (", depthwise too" * self.depthwise)]


MINILM = (
    *(Setting(8, n, 8, m) for n in (1, 2) for m in (1, 2)),
    *(Setting(8, n, 7, m) for n in (1, 2) for m in (1, 2)),
    Setting(7, 1, 8, 1),
    Setting(7, 1, 8, 2),
    Setting(7, 2, 8, 2),
    Setting(4, 2, 7, 2, layout="merged"),
    Setting(8, 2, 8, 2, "all"),
)
MOBILENET = (
    *(Setting(8, n, 8, m) for n in (1, 2) for m in (1, 2)),
    Setting(8, 2, 7, 2),
    Setting(7, 2, 8, 2),
    Setting(7, 2, 7, 2),
    Setting(8, 2, 8, 2, depthwise=True),
)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _embeddings(session: ort.InferenceSession, feed: dict[str, Array]) -> Array:
    tokens = session.run(None, feed)[0]
    mask = feed["attention_mask"][..., None].astype(np.float32)
    mean = (tokens * mask).sum(1) / mask.sum(1)
    return np.asarray(mean / np.sqrt(np.square(mean).sum(1, keepdims=True)))


def _logits(session: ort.InferenceSession, feed: dict[str, Array]) -> Array:
    ((name, x),) = feed.items()
    return np.concatenate([session.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))])


def _cosine(reference: Array, actual: Array) -> list[str]:
    cosines = (reference * actual).sum(1)
    return [f"{cosines.mean():.6f}", f"{cosines.min():.6f}"]


def _agreement(reference: Array, actual: Array) -> list[str]:
    agree = float(np.mean(reference.argmax(1) == actual.argmax(1)))
    error = np.linalg.norm(actual - reference) / np.linalg.norm(reference)
    return [f"{agree:.4f}", f"{error:.2e}"]


@dataclass(frozen=True)
class Task:
    """A model, its inputs, and how its outputs are judged."""

    path: Path
    settings: tuple[Setting, ...]
    feed: dict[str, Array]
    timed: dict[str, Array]
    outputs: Callable[[ort.InferenceSession, dict[str, Array]], Array]
    judge: Callable[[Array, Array], list[str]]
    columns: tuple[str, str]

    @classmethod
    def named(cls, name: str) -> Task:
        if name == "minilm":
            path = MODELS / "minilm_l6_v2.onnx"
            feed = samples(path.stem, 16)
            return cls(path, MINILM, feed, feed, _embeddings, _cosine, ("cosine", "least"))
        path = MODELS / "mobilenet_v1_0.75_224.onnx"
        (given,) = _session(path).get_inputs()
        feed = {given.name: imagenet("tf", 64, 500)[0]}
        one = {key: value[:1] for key, value in feed.items()}
        return cls(path, MOBILENET, feed, one, _logits, _agreement, ("agreement", "rel. error"))


def main(
    model: Annotated[str, typer.Argument(help="minilm or mobilenet.")] = "minilm",
    rounds: Annotated[int, typer.Option(help="Interleaved timing rounds.")] = 10,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    task = Task.named(model)
    table = Table(title=f"{task.path.stem}, dynamic integer compute", title_justify="left")
    for name in ("weights", "activations", "products"):
        table.add_column(name)
    for name in ("nodes", *task.columns, "size", "latency"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for row in _measure(task, Path(folder), rounds):
            table.add_row(*row)
    Console(width=110).print(table)


def _measure(task: Task, folder: Path, rounds: int) -> list[list[str]]:
    sessions, rows = [_session(task.path)], []
    reference = task.outputs(sessions[0], task.feed)
    one = {key: value[:1] for key, value in task.feed.items()}
    for index, setting in enumerate(task.settings):
        target = folder / f"{index}.onnx"
        plan = setting.write(task.path, target, one)
        sessions.append(_session(target))
        found = task.judge(reference, task.outputs(sessions[-1], task.feed))
        dynamic = sum(node.activations == "dynamic" for node in plan.quantized)
        size = target.stat().st_size / task.path.stat().st_size
        rows.append([*setting.row, str(dynamic), *found, f"{size:.2f}"])
    runs = [lambda s=session: s.run(None, task.timed) for session in sessions]
    ratios = np.median(paired_ratios(time_in_turns(runs, warmup=1, rounds=rounds, seconds=300)), 0)
    return [[*row, f"{ratio:.2f}"] for row, ratio in zip(rows, ratios[1:], strict=True)]


if __name__ == "__main__":
    typer.run(main)
