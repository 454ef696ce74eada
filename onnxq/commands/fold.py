"""`onnxq fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.commands.shared import AsJson, DataFile, Quiet, Shapes, parse_shapes, say
from onnxq.folding import fold as run_fold
from onnxq.show import show_fold


def fold(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The float model.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write.")],
    data: DataFile = None,
    input_shape: Shapes = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Only the exact float folds: branches, batch norms, constants. The model stays float."""
    result = run_fold(source, target, data=data, input_shapes=parse_shapes(input_shape))
    say(result.report, show_fold, as_json=as_json, wrote=target, quiet=quiet)
