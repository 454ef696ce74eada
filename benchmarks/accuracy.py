"""What calibration brings real models, step by step: 4-bit weights, one term per channel.

python benchmarks/accuracy.py [--bits 4] [--only squeezenet] [--steps "absmax;all"] [--judged 264]

Weights alone are quantized (float compute), so that nothing else is measured. Calibrated on 64
samples, judged on others: top-1 in points against the float model and agreement with it, PSNR of
the luminance on set5, or the cosine of sentence embeddings. MiniLM has blocks of 32.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from real import _MEAN, _STD, CLASSIFIERS, MODELS, REAL, classifier_data, imagenet, samples
from rich.console import Console
from rich.table import Table

from onnxq.calibrate_weights import calibrate_weights
from onnxq.feeds import Feed
from onnxq.model import load, raise_opset, to_proto
from onnxq.passes import Equalize, Expand, SelectNodes, required_opset
from onnxq.pipeline import apply, canonicalize
from onnxq.refine_blocks import refine_blocks
from onnxq.session import open_session, run

CALIBRATED, MINILM, RLFN = 64, "minilm_l6_v2", "sr_rlfn_x4"
JUDGED = {"cifar10_resnet20": 2000, "squeezenet1.1": 500, "mobilenet_v1_0.75_224": 500}
OFF: dict[str, Any] = {
    "measure": "absmax",
    "rounding": "nearest",
    "bias_correction": False,
    "offset": False,
}
STEPS: dict[str, dict[str, Any]] = {
    "absmax": OFF,
    "clip": {**OFF, "measure": "mse"},
    "clip by mae": {**OFF, "measure": "mae"},
    "bias": {**OFF, "bias_correction": True},
    "affine": {**OFF, "affine": "mae"},
    "offset": {**OFF, "offset": True},
    "rounding": {**OFF, "rounding": "second_order"},
    "all but clip": {"measure": "absmax"},
    "all but bias": {"bias_correction": False},
    "all but rounding": {"rounding": "nearest", "offset": False},
    "all but sums": {"sums": False},
    "all but descent": {"descent": False},
    "all but offset": {"offset": False},
    "all": {},
    "all, clip by mae": {"measure": "mae"},
    "all, and affine": {"affine": "mae"},
    "all, and equalize": {"equalize": True},
    "all, and blocks": {"blocks": True},
}


def feeds_of(data: dict[str, np.ndarray]) -> list[Feed]:
    count = len(next(iter(data.values())))
    return [{name: array[i : i + 1] for name, array in data.items()} for i in range(count)]


def calibration(name: str) -> list[Feed]:
    """64 samples that `Judge` leaves out."""
    if name == "cifar10_resnet20":
        x = np.load(REAL / "data" / "cifar10_jpeg.npz")["x_calibration"][:CALIBRATED]
        scaled = x.astype(np.float32).transpose(0, 3, 1, 2) / 255
        return feeds_of({"input": ((scaled - _MEAN) / _STD).astype(np.float32)})
    if name == MINILM:  # its judge takes the first ones
        return feeds_of(samples(name, 2 * CALIBRATED))[CALIBRATED:]
    if name == RLFN:
        return reduced(CALIBRATED)
    return feeds_of(samples(name, CALIBRATED))


def reduced(count: int) -> list[Feed]:
    """Photographs reduced to a quarter, as set5's are: what a network that enlarges them gets."""
    from PIL import Image

    sharp = imagenet("tf", 0, count)[0]
    pictures = [Image.fromarray(np.uint8((x.transpose(1, 2, 0) + 1) * 127.5)) for x in sharp]
    size = (sharp.shape[3] // 4, sharp.shape[2] // 4)
    small = [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
    return [{"lr": np.asarray(x, np.float32).transpose(2, 0, 1)[np.newaxis]} for x in small]


class Judge:
    """Scores of a model on samples that calibration has not seen, against the float model."""

    def __init__(self, name: str, proto: onnx.ModelProto, threads: int, most: int) -> None:
        self.name, self.threads = name, threads
        self.label: np.ndarray | None = None
        if name in CLASSIFIERS:
            data = classifier_data(name, min(JUDGED[name], most))
            # CIFAR-10 has other images for calibration.
            start = 0 if name == "cifar10_resnet20" else CALIBRATED
            self.label = data.pop("label")[start:]
            self.feeds = feeds_of(data)[start:]
        elif name == RLFN:
            self.feeds, self.sharp = set5()
        else:
            self.feeds = feeds_of(samples(name, CALIBRATED))
        self.wanted = self._outputs(proto)

    def _outputs(self, proto: onnx.ModelProto) -> list[np.ndarray]:
        session = open_session(proto.SerializeToString(), threads=self.threads)
        return [run(session, feed)[0][0] for feed in self.feeds]

    def __call__(self, proto: onnx.ModelProto) -> tuple[str, str]:
        found = self._outputs(proto)
        off = sum(float(np.square(a - b).sum()) for a, b in zip(found, self.wanted, strict=True))
        size = sum(float(np.square(b).sum()) for b in self.wanted)
        return self._score(found), f"{np.sqrt(off / size):.4f}"

    def _score(self, found: list[np.ndarray]) -> str:
        if self.name == RLFN:
            return f"{self._psnr(found) - self._psnr(self.wanted):+.2f} dB"
        if self.label is None:
            one, other = (np.stack([y.mean(axis=0) for y in ys]) for ys in (found, self.wanted))
            norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
            return f"cosine {np.mean((one * other).sum(axis=1) / norms):.4f}"
        top, wanted = (np.array([int(y.argmax()) for y in ys]) for ys in (found, self.wanted))
        points = 100 * (np.mean(top == self.label) - np.mean(wanted == self.label))
        return f"{points:+.1f} points, agreement {np.mean(top == wanted):.3f}"

    def _psnr(self, found: list[np.ndarray]) -> float:
        pairs = zip(found, self.sharp, strict=True)
        return float(np.mean([psnr(y, x[:, : y.shape[1], : y.shape[2]]) for y, x in pairs]))


def set5() -> tuple[list[Feed], list[np.ndarray]]:
    """(small pictures as feeds, sharp ones [3, H, W]), RGB 0 to 255."""
    from PIL import Image

    def pictures(kind: str) -> list[np.ndarray]:
        paths = sorted((REAL / "data" / "set5").glob(f"*_{kind}.png"))
        opened = (Image.open(path).convert("RGB") for path in paths)
        return [np.asarray(picture, np.float32).transpose(2, 0, 1) for picture in opened]

    return [{"lr": x[np.newaxis]} for x in pictures("LR")], pictures("HR")


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the luminance (ITU-R BT.601), 4 pixels cut off at the borders, as usual at ×4."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    rounded = np.clip(np.round(found), 0, 255)
    off = np.tensordot(weights, rounded - wanted, axes=1)[4:-4, 4:-4]
    return float(10 * np.log10(255**2 / np.mean(np.square(off))))


def quantized(
    name: str, bits: int, feeds: list[Feed], options: dict[str, Any], threads: int
) -> tuple[onnx.ModelProto, float]:
    """A calibrated model with weights of one term, and the seconds that it took."""
    model = load(MODELS / f"{name}.onnx")
    canonicalize(model)
    options = dict(options)
    if options.pop("equalize", False):
        apply(Equalize(), model)
    block_size = 32 if name == MINILM else None
    select = SelectNodes(
        bits=bits,
        terms=1,
        activations="none",
        layout="merged",
        block_size=block_size,
        offset=options.pop("offset", True) and block_size is None,
    )
    start = time.perf_counter()
    blocks = options.pop("blocks", False)
    plan, _ = calibrate_weights(model, select(model), feeds, threads=threads, **options)
    if blocks:
        plan, _ = refine_blocks(model, plan, feeds, effort="high", threads=threads)
    seconds = time.perf_counter() - start
    model = raise_opset(model, required_opset(plan))
    apply(Expand(plan), model)
    return to_proto(model), seconds


def main(
    bits: Annotated[int, typer.Option(help="Bits of the term.")] = 4,
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    steps: Annotated[str, typer.Option(help="Which steps, separated by semicolons.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.")] = 2,
    judged: Annotated[int, typer.Option(help="Images at most, with the 64 left out.")] = 2000,
) -> None:
    if not MODELS.exists():
        print(f"skipped: {MODELS} is not there (set ONNXQ_REAL)")
        sys.exit(0)
    table = Table(title=f"{bits}-bit weights, one term, 64 samples", title_justify="left")
    for name in ("model", "steps", "against float", "rel. error", "seconds"):
        table.add_column(name, justify="left" if name in ("model", "steps") else "right")
    for name in (n for n in (*CLASSIFIERS, RLFN, MINILM) if only in n):
        judge = Judge(name, onnx.load(MODELS / f"{name}.onnx"), threads, judged)
        feeds = calibration(name)
        for step in steps.split(";") if steps else STEPS:
            proto, seconds = quantized(name, bits, feeds, STEPS[step], threads)
            table.add_row(name, step, *judge(proto), f"{seconds:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
