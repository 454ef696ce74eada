"""Parts in processes of their own. What they send each other are bytes, never Python objects."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
import struct
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import ConfigError, OnnxqError
from onnxq.parts.collectives import Hub, PartGone, Spoke, listen, send
from onnxq.parts.manifest import Manifest
from onnxq.parts.part import Part

Array = npt.NDArray[Any]


class Processes:
    """Part 0 in this process, each other one in a process of its own, joined by a pipe.

    Raises:
        ConfigError: a process does not start, in time; or as `Part`, whichever part it is.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        try:
            for k in range(1, manifest.parts):
                ours, theirs = context.Pipe()
                _limit(ours, timeout)
                self._connections.append(ours)
                process = context.Process(
                    target=serve_part,
                    args=(theirs, str(folder), k),
                    kwargs={"size": manifest.parts, "threads": threads, "timeout": timeout},
                    name=f"onnxq part {k}",
                    daemon=True,
                )
                process.start()
                self._processes.append(process)
                theirs.close()
            self._part = Part(folder, manifest, 0, threads)
            self._wait_for_start(timeout)
        except BaseException:
            self.close()
            raise
        self._hub = Hub(self._connections, timeout)

    @property
    def reduced_bytes(self) -> int:
        """As `Part`."""
        return self._part.reduced_bytes

    def _wait_for_start(self, timeout: float) -> None:
        for k, connection in enumerate(self._connections, start=1):
            try:
                listen(connection, timeout, f"part {k}")
            except PartGone as error:
                raise ConfigError(
                    f"{error}; a script that starts processes has to do so under "
                    '`if __name__ == "__main__":`'
                ) from None

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """As `Part`."""
        message = _pack(feed)
        for k, connection in enumerate(self._connections, start=1):
            send(connection, f"part {k}", message)
        return self._part.run(feed, self._hub)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(1)  # it ends when it sees that the pipe is closed
            if process.is_alive():
                process.kill()
                process.join()


def _limit(connection: Connection, timeout: float) -> None:
    """Let no read or write that has begun take longer, where a pipe is a pair of sockets."""
    if os.name == "posix":
        seconds = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        with socket.socket(fileno=os.dup(connection.fileno())) as pipe:
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)


def serve_part(
    connection: Connection, folder: str, index: int, *, size: int, threads: int, timeout: float
) -> None:
    """What the process of part `index` does: run each input that part 0 sends, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # part 0 decides, and closes the pipe
    spoke = Spoke(connection, index, size, timeout)
    try:
        part = Part(folder, Manifest.load(folder), index, threads)
        send(connection, "part 0")
        while True:
            feed = _unpack(listen(connection, None, "part 0"))
            part.run(feed, spoke, outputs=False)
    except OnnxqError as error:
        spoke.abort(str(error))


def _pack(feed: Mapping[str, Array]) -> bytes:
    """Arrays in numpy's file format, after their names; no Python object is ever pickled."""
    out = io.BytesIO()
    names = json.dumps(list(feed)).encode()
    out.write(len(names).to_bytes(8, "little") + names)
    for array in feed.values():
        text = array.astype(str) if array.dtype.kind == "O" else array
        np.lib.format.write_array(out, text, allow_pickle=False)
    return out.getvalue()


def _unpack(message: memoryview) -> dict[str, Array]:
    source = io.BytesIO(message)
    names = json.loads(source.read(int.from_bytes(source.read(8), "little")))
    return {name: np.lib.format.read_array(source, allow_pickle=False) for name in names}
