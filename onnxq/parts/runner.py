"""Running a split model: one part per thread, per process, or per rank of a library's job."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onnxq.errors import ConfigError
from onnxq.feeds import LABEL
from onnxq.files import check_target, read_arrays, write_whole
from onnxq.parts.collectives import Collective, GlooRanks, MpiRanks, ThreadGroup
from onnxq.parts.manifest import Manifest
from onnxq.parts.part import Part
from onnxq.parts.process import Processes

Array = npt.NDArray[Any]
Backend = Literal["threads", "processes", "mpi", "gloo"]

TIMEOUT = 300.0
# Eleven days; what takes times of the system takes no more than some years.
LONGEST_TIMEOUT = 1_000_000
MOST_THREADS = 1024


class PartsRunner:
    """A split model, ready to run; a context manager.

    Args:
        folder: what `split` made.
        backend: threads or processes run all parts on this machine; under mpi and gloo the calling
            process is one rank of a job with one process per part, runs the part of that number,
            and needs no other part's folder.
        threads: intra-op threads of each part.
        timeout: seconds that parts wait for each other (under mpi for ever).
        collective: joins this process to others in a way of your own, as one rank; `backend` is
            not read then.

    Raises:
        ConfigError: the folder is not what `split` made, an option is out of range, a library is
            missing, or the job has another number of ranks than the model has parts.
        ValidationError: onnxruntime cannot load a stage.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        backend: Backend = "threads",
        threads: int = 1,
        timeout: float = TIMEOUT,
        collective: Collective | None = None,
    ) -> None:
        if backend not in get_args(Backend):
            raise ConfigError(f"--backend {backend}: must be one of {', '.join(get_args(Backend))}")
        if not 1 <= threads <= MOST_THREADS or not 0 < timeout <= LONGEST_TIMEOUT:
            raise ConfigError(
                f"--threads must be 1 to {MOST_THREADS}, --timeout more than 0 and at most "
                f"{LONGEST_TIMEOUT}"
            )
        self.manifest = Manifest.load(folder)
        self._runner: _Threads | Processes | _Rank | None
        where = Path(folder).absolute()
        if collective is None and backend == "threads":
            self._runner = _Threads(where, self.manifest, threads, timeout)
        elif collective is None and backend == "processes":
            self._runner = Processes(where, self.manifest, threads, timeout)
        else:
            if collective is None:
                collective = MpiRanks() if backend == "mpi" else GlooRanks(timeout)
            self._runner = _Rank(where, self.manifest, threads, collective)
        self.rank = 0 if collective is None else collective.rank

    @property
    def reduced_bytes(self) -> int:
        """Bytes that each part gave to the collective in the last run."""
        return 0 if self._runner is None else self._runner.reduced_bytes

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for one input, by name; under mpi and gloo every rank gives the same input.

        Raises:
            ConfigError: an input is missing or superfluous, of another dtype or rank; the runner
                is closed; a part failed or did not answer in time.
            ValidationError: the model fails on this input. Both of the last two close the runner,
                since parts may be in different stages then.
        """
        if self._runner is None:
            raise ConfigError("this runner is closed: open another one")
        checked = _check_feed(self.manifest, feed)
        try:
            return self._runner.run(checked)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the sessions and processes; may be called again."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def __enter__(self) -> PartsRunner:
        """The runner itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def run_parts(
    folder: str | os.PathLike[str],
    feeds: Mapping[str, Array],
    *,
    backend: Backend = "threads",
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> dict[str, Array]:
    """The outputs of a split model for one input, by name; see `PartsRunner`, also for errors."""
    with PartsRunner(folder, backend=backend, threads=threads, timeout=timeout) as runner:
        return runner.run(feeds)


def run_parts_file(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    backend: Backend = "threads",
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> dict[str, tuple[int, ...]]:
    """Run a split model on the arrays of an .npz file, and write its outputs as another.

    Args:
        folder, backend, threads, timeout: as `PartsRunner`.
        data: one array per input of the model, each a whole input; an extra `label` is passed over.
        output: where rank 0 writes one array per output.

    Returns:
        The shapes of the outputs by name.

    Raises:
        ConfigError: a file cannot be read or written; or as `PartsRunner`.
        ValidationError: as `PartsRunner`.
    """
    target = Path(output)
    check_target("output", target, {"the data": Path(data)})
    _keep_out(target, Path(folder))
    feed = read_arrays(Path(data), "data")
    with PartsRunner(folder, backend=backend, threads=threads, timeout=timeout) as runner:
        if LABEL not in {entry.name for entry in runner.manifest.inputs}:
            feed.pop(LABEL, None)
        outputs = runner.run(feed)
        if runner.rank == 0:
            plain = {n: a.astype(str) if a.dtype.kind == "O" else a for n, a in outputs.items()}
            file = io.BytesIO()
            np.savez(file, **plain)  # type: ignore[arg-type]  # a name may be that of an option
            write_whole({target: file.getvalue()})
    return {name: array.shape for name, array in outputs.items()}


def _keep_out(target: Path, folder: Path) -> None:
    """Refuse to write where parts.json and the stages are."""
    if folder.resolve() in target.resolve().parents:
        raise ConfigError(f"output {target} lies in the folder of the parts: give another place")


def _check_feed(manifest: Manifest, feed: Mapping[str, Array]) -> dict[str, Array]:
    wanted = {entry.name: entry for entry in manifest.inputs}
    if set(wanted) != set(feed):
        raise ConfigError(f"inputs {sorted(feed)} given, but the model has {sorted(wanted)}")
    checked = {}
    for name, entry in wanted.items():
        array = np.asarray(feed[name])
        dtype = "str" if array.dtype.kind in "OUS" else array.dtype.name
        if dtype != entry.dtype or array.ndim != len(entry.shape):
            raise ConfigError(
                f"input {name!r} is {dtype} of shape {list(array.shape)}, but the model takes "
                f"{entry.dtype} of shape {list(entry.shape)}"
            )
        checked[name] = np.ascontiguousarray(array).reshape(array.shape)
    return checked


class _Threads:
    """All parts in threads of this process; part 0 in the calling one."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, timeout: float) -> None:
        self._parts = [Part(folder, manifest, k, threads) for k in range(manifest.parts)]
        self._group = ThreadGroup(manifest.parts, timeout)
        self._pool = ThreadPoolExecutor(manifest.parts - 1, thread_name_prefix="onnxq-part")

    @property
    def reduced_bytes(self) -> int:
        return self._parts[0].reduced_bytes

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        failures: list[BaseException] = []  # the first is the cause, the rest waited for it

        def one(k: int) -> dict[str, Array]:
            try:
                return self._parts[k].run(feed, self._group.ranks[k], outputs=k == 0)
            except BaseException as error:
                failures.append(error)
                self._group.abort()
                return {}

        others = [self._pool.submit(one, k) for k in range(1, len(self._parts))]
        outputs = one(0)
        wait(others)
        if failures:
            raise failures[0]
        return outputs

    def close(self) -> None:
        self._group.abort()
        self._pool.shutdown()


class _Rank:
    """This process is one rank of a job that somebody else has started."""

    def __init__(
        self, folder: Path, manifest: Manifest, threads: int, collective: Collective
    ) -> None:
        if collective.size != manifest.parts:
            raise ConfigError(
                f"{folder} holds {manifest.parts} parts, but the job has {collective.size} ranks: "
                "start one process per part"
            )
        self._collective = collective
        try:
            self._part = Part(folder, manifest, collective.rank, threads)
            own = np.array([int(manifest.split[:12], 16)], np.int64)
            if int(collective.all_reduce(own)[0]) != collective.size * int(own[0]):
                raise ConfigError(f"{folder}: other ranks hold parts of another split")
        except BaseException as error:
            collective.abort(str(error))
            raise

    @property
    def reduced_bytes(self) -> int:
        return self._part.reduced_bytes

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self._part.run(feed, self._collective)
        except BaseException as error:
            self._collective.abort(str(error))
            raise

    def close(self) -> None:
        self._collective.close()
