"""Float, onnxq and onnxruntime's own quantization side by side: latency, error, agreement, size.

python benchmarks/peers.py [--only squeezenet] [--threads 1] [--rounds 20]

All models of a row group run in one process, in turns; ratios to float are medians of rounds.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from real import MODELS, samples
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.comparison import compare_sessions, paired_ratios, quartiles, time_in_turns
from onnxq.feeds import choose_samples
from onnxq.session import open_session, run

CALIBRATION = 32
ROOT = Path(__file__).parents[1]
Arrays = dict[str, np.ndarray]
EFFORT: list[str] = []  # of calibration, where the command says
Make = Callable[[Path, Path, Arrays], object]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, arrays: Arrays) -> None:
        count = len(next(iter(arrays.values())))
        self._feeds = iter([{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)])

    def get_next(self) -> Any:
        return next(self._feeds, None)


def _dynamic(source: Path, target: Path, _: Arrays, **options: Any) -> None:
    quantize_dynamic(source, target, **options)


def _static(source: Path, target: Path, arrays: Arrays, **options: Any) -> None:
    quantize_static(source, target, _Reader(arrays), **options)


def _ours(
    source: Path, target: Path, arrays: Arrays, *, data: bool = False, **options: Any
) -> None:
    if data and EFFORT:
        options["effort"] = EFFORT[0]
    onnxq.quantize(source, target, calibration=arrays if data else None, **options)


_BEST: dict[str, Any] = {
    "activation_type": QuantType.QUInt8,
    "weight_type": QuantType.QInt8,
    "per_channel": True,
    "quant_format": QuantFormat.QDQ,
}
_FLOAT_W4: dict[str, Any] = {"activations": "none", "layout": "merged", "weight_bits": 4}
PEERS: dict[str, Make] = {
    "onnxruntime dynamic": _dynamic,
    "onnxruntime dynamic, per channel": partial(_dynamic, per_channel=True),
    "onnxruntime static": _static,
    "onnxruntime static, u8·s8 per channel": partial(_static, **_BEST),
    "onnxq, no options": _ours,
    "onnxq dynamic": partial(_ours, activations="dynamic"),
    "onnxq dynamic, 2 × 4 bits": partial(_ours, activations="dynamic", terms=2),
    "onnxq dynamic, 2 × 4 bits merged": partial(_ours, activations="dynamic", layout="merged"),
    "onnxq dynamic, 1 × 7 bits": partial(_ours, activations="dynamic", weight_bits=7, terms=1),
    "onnxq static, 8 bits": partial(_ours, data=True, activations="static", weight_bits=8, terms=1),
    "onnxq static, 4-bit file": partial(
        _ours, data=True, activations="static", weight_bits=4, terms=1
    ),
    "onnxq float compute, 4-bit file": partial(_ours, terms=1, **_FLOAT_W4),
    "onnxq float compute, 2 × 4 bits": partial(_ours, terms=2, **_FLOAT_W4),
}


def sources(folder: Path, only: str) -> Iterator[tuple[str, Path, Arrays]]:
    import sys

    sys.path.insert(0, str(ROOT / "models"))
    from resnet50 import build_resnet50, sample_images

    if only in "resnet50_shape":
        path = folder / "resnet50_shape.onnx"
        onnx.save(build_resnet50(), path)
        images = sample_images(CALIBRATION + 8, 224)
        name = onnx.load(path).graph.input[0].name
        yield "resnet50_shape", path, {name: images}
    if only in "digits_repvgg":
        path = ROOT / "models" / "digits_repvgg.onnx"
        archive = np.load(ROOT / "models" / "digits_test.npz")
        arrays = {k: archive[k][: CALIBRATION + 200] for k in archive.files if k != "label"}
        yield "digits_repvgg", path, arrays
    for name in ("cifar10_resnet20", "squeezenet1.1", "mobilenet_v1_0.75_224", "minilm_l6_v2"):
        if only in name and MODELS.exists():
            count = CALIBRATION + {"minilm_l6_v2": 16, "cifar10_resnet20": 1000}.get(name, 100)
            yield name, MODELS / f"{name}.onnx", samples(name, count)


def main(
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 20,
    peers: Annotated[str, typer.Option(help="Part of a form's name.")] = "",
    effort: Annotated[str, typer.Option(help="Of calibration: fast, normal or high.")] = "normal",
) -> None:
    EFFORT.append(effort)
    logging.disable(logging.WARNING)
    os.environ.setdefault("ORT_LOGGING_LEVEL", "3")
    with tempfile.TemporaryDirectory() as folder:
        for name, source, arrays in sources(Path(folder), only):
            _one(name, source, arrays, Path(folder), threads=threads, rounds=rounds, peers=peers)


def _one(
    name: str,
    source: Path,
    arrays: Arrays,
    folder: Path,
    *,
    threads: int,
    rounds: int,
    peers: str,
) -> None:
    title = f"{name}, {threads} thread{'s' * (threads > 1)}, ratios to float"
    table = Table(title=title, title_justify="left")
    for column in ("form", "latency", "quartiles", "rel. error", "agreement", "size"):
        table.add_column(column, justify="left" if column == "form" else "right")
    calibration = {key: value[:CALIBRATION] for key, value in arrays.items()}
    judged = {key: value[CALIBRATION:] for key, value in arrays.items()}
    reference = open_session(source, threads=threads)
    held = choose_samples(reference, judged, {})
    made: dict[str, Any] = {}
    for form, make in PEERS.items():
        if peers not in form:
            continue
        target = folder / "q.onnx"
        try:
            make(source, target, calibration)
            session = open_session(target.read_bytes(), threads=threads)
            found = compare_sessions(reference, session, held)
        except Exception as error:  # a peer that fails is a result too
            table.add_row(form, "–", "–", str(error).splitlines()[0][:40], "–", "–")
            continue
        made[form] = session, found, target.stat().st_size / source.stat().st_size
    feed = next(iter(held))
    sessions = [reference, *(session for session, *_ in made.values())]
    runs = [partial(run, session, feed) for session in sessions]
    times = paired_ratios(time_in_turns(runs, warmup=3, rounds=rounds, seconds=300))
    for column, (form, (_, found, size)) in enumerate(made.items(), start=1):
        spread = quartiles(times[:, column])
        worst = max(output.relative_error for output in found.outputs)
        agreement = found.outputs[0].top1_agreement
        table.add_row(
            form,
            f"{spread.median:.2f}",
            f"{spread.low:.2f}–{spread.high:.2f}",
            f"{worst:.2e}",
            "–" if agreement is None else f"{agreement:.3f}",
            f"{size:.3f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
