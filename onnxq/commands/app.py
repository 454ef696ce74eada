"""All commands together, and how a run of one ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import onnxq
from onnxq.commands import EXIT_BAD_INPUT, EXIT_INFEASIBLE, EXIT_INTERRUPTED
from onnxq.commands.fold import fold
from onnxq.commands.look import doctor, inspect
from onnxq.commands.measure import bench, compare
from onnxq.commands.parts import run_parts, split
from onnxq.commands.progressive import extend, truncate
from onnxq.commands.quantize import quantize
from onnxq.commands.sweep import sweep
from onnxq.errors import OnnxqError
from onnxq.goal import Infeasible

# A wrong option. typer does not export the class; it is click's, or typer's own copy of it.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Rewrite an ONNX model into parallel integer-weight basis nodes summed by Add nodes: "
    "small, and still right on stock onnxruntime, without training and without data.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# In the order of the help.
for _command in (
    *(quantize, fold, compare, bench, inspect, sweep),
    *(truncate, extend, split, run_parts, doctor),
):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onnxq {onnxq.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


def run(arguments: Sequence[str]) -> int | None:
    """Run the command line and return its exit code; what a user got wrong ends in one line.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    try:
        code: int | None = app(arguments or ["--help"], prog_name="onnxq", standalone_mode=False)
    except Infeasible as error:
        return _fail(f"{error}; --best-effort writes the closest", EXIT_INFEASIBLE)
    except OnnxqError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except _UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        return _fail(error.format_message().rstrip(".") + hint, EXIT_BAD_INPUT)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == EXIT_INTERRUPTED:  # typer catches Ctrl-C itself, and says nothing
        raise KeyboardInterrupt
    return code


def _fail(message: str, code: int) -> int:
    """One line, whatever a file has put into the message."""
    typer.echo(f"error: {' '.join(message.splitlines())}", err=True)
    return code
