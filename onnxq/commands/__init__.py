"""The commands of `onnxq`: what each understands, calls and prints."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
EXIT_INFEASIBLE = 3
EXIT_INTERRUPTED = 130
