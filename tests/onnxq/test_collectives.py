"""The sum over all parts: threads, ranks of MPI (a stand-in for its library) and of gloo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expanding import gamma
from small import weights
from splitting import chain, quantized, split_to

from onnxq.errors import ConfigError, ValidationError
from onnxq.parts.collectives import MpiRanks, ThreadGroup, add_up
from onnxq.parts.runner import PartsRunner, run_parts

Array = np.ndarray
X = {"x": weights(2, 3, 6, 6, seed=5)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_to(tmp_path_factory.mktemp("two"), quantized(chain(batch="N")))


def all_ranks(size: int, one: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_every_thread_gets_the_same_bits_turn_after_turn() -> None:
    group = ThreadGroup(3, timeout=10)
    arrays = [[weights(50, seed=10 * turn + k) for k in range(3)] for turn in range(20)]

    def one(k: int) -> list[Array]:
        return [group.ranks[k].all_reduce(arrays[turn][k]) for turn in range(20)]

    first, *others = all_ranks(3, one)
    for turn in range(20):
        a, b, c = arrays[turn]
        np.testing.assert_array_equal(first[turn], (a + b) + c)
        for other in others:
            np.testing.assert_array_equal(other[turn], first[turn])


def test_any_order_of_ranks_is_right_to_rounding() -> None:
    """n addends in any order: within gamma(n - 1) · Σ|addend| of the exact sum."""
    arrays = [weights(200, seed=k) for k in range(4)]
    exact = np.sum(np.stack(arrays).astype(np.float64), 0)
    limit = gamma(3) * np.abs(np.stack(arrays).astype(np.float64)).sum(0)
    for order in permutations(arrays):
        assert (np.abs(add_up(order) - exact) <= limit).all()


def test_two_ranks_commute() -> None:
    a, b = weights(99), weights(99, seed=1)
    np.testing.assert_array_equal(add_up([a, b]), add_up([b, a]))


def test_partial_sums_of_different_kinds() -> None:
    with pytest.raises(ConfigError, match="different kinds"):
        add_up([np.zeros(3, np.float32), np.zeros(4, np.float32)])


class FakeMpi:
    """What onnxq uses of an mpi4py communicator, among threads."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._rank, self._group = rank, group
        self.aborted: int | None = None

    def Get_rank(self) -> int:  # noqa: N802
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._group.ranks[0].size

    def Allreduce(self, array: Array, total: Array) -> None:  # noqa: N802
        assert array.flags.c_contiguous and total.flags.c_contiguous
        total[:] = self._group.ranks[self._rank].all_reduce(array)

    def Abort(self, code: int) -> None:  # noqa: N802
        self.aborted = code
        self._group.abort()


def test_ranks_of_mpi(two: Path) -> None:
    group = ThreadGroup(2, timeout=10)

    def one(k: int) -> Array:
        with PartsRunner(two, collective=MpiRanks(FakeMpi(group, k))) as runner:
            assert runner.rank == k
            return runner.run(X)["y"]

    first, second = all_ranks(2, one)
    np.testing.assert_array_equal(first, run_parts(two, X)["y"])
    np.testing.assert_array_equal(second, first)


def test_a_rank_of_mpi_that_fails_ends_the_job(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = ThreadGroup(2, timeout=10)
    ranks = [FakeMpi(group, k) for k in range(2)]
    both_open = threading.Barrier(2)  # MPI leaves a sum that is done alone; our threads do not

    def one(k: int) -> str:
        with PartsRunner(two, collective=MpiRanks(ranks[k])) as runner:
            both_open.wait(10)
            bad = {"x": np.zeros((1, 3 + k, 6, 6), np.float32)}
            with pytest.raises((ValidationError, ConfigError)) as caught:
                runner.run(bad)
            return str(caught.value)

    assert "stage 0 fails" in all_ranks(2, one)[1]
    assert ranks[1].aborted == 1
    assert "error: part 1: stage 0 fails" in capsys.readouterr().err


def test_a_job_of_another_size_or_of_another_split(two: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 parts, but the job has 3 ranks"):
        PartsRunner(two, collective=MpiRanks(FakeMpi(ThreadGroup(3, timeout=1), 0)))
    other = split_to(tmp_path, quantized(chain()))
    group = ThreadGroup(2, timeout=10)

    def one(k: int) -> str:
        with pytest.raises(ConfigError) as caught:
            PartsRunner((two, other)[k], collective=MpiRanks(FakeMpi(group, k)))
        return str(caught.value)

    assert any("another split" in message for message in all_ranks(2, one))


MPI = """
import sys, numpy as np
from onnxq.parts.runner import PartsRunner
folder, where = sys.argv[1:]
with PartsRunner(folder, backend="mpi") as runner:
    x = np.load(where + "/x.npy")
    np.save(f"{where}/y{runner.rank}.npy", runner.run({"x": x})["y"])
    runner.run({"x": x[:, : 3 - runner.rank]})
"""


def test_ranks_of_a_real_mpi(two: Path, tmp_path: Path) -> None:
    """Two processes; in the second run one of them fails, and the job ends."""
    try:
        import mpi4py.MPI  # noqa: F401
    except (ImportError, RuntimeError):  # the latter where there is no MPI library
        pytest.skip("mpi4py or its library is not there")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("mpiexec is not there")
    np.save(tmp_path / "x.npy", X["x"])
    (tmp_path / "rank.py").write_text(MPI)
    done = subprocess.run(  # noqa: S603
        [mpiexec, "-n", "2", sys.executable, tmp_path / "rank.py", two, tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "error: part 1: stage 0 fails" in done.stderr
    want = run_parts(two, X)["y"]
    for k in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"y{k}.npy"), want)


GLOO = """
import sys, numpy as np
from datetime import timedelta
import torch.distributed as dist
from onnxq.errors import OnnxqError
from onnxq.parts.runner import PartsRunner
rank, store, folder, where = int(sys.argv[1]), *sys.argv[2:]
try:
    PartsRunner(folder, backend="gloo", timeout=60)
except OnnxqError as error:
    print(f"alone: {error}")
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
x = np.load(where + "/x.npy")
try:
    with PartsRunner(folder, backend="gloo", timeout=60) as runner:
        for _ in range(3):
            y = runner.run({"x": x})["y"]
        np.save(f"{where}/y{rank}.npy", y)
        if rank == 1:
            x = x[:, :2]
        runner.run({"x": x})
except OnnxqError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_ranks_of_gloo(two: Path, tmp_path: Path) -> None:
    """Two processes; in the fourth run one of them fails, and the other hears of it."""
    pytest.importorskip("torch")
    np.save(tmp_path / "x.npy", X["x"])
    script = tmp_path / "rank.py"
    script.write_text(GLOO)
    ranks = [
        subprocess.Popen(  # noqa: S603
            [sys.executable, script, str(k), tmp_path / "store", two, tmp_path],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all("start one process per part with torchrun" in each for each in said)
    assert "ValidationError: stage 0 fails" in said[1]
    assert "ConfigError: another part failed" in said[0]
    want = run_parts(two, X)["y"]
    for k in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"y{k}.npy"), want)


@pytest.mark.parametrize(("backend", "module"), [("mpi", "mpi4py"), ("gloo", "torch")])
def test_a_missing_library(
    two: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, module: str
) -> None:
    for name in [module, *(m for m in sys.modules if m.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"cannot load {module} .*pip install onnxq\[{backend}"):
        PartsRunner(two, backend=backend)
