"""The Python API: quantize a model, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from onnxq.budgeted import Budgeted
from onnxq.calibrated import Calibrated
from onnxq.calibration import Calibration, CalibrationSource, open_calibration
from onnxq.embedded_plan import embed_plan
from onnxq.errors import ConfigError
from onnxq.images import ImageOptions
from onnxq.model import Model, load, save
from onnxq.options import Options
from onnxq.outliers import Outliers
from onnxq.pipeline import Complete, rewrite
from onnxq.plan import Plan, scales_path
from onnxq.points import ChoosePoints, PointsGoal
from onnxq.report import Report, make_report
from onnxq.session import open_session
from onnxq.targets import foreign
from onnxq.validation import (
    DataSource,
    HoldsModel,
    Validation,
    check_targets,
    reference_of,
    size_of,
    write_checked,
)

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result(HoldsModel):
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
    options: Options | None = None,
    calibration: CalibrationSource | None = None,
    images: ImageOptions | None = None,
    data: DataSource = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    plan: Plan | str | Path | None = None,
    plan_out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Rewrite a float model into integer-weight basis nodes, validate it, and write it.

    Args:
        model: path, or a model in memory (which is not changed).
        output: where to write; None keeps the result in memory.
        options: how to quantize, as a whole.
        calibration: samples to plan on: an .npz, a folder of .npz, .npy or images, a mapping input
            name -> array, or an iterable of feeds. Without it, planning looks at weights alone.
        images: how images of `calibration` become an input.
        data: samples to validate on, an .npz or a mapping input name -> array.
        input_shapes: shapes of the made-up inputs used without data.
        plan: do what this plan says instead of planning.
        plan_out: write the plan here.
        progress: called with (what, done, total).
        settings: instead of `options`, any fields of `onnxq.Options`, such as `weight_bits=8`.

    Raises:
        ModelError: the model cannot be read, is invalid, or has nothing to quantize.
        ConfigError: an option, the plan or the data do not fit.
        CalibrationError: the calibration samples do not fit, or the model fails on one.
        ValidationError: the result does not load, or its outputs have other shapes or are not
            finite. Nothing is written then.
    """
    chosen = _chosen(options, settings)
    given = _given(plan)
    source = load(model)
    targets = {"output": output, "plan": plan_out}
    if plan_out is not None:
        targets["file of scales"] = scales_path(Path(plan_out))
    check_targets(source, targets, {"data": data, "calibration": calibration})
    opset_before = source.opset
    check = Validation(reference_of(model), data, input_shapes or {})
    samples = _samples(calibration, images, check, chosen, given)
    tell = progress or _silent
    seen = samples or check.samples
    made_up = check.samples if check.samples is not None and check.samples.made_up else ()
    choose = None if chosen.uniform else Budgeted(chosen, samples, size_of(model), tell, made_up)
    if choose is not None:
        choose.goal(Plan(nodes=[]))  # refused before the work
    points = None
    if chosen.points is not None and chosen.uniform:
        goal = PointsGoal.parse(chosen.points)
        points = ChoosePoints(goal, samples, size_of(model), tell)
    complete: list[Complete] = []
    if samples is not None and chosen.uniform:
        complete.append(Calibrated(chosen, samples, tell))
    # an allocation on samples has decided on outlier columns, too
    decided = choose is not None and samples is not None
    if chosen.outliers and seen is not None and given is None and not decided:
        complete.append(Outliers(seen, chosen.outliers))
    rewritten = rewrite(
        source,
        chosen.select(calibrated=samples is not None),
        given,
        tell,
        equalize=chosen.equalize,
        centre=chosen.choose_centre(calibrated=samples is not None),
        points=points,
        choose=choose,
        priors=chosen.priors and samples is None,
        complete=complete,
    )

    embed_plan(rewritten.model, rewritten.plan, equalized="Equalize" in rewritten.passes)

    def verify(written: Path | bytes) -> None:
        check(written)
        if plan_out is not None:  # before the model is in its place: all files or none
            rewritten.plan.save(plan_out)

    after = write_checked(rewritten.model, output, verify)
    elsewhere = foreign({n.target for n in rewritten.plan.quantized if n.activations != "none"})
    report = make_report(
        rewritten,
        sizes=(size_of(model), after),
        opset_before=opset_before,
        comparison=check.found,
        warnings=(
            *check.warnings,
            *(samples.warnings if samples else ()),
            *([elsewhere] if elsewhere else []),
        ),
    )
    path = None if output is None else Path(output)
    return Result(rewritten.plan, report, path, rewritten.model)


def _chosen(options: Options | None, settings: Mapping[str, Any]) -> Options:
    """The options, given as a whole or one by one.

    Raises:
        ConfigError: both ways at once, or they cannot be meant.
    """
    if options is not None:
        if settings:
            raise ConfigError(f"options and {', '.join(settings)}: give one or the other")
        return Options.checked(**options.model_dump(exclude_unset=True))
    globs = {name: _globs(settings[name]) for name in ("include", "exclude") if name in settings}
    return Options.checked(**{**settings, **globs})


def _samples(
    source: CalibrationSource | None,
    images: ImageOptions | None,
    check: Validation,
    options: Options,
    plan: Plan | None,
) -> Calibration | None:
    """The calibration samples, if there are any.

    Raises:
        ConfigError: static compute without samples, or samples beside a plan.
        CalibrationError: they do not fit the model.
    """
    if source is None:
        if plan is None:
            options.refuse_without_samples()
        if images is not None:
            raise ConfigError("image options without --calibration: give a folder of images")
        if options.resolved_activations == "static" and plan is None:
            raise ConfigError(
                "--activations static needs ranges of the activations: add --calibration "
                "(an .npz, or a folder of images), or use --activations dynamic"
            )
        return None
    if plan is not None:
        raise ConfigError("--calibration beside --plan: the plan holds what calibration found")
    samples = open_calibration(source, check.inputs, images)
    check.runs_on(samples)
    return samples


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
