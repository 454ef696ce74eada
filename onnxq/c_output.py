"""Keeping what a C library prints out of our own output."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDOUT = 1


@contextmanager
def silent_c_stdout() -> Iterator[None]:
    """Nothing that C code prints to stdout in the meantime is seen; Python's own output neither.

    HiGHS prints a line of its debugging now and then, whatever its options say, which would stand
    amid the JSON of `--json`. Does nothing where there is no stdout.
    """
    _flush()
    try:
        kept = os.dup(_STDOUT)
    except OSError:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDOUT)
        yield
    finally:
        _flush()
        os.dup2(kept, _STDOUT)
        os.close(kept)
        os.close(nowhere)


def _flush() -> None:
    with suppress(AttributeError, OSError, ValueError):  # closed, or replaced by a test
        sys.stdout.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
