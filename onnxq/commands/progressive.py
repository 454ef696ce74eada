"""`onnxq truncate` and `onnxq extend`: fewer or more terms of a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnxq
from onnxq.commands.shared import AsJson, DataFile, Shapes, parse_shapes, say
from onnxq.progressive import TermsReport
from onnxq.show import show_terms

Terms = Annotated[int, typer.Option(help="How many terms each node shall have.")]


def truncate(
    source: Annotated[
        Path, typer.Argument(metavar="IN.onnx", help="Written by quantize, several terms.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    terms: Terms,
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
) -> None:
    """Keep the first terms of each node; the float model is not needed."""
    made = onnxq.truncate(source, target, terms, data=data, input_shapes=parse_shapes(input_shape))
    _say_terms(made.report, target, str(source), as_json=as_json)


def extend(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="Written by quantize.")],
    float_model: Annotated[
        Path, typer.Argument(metavar="FLOAT.onnx", help="The model that it was made from.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    terms: Terms,
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
) -> None:
    """Add further terms to what a quantized model has."""
    made = onnxq.extend(
        source, float_model, target, terms, data=data, input_shapes=parse_shapes(input_shape)
    )
    _say_terms(made.report, target, "the float model", as_json=as_json)


def _say_terms(report: TermsReport, target: Path, against: str, *, as_json: bool) -> None:
    say(
        report,
        lambda console, found: show_terms(console, found, against),
        as_json=as_json,
        wrote=target,
    )
