"""The entry point of `onnxq`; this file imports next to nothing, so that Ctrl-C finds `main`."""

from __future__ import annotations

import io
import sys

from onnxq.commands import EXIT_INTERRUPTED


def main() -> None:
    """Run the command line; Ctrl-C ends in one line and exit code 130 whenever it comes."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may lack × or a letter of a name
                stream.reconfigure(errors="replace")
        # Here, as it takes a second: Ctrl-C in it shall end like any other.
        from onnxq.commands.app import run  # noqa: PLC0415

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
