"""Load time and peak memory of one model, in the process that this module is run as.

`python -m onnxq.measure_process MODEL INPUTS.npz NAMES THREADS`: the inputs are the arrays of the
archive in their order, NAMES their names as a JSON list, THREADS may be empty. Prints one line of
JSON: load_seconds, load_memory, peak_memory (bytes above what the process held before, or null).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from onnxq.errors import OnnxqError
from onnxq.session import open_session, run

_RUNS = 3  # the second run still grows the arena of some models
_LOADS = 5
_LOAD_SECONDS = 2.0


def measure(
    model: str, feed: dict[str, np.ndarray], threads: int | None
) -> dict[str, float | int | None]:
    """Open and run a model; what that took.

    The load time is the median of up to five sessions, of one where loading is slow. Memory is that
    of the first session.

    Raises:
        ValidationError: the model does not load or run.
    """
    before = peak_memory()
    loads: list[float] = []
    start = time.perf_counter()
    session = open_session(model, threads=threads)
    loads.append(time.perf_counter() - start)
    loaded = peak_memory()
    for _ in range(_RUNS):
        run(session, feed)
    peak = peak_memory()
    while len(loads) < _LOADS and sum(loads) < _LOAD_SECONDS:
        del session
        start = time.perf_counter()
        session = open_session(model, threads=threads)
        loads.append(time.perf_counter() - start)
    return {
        "load_seconds": float(np.median(loads)),
        "load_memory": _above(loaded, before),
        "peak_memory": _above(peak, before),
    }


def _above(peak: int | None, before: int | None) -> int | None:
    return None if peak is None or before is None else peak - before


def peak_memory() -> int | None:
    """The most memory, in bytes, that this process has had resident; None where nobody counts it.

    Linux's getrusage would do, but that passes on the peak of the process that started this one.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(model: str, inputs: str, names: str, threads: str) -> None:
    """Measure, and print; an error of ours is one line on stderr."""
    with np.load(inputs, allow_pickle=False) as archive:
        feed = {name: archive[f"arr_{i}"] for i, name in enumerate(json.loads(names))}
    try:
        found = measure(model, feed, int(threads) if threads else None)
    except OnnxqError as error:
        sys.exit(" ".join(str(error).splitlines()))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
