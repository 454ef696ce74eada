"""`onnxq split`: a quantized model as a folder of parts that run side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict

import onnxq
from onnxq.errors import ConfigError, ValidationError
from onnxq.feeds import Samples, choose_samples
from onnxq.files import model_bytes
from onnxq.model import Model, get_metadata, graphs, load
from onnxq.parts.check import check_parts
from onnxq.parts.manifest import MANIFEST
from onnxq.parts.runner import PartsRunner
from onnxq.parts.write import make_manifest, whole_folder, write_part
from onnxq.passes.split_parts import split_parts
from onnxq.passes.term_sums import NODE, TERM
from onnxq.passes.weights import candidates
from onnxq.session import open_session

Array = npt.NDArray[Any]

# An activation on a boundary moves by one of 255 steps, .4 %; many move a sum by less than that.
_SUSPICIOUS = 0.01


class SplitReport(BaseModel):
    """What `split` made and found.

    Attributes:
        parts: how many.
        stages: stages of each part.
        all_reduces: stages that end in sums over the parts; one all-reduce each.
        shared_out: nodes whose terms are shared out.
        whole: nodes with weights that every part computes, with the reason.
        part_bytes: size of each part.
        source_bytes: size of the single file.
        reduced_bytes: bytes that each part gives to the all-reduces for the input that was run.
        difference: of the outputs from the single file's, largest over largest.
        stage_difference: the same of sums and outputs where each stage begins with the single
            file's sums: nothing but the order of additions and onnxruntime's fusions. These three
            are null if not run.
        warnings: what the user should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    parts: int
    stages: int
    all_reduces: int
    shared_out: tuple[str, ...]
    whole: dict[str, str]
    part_bytes: tuple[int, ...]
    source_bytes: int
    reduced_bytes: int | None = None
    difference: float | None = None
    stage_difference: float | None = None
    warnings: tuple[str, ...] = ()


def split(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    parts: int,
    data: str | Path | Mapping[str, Array] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> SplitReport:
    """Write a quantized model as `parts` parts, each a folder of stage models, and check them.

    Args:
        model: path of a model in parallel layout, as `quantize` makes it.
        folder: what to make: part0/, part1/, … and parts.json; part k and parts.json are all that
            the machine which runs part k needs.
        parts: how many; part k gets the terms whose index is k modulo this.
        data: samples to check the parts on, of which the first is run; seeded inputs without it.
        input_shapes: shapes of the seeded inputs.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written; an option is out of
            range; the data do not fit the model.
        ModelError: the model cannot be read, has nothing to share out, or cannot be cut.
        ValidationError: a stage does not load, or the parts' outputs have other types or shapes
            than the single file's, or are not finite where those are. Nothing is written then.
    """
    source, target = Path(model), Path(folder)
    _check_target(target)
    loaded = load(source)
    whole = _whole_nodes(loaded)
    frozen = tuple(
        f"input {name!r} has a default value and is fixed to it" for name in loaded.overridable
    )
    reference = open_session(source)
    samples = _samples(reference, data, input_shapes or {})
    made = split_parts(loaded, parts)
    identity = _identity(loaded, parts)
    manifest = make_manifest(made, parts, identity, reference)
    with whole_folder(target) as work:
        for k in range(parts):
            write_part(work, [stages[k] for stages in made.stages], k, identity)
        text = manifest.model_dump_json(indent=1)
        (work / MANIFEST).write_text(text, encoding="utf-8")
        report = SplitReport(
            parts=parts,
            stages=len(made.stages),
            all_reduces=sum(bool(sums) for sums in made.sums),
            shared_out=(names := tuple(found.node for sums in made.sums for found in sums)),
            whole={name: why for name, why in whole.items() if name not in names},
            part_bytes=tuple(_folder_bytes(work / f"part{k}") for k in range(parts)),
            source_bytes=model_bytes(source),
            warnings=frozen,
        )
        return _check_run(report, work, source, reference, samples)


def _check_target(folder: Path) -> None:
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:  # the name is too long, or it may not be looked into
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror or error}): give another name"
        ) from None
    if taken:
        raise ConfigError(f"{folder} exists already: give the name of a new folder")
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{folder}: the folder {folder.parent} does not exist: create it")


def _identity(model: Model, parts: int) -> str:
    """Names a split, so that stages of different ones are not mixed: 16 hex digits."""
    digest = hashlib.sha256(f"{parts} {onnxq.__version__}".encode())
    assert model.source.file is not None
    for path in (model.source.file, *sorted(model.source.data_files)):
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _whole_nodes(model: Model) -> dict[str, str]:
    """Nodes with weights that may not be shared out, by name, with the reason if they are not."""
    found = {
        candidate.name: "its weight is float"
        for candidate in candidates(model, embeddings=True)
        if not isinstance(candidate.found, str) and not get_metadata(candidate.node)
    }
    for where, graph in graphs(model):
        for node in graph.nodes:
            metadata = get_metadata(node)
            if NODE in metadata and TERM in metadata:
                merged = "+" in metadata[TERM]
                why = "its terms are merged into one weight" if merged else "it has one term"
                found[metadata[NODE]] = f"it is inside {where}" if where else why
    return found


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _check_run(
    report: SplitReport,
    work: Path,
    source: Path,
    reference: ort.InferenceSession,
    samples: Samples | str,
) -> SplitReport:
    """Load all stages, and run them beside the single file."""
    if isinstance(samples, str):
        PartsRunner(work).close()
        return report.model_copy(update={"warnings": (*report.warnings, samples)})
    found = check_parts(work, source, reference, next(iter(samples)))
    warnings = report.warnings
    if found.stages > _SUSPICIOUS:
        warnings += (
            f"the stages differ from the single file by {found.stages:.2g} of the largest value, "
            "more than roundings of 8-bit activations explain: please compare them on real data",
        )
    update = {
        "difference": found.outputs,
        "stage_difference": found.stages,
        "reduced_bytes": found.reduced_bytes,
        "warnings": warnings,
    }
    return report.model_copy(update=update)


def _samples(
    reference: ort.InferenceSession,
    data: str | Path | Mapping[str, Array] | None,
    shapes: Mapping[str, Sequence[int]],
) -> Samples | str:
    """What to run the parts on, or why they cannot be run."""
    try:
        return choose_samples(reference, data, shapes)
    except ValidationError as error:
        return f"not run: the model fails on made-up inputs ({error}); give --data"
