"""`onnxq sweep` on files: the front of a model, its plans, table data and picture in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxq.calibration import CalibrationSource, open_calibration
from onnxq.candidates import EFFICIENT, INTEGER
from onnxq.errors import ConfigError
from onnxq.images import ImageOptions
from onnxq.mixed import mixed
from onnxq.model import load
from onnxq.options import Options
from onnxq.passes import Equalize
from onnxq.pipeline import apply, canonicalize
from onnxq.session import input_specs, open_session
from onnxq.sweep import POINTS, Sweep, picture, save_json, sweep

Progress = Callable[[str, int, int], None]

_CHOSEN = ("weight_bits", "terms", "block_size", "tolerance", "max_size", "minimize")


def sweep_model(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    calibration: CalibrationSource,
    images: ImageOptions | None = None,
    points: int = POINTS,
    latency: bool = False,
    draw: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Sweep:
    """Find the most exact plan for each of several sizes, and write them all.

    Args:
        model: path of the float model.
        folder: gets sweep.json and each point's plan, for `quantize --plan`; made if missing.
        calibration, images: samples, as for `quantize`.
        points: how many sizes.
        latency: also time the points and the float model in turns.
        draw: a picture of the front, .svg, .png or .pdf (needs matplotlib).
        threads: of onnxruntime.
        progress: called with (what, done, total).
        settings: fields of `Options` that hold for all points, such as `activations="none"`.

    Raises:
        ModelError, ConfigError, CalibrationError: as `quantize`.
    """
    for name in _CHOSEN:
        if settings.get(name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} beside sweep, which chooses it")
    options = Options.checked(**settings)
    kind = options.resolved_activations
    if kind == "static":
        raise ConfigError("--activations static: sweep is for none and dynamic")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"folder {target} is there already and not empty: give a new name")
    source = load(model)
    samples = open_calibration(calibration, input_specs(open_session(Path(model))), images)
    canonicalize(source)
    if options.equalize:
        apply(Equalize(), source)
    plan = options.select()(source)
    found = sweep(
        source,
        plan,
        samples,
        folder=target,
        points=points,
        candidates={"none": EFFICIENT, "dynamic": INTEGER}.get(kind) or mixed(EFFICIENT, INTEGER),
        latency=latency,
        threads=threads,
        progress=progress,
    )
    save_json(found, target / "sweep.json")
    if draw is not None:
        picture(found, Path(draw))
    return found
