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

from onnxq.comparison import Comparison, compare_sessions
from onnxq.errors import ConfigError, ValidationError
from onnxq.feeds import Samples, choose_samples
from onnxq.files import model_bytes
from onnxq.kernels_ref import SeriesKind
from onnxq.model import Model, load, save, to_proto
from onnxq.passes import SelectNodes
from onnxq.pipeline import rewrite
from onnxq.plan import Activations, Layout, Plan
from onnxq.report import Report, make_report
from onnxq.session import open_session

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
    block_size: int | None = Field(default=None, ge=2)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

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
        return SelectNodes(**self.model_dump())


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
    block_size: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: str | Path | Mapping[str, Array] | None = None,
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
        block_size: one scale per so many inputs of a channel; float compute only.
        include, exclude: globs of node names; only matching / all but matching ones are quantized.
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
        block_size=block_size,
        include=tuple(include),
        exclude=tuple(exclude),
    )
    given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    source = load(model)
    opset_before = source.opset
    check = _Validation(_reference(model), data, input_shapes or {})
    rewritten = rewrite(source, options.select(), given, progress or _silent)
    if output is None:
        content = to_proto(rewritten.model).SerializeToString()
        check(content)
        after = len(content)
    else:
        save(rewritten.model, output, verify=check)
        after = model_bytes(Path(output))
    if plan_out is not None:
        rewritten.plan.save(plan_out)
    report = make_report(
        rewritten,
        sizes=(_size(model), after),
        opset_before=opset_before,
        comparison=check.found,
        warnings=check.warnings,
    )
    path = None if output is None else Path(output)
    return Result(rewritten.plan, report, path, rewritten.model)


class _Validation:
    """Loads a written model beside the float one and compares them.

    The samples are chosen, and the user's data checked, before any long work is done.
    """

    def __init__(
        self,
        reference: Path | bytes,
        data: str | Path | Mapping[str, Array] | None,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._reference = reference
        self._samples: Samples | None = None
        self.found: Comparison | None = None
        self.warnings: tuple[str, ...] = ()
        try:
            self._samples = choose_samples(open_session(reference), data, shapes)
        except ValidationError as error:
            what = "" if data is not None else " on made-up inputs"
            self.warnings = (
                f"not validated: the float model itself fails{what} ({error}); give --data",
            )

    def __call__(self, written: Path | bytes) -> None:
        actual = open_session(written)
        if self._samples is not None:
            self.found = compare_sessions(open_session(self._reference), actual, self._samples)


def _load_only(written: Path) -> None:
    open_session(written)


def _reference(model: str | os.PathLike[str] | onnx.ModelProto) -> Path | bytes:
    return model.SerializeToString() if isinstance(model, onnx.ModelProto) else Path(model)


def _size(model: str | os.PathLike[str] | onnx.ModelProto) -> int:
    return model.ByteSize() if isinstance(model, onnx.ModelProto) else model_bytes(Path(model))


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress."""
