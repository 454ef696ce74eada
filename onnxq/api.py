"""The Python API: quantize a model, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import onnx
from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as Invalid

from onnxq.errors import ConfigError
from onnxq.kernels_ref import SeriesKind
from onnxq.model import Model, load, save, to_proto
from onnxq.passes import SelectNodes
from onnxq.pipeline import rewrite
from onnxq.plan import Activations, Layout, Plan, scales_path
from onnxq.report import Report, make_report
from onnxq.session import CASTS_INT4, CONVOLVES_INT8, open_session, runtime_version
from onnxq.validation import (
    DataSource,
    Validation,
    check_targets,
    reference_of,
    size_of,
    write_checked,
)

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]


class Options(BaseModel):
    """How to quantize; checked as a whole before any work is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(default=4, ge=2, le=8, alias="weight_bits")
    terms: int = Field(default=2, ge=1, le=8)
    series: SeriesKind | Literal["auto"] = "auto"
    activations: Activations = "dynamic"
    layout: Layout = "parallel"
    min_runtime: str | None = None
    block_size: int | None = Field(default=None, ge=2)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False

    @classmethod
    def checked(cls, **options: Any) -> Options:
        """The options, if they make sense.

        Raises:
            ConfigError: an option is out of range, or two contradict each other.
        """
        try:
            made = cls(**options)
        except Invalid as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-")
            message = first["msg"].removeprefix("Input should be ")
            raise ConfigError(f"{option} {first['input']}: must be {message}") from None
        made._consistent()
        return made

    def _consistent(self) -> None:
        if self.activations == "none":
            return
        if self.block_size is not None:
            raise ConfigError(
                f"--block-size {self.block_size} needs float compute, since integer products share "
                "one scale per output channel: add --activations none"
            )
        if self.layout == "merged" and self.terms > 1:
            if self.terms * self.bits > 8:
                raise ConfigError(
                    f"--layout merged with --activations dynamic sums the terms in 8 bits, but "
                    f"{self.terms} terms of {self.bits} bits need {self.terms * self.bits}: lower "
                    "--terms or --weight-bits, or add --activations none"
                )
            if self.series not in ("auto", "digit"):
                raise ConfigError(
                    f"--series {self.series}: --layout merged with --activations dynamic sums the "
                    "terms as integers, which needs --series digit"
                )

    def select(self) -> SelectNodes:
        """The planning pass with these options."""
        options = self.model_dump(exclude={"min_runtime"})
        version = runtime_version(self.min_runtime)
        return SelectNodes(
            **options,
            packing="int4" if version >= CASTS_INT4 else "uint8",
            conv_activations="int8" if version >= CONVOLVES_INT8 else "uint8",
        )


@dataclass(frozen=True)
class Result:
    """What `quantize` made.

    Attributes:
        plan: what was done to each node.
        report: sizes, bits, errors, reasons, warnings.
        path: where the model was written, or None.
    """

    plan: Plan
    report: Report
    path: Path | None
    _model: Model

    @property
    def model(self) -> onnx.ModelProto:
        """The quantized model in memory.

        Raises:
            ModelError: it is larger than 2 GiB; work with the file instead.
        """
        return to_proto(self._model)

    def save(self, path: str | Path) -> None:
        """Write the quantized model.

        Raises:
            ModelError: the path cannot be written.
            ConfigError: the path is the float model's own.
        """
        save(self._model, path, verify=_load_only)


def quantize(
    model: str | os.PathLike[str] | onnx.ModelProto,
    output: str | os.PathLike[str] | None = None,
    *,
    weight_bits: int = 4,
    terms: int = 2,
    series: SeriesKind | Literal["auto"] = "auto",
    activations: Activations = "dynamic",
    layout: Layout = "parallel",
    min_runtime: str | None = None,
    block_size: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    data: DataSource = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    plan: Plan | str | Path | None = None,
    plan_out: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Rewrite a float model into integer-weight basis nodes, validate it, and write it.

    Args:
        model: path, or a model in memory (which is not changed).
        output: where to write; None keeps the result in memory.
        weight_bits: bits of each term, 2 to 8.
        terms: terms per weight.
        series: how the scales of the terms relate: fixed_ratio, digit or joint (MATH in
            docs/numerics.md); auto chooses by the number of terms.
        activations: none (float compute) or dynamic (integer compute, quantized at run time).
        layout: parallel (a node per term, summed by Add) or merged (terms summed as weights).
        min_runtime: the oldest onnxruntime that must run the file, such as "1.20"; the installed
            one if not given. Before 1.23 4-bit integers are stored as two in a byte, before 1.24
            Conv takes uint8 activations, which is slower.
        block_size: one scale per so many inputs of a channel; float compute only.
        include, exclude: globs of node names; only matching / all but matching ones are quantized.
        embeddings: also quantize the tables that Gather reads rows of; they are float again once
            onnxruntime has loaded the model, so this is for the file's size alone.
        data: samples to validate on, an .npz or a mapping input name -> array.
        input_shapes: shapes of the made-up inputs used without data.
        plan: do what this plan says instead of planning.
        plan_out: write the plan here.
        progress: called with (what, done, total).

    Raises:
        ModelError: the model cannot be read, is invalid, or has nothing to quantize.
        ConfigError: an option, the plan or the data do not fit.
        ValidationError: the result does not load, or its outputs have other shapes or are not
            finite. Nothing is written then.
    """
    options = Options.checked(
        weight_bits=weight_bits,
        terms=terms,
        series=series,
        activations=activations,
        layout=layout,
        min_runtime=min_runtime,
        block_size=block_size,
        include=_globs(include),
        exclude=_globs(exclude),
        embeddings=embeddings,
    )
    given = _given(plan)
    source = load(model)
    targets = {"output": output, "plan": plan_out}
    if plan_out is not None:
        targets["file of scales"] = scales_path(Path(plan_out))
    check_targets(source, targets, {"data": data})
    opset_before = source.opset
    check = Validation(reference_of(model), data, input_shapes or {})
    rewritten = rewrite(source, options.select(), given, progress or _silent)

    def verify(written: Path | bytes) -> None:
        check(written)
        if plan_out is not None:  # before the model is in its place: all files or none
            rewritten.plan.save(plan_out)

    after = write_checked(rewritten.model, output, verify)
    report = make_report(
        rewritten,
        sizes=(size_of(model), after),
        opset_before=opset_before,
        comparison=check.found,
        warnings=check.warnings,
    )
    path = None if output is None else Path(output)
    return Result(rewritten.plan, report, path, rewritten.model)


def _globs(globs: Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _given(plan: Plan | str | Path | None) -> Plan | None:
    if isinstance(plan, (str, Path)):
        return Plan.load(plan)
    # planning fills in scales; the caller's plan stays as it is
    return plan and plan.model_copy(update={"scales": dict(plan.scales)})


def _load_only(written: Path) -> None:
    open_session(written)


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""
