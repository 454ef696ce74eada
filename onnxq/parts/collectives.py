"""The one thing that parts do together: a sum over all of them, which each of them gets.

Addition of the terms is commutative and associative up to float32 rounding, so that any order, and
any library's way of reducing, gives the same model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.errors import ConfigError

Array = npt.NDArray[Any]

OK, FAILED = b"+", b"-"  # the last byte of a message between processes; text stands before FAILED


class Collective(Protocol):
    """One rank's place among `size` ranks, one per part."""

    rank: int
    size: int

    def all_reduce(self, array: Array) -> Array:
        """The sum of the arrays (contiguous, of one dtype and shape) that all ranks give.

        Every rank gets the same bits.

        Raises:
            ConfigError: a rank failed, or did not answer in time.
        """
        ...

    def abort(self, reason: str) -> None:
        """Let the other ranks know that this one has failed, so that none of them waits for it."""
        ...

    def close(self) -> None:
        """Leave, after the last sum."""
        ...


class PartGone(ConfigError):
    """A part ended without a word."""


def add_up(arrays: Sequence[Array]) -> Array:
    """Σ arrays, in their order, in their dtype.

    Raises:
        ConfigError: they differ in dtype or shape, so that they are no parts of one model.
    """
    kinds = {(array.dtype, array.shape) for array in arrays}
    if len(kinds) > 1:
        raise ConfigError(
            f"parts give partial sums of different kinds ({len(kinds)} dtypes and shapes): they "
            "come from different splits, or got different inputs"
        )
    total = arrays[0] + arrays[1]
    for array in arrays[2:]:
        total += array
    return total


class ThreadGroup:
    """Ranks that are threads of this process."""

    def __init__(self, size: int, timeout: float) -> None:
        self._slots: list[list[Array | None]] = [[None] * size, [None] * size]
        self._barrier = threading.Barrier(size, timeout=timeout)
        self.ranks = [_ThreadRank(self, rank, size) for rank in range(size)]

    def exchange(self, rank: int, turn: int, array: Array) -> list[Array]:
        """The arrays of all ranks; two sets of slots in turns, since one may still be read."""
        slots = self._slots[turn % 2]
        slots[rank] = array
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise ConfigError("another part failed, or did not answer in time") from None
        return [slot for slot in slots if slot is not None]

    def abort(self) -> None:
        """Wake up whoever waits, now and later."""
        self._barrier.abort()


class _ThreadRank:
    def __init__(self, group: ThreadGroup, rank: int, size: int) -> None:
        self._group, self.rank, self.size = group, rank, size
        self._turn = 0

    def all_reduce(self, array: Array) -> Array:
        self._turn += 1
        return add_up(self._group.exchange(self.rank, self._turn, array))

    def abort(self, reason: str) -> None:
        self._group.abort()

    def close(self) -> None:
        """Nothing to leave: others may still be reading the last sum."""


class Hub:
    """Rank 0 of processes that are joined by pipes: it adds up for all of them."""

    rank = 0

    def __init__(self, connections: Sequence[Connection], timeout: float) -> None:
        self._connections, self._timeout = connections, timeout
        self.size = len(connections) + 1

    def all_reduce(self, array: Array) -> Array:
        """As `Collective`."""
        theirs = [
            receive(connection, self._timeout, f"part {k}", array)
            for k, connection in enumerate(self._connections, start=1)
        ]
        total = add_up([array, *theirs])
        for k, connection in enumerate(self._connections, start=1):
            send(connection, f"part {k}", total)
        return total

    def abort(self, reason: str) -> None:
        """As `close`: the others see that their pipe is closed."""
        self.close()

    def close(self) -> None:
        """Close the pipes."""
        for connection in self._connections:
            connection.close()


class Spoke:
    """One of the other ranks."""

    def __init__(self, connection: Connection, rank: int, size: int, timeout: float) -> None:
        self._connection, self._timeout = connection, timeout
        self.rank, self.size = rank, size

    def all_reduce(self, array: Array) -> Array:
        """As `Collective`."""
        send(self._connection, "part 0", array)
        return receive(self._connection, self._timeout, "part 0", array)

    def abort(self, reason: str) -> None:
        """Part 0 is told why, if it is still there."""
        with suppress(OSError):
            self._connection.send_bytes(reason.encode() + FAILED)

    def close(self) -> None:
        """Close the pipe."""
        self._connection.close()


def send(connection: Connection, who: str, data: Array | bytes = b"") -> None:
    """Say that all is well, and hand over bytes.

    Raises:
        ConfigError: `who`, at the other end, is gone (says what its last words were), or does not
            read.
    """
    plain = data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
    try:
        connection.send_bytes(b"".join((plain, OK)))
    except BlockingIOError:
        raise ConfigError(f"{who} does not take what it is sent: see what it does") from None
    except OSError:
        listen(connection, 0, who)
        raise PartGone(f"{who} ended before its work was done") from None


def receive(connection: Connection, timeout: float, who: str, like: Array) -> Array:
    """An array of the dtype and shape of `like` that `who` sends.

    Raises:
        ConfigError: `who` failed or is gone, sends another number of bytes, or nothing in time.
    """
    data = listen(connection, timeout, who)
    if len(data) != like.nbytes:
        raise ConfigError(
            f"{who} gives {len(data)} bytes where {like.nbytes} are due: it comes from another "
            "split, or got another input"
        )
    return np.frombuffer(data, like.dtype).reshape(like.shape)


def listen(connection: Connection, timeout: float | None, who: str) -> memoryview:
    """Wait for a message that all is well; the bytes in it.

    Raises: as `receive`.
    """
    try:
        if not connection.poll(timeout):
            raise ConfigError(
                f"{who} did not answer within {timeout:g} s: raise --timeout, or see what it does"
            )
        message = memoryview(connection.recv_bytes())
    except (EOFError, OSError):
        raise PartGone(f"{who} ended before its work was done") from None
    if message[-1:] != OK:
        raise ConfigError(f"{who}: {bytes(message[:-1]).decode(errors='replace')}")
    return message[:-1]


class MpiRanks:
    """Ranks of an MPI job: an mpi4py communicator, or MPI.COMM_WORLD.

    MPI has no timeouts: a rank that fails ends the whole job.
    """

    def __init__(self, communicator: Any = None) -> None:
        if communicator is None:
            communicator = _library("mpi4py.MPI", "mpi").COMM_WORLD
        self._communicator = communicator
        self.rank, self.size = int(communicator.Get_rank()), int(communicator.Get_size())

    def all_reduce(self, array: Array) -> Array:
        """As `Collective`; the order of summation is the MPI library's."""
        total = np.empty_like(array)
        try:
            self._communicator.Allreduce(array, total)
        except Exception as error:  # mpi4py.MPI.Exception, which is not importable without it
            raise ConfigError(f"MPI: {error}") from None
        return total

    def abort(self, reason: str) -> None:
        """End the job: the other ranks could not be woken up otherwise."""
        sys.stderr.write(f"error: part {self.rank}: {reason}\n")
        sys.stderr.flush()
        self._communicator.Abort(1)

    def close(self) -> None:
        """MPI ends with its processes."""


class GlooRanks:
    """Ranks of torch.distributed, over gloo.

    The default process group is joined (as torchrun's environment says) unless that has been done.
    """

    def __init__(self, timeout: float) -> None:
        self._torch = _library("torch", "gloo")
        self._distributed = _library("torch.distributed", "gloo")
        wait = timedelta(seconds=timeout)
        self._joined = not self._distributed.is_initialized()
        try:
            if self._joined:
                self._distributed.init_process_group("gloo", timeout=wait)
            self._group = self._distributed.new_group(backend="gloo", timeout=wait)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"torch.distributed: {_first_line(error)}: start one process per part with torchrun"
            ) from None
        self.rank = int(self._distributed.get_rank())
        self.size = int(self._distributed.get_world_size())

    def all_reduce(self, array: Array) -> Array:
        """As `Collective`; the order of summation is gloo's."""
        total = self._torch.from_numpy(array.copy())
        try:
            self._distributed.all_reduce(total, group=self._group)
        except RuntimeError as error:
            raise ConfigError(f"another part failed: gloo: {_first_line(error)}") from None
        return np.asarray(total.numpy())

    def abort(self, reason: str) -> None:
        """As `close`: the others see that the connections are closed."""
        self.close()

    def close(self) -> None:
        """Close the connections; the default process group stays if it was there before."""
        if self._distributed.is_initialized():
            self._distributed.destroy_process_group(None if self._joined else self._group)


def _library(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # mpi4py raises RuntimeError where there is no MPI library
        raise ConfigError(
            f"--backend {extra} cannot load {module.partition('.')[0]} ({_first_line(error)}): "
            f"pip install onnxq[{extra}]{', and an MPI library' if extra == 'mpi' else ''}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
