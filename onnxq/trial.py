"""A plan tried on the whole model: written as it will be, run beside the float model, measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxq.candidates import FLOAT_BYTES
from onnxq.embedded_plan import embed_plan
from onnxq.feeds import Feed
from onnxq.files import model_bytes
from onnxq.flips import Distances
from onnxq.meter import Measured, Meter, is_classifier
from onnxq.model import Model, load, raise_opset, save, to_proto
from onnxq.model.export import export
from onnxq.passes import Expand, InsertQDQ, SearchScales, required_opset
from onnxq.plan import Plan
from onnxq.sensitivity import Table
from onnxq.session import open_session, run

_IN_MEMORY = 2**30  # bytes of a model that is copied in memory; larger ones go through a file
_NAMES_COUNT = 2**27  # bytes of weights, above which names and nodes are nothing beside them
_KEPT = 2**29  # bytes of float outputs that are kept; those of further samples are computed again


class Trial:
    """Tries plans for one canonical model on the same samples.

    Use as a context manager: copies of large models are in a temporary folder.

    Args:
        model: the canonical float model; only read.
        feeds: samples, gone through once per plan.
        threads: of onnxruntime.
        beside: further samples, which plans may be fitted to: only how far a classifier's classes
            lie apart, and what part of the noise matters, is taken from them (see `flips`).
    """

    def __init__(
        self,
        model: Model,
        feeds: Iterable[Feed],
        threads: int | None = None,
        beside: Iterable[Feed] = (),
    ) -> None:
        self._feeds, self.threads, self._beside = feeds, threads, beside
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._source = self._written(model, "float.onnx")
        self.float_bytes = _size(self._source)
        self._outputs: dict[int, list[Any]] = {}
        self._kept = 0

    @cached_property
    def reference(self) -> ort.InferenceSession:
        """The float model, opened when first asked for: an estimate runs nothing."""
        return open_session(self._source, threads=self.threads)

    @cached_property
    def _classes(self) -> tuple[tuple[Distances, Any], ...]:
        """Of the samples beside, with the float output; nothing where it is no classifier's."""
        found = []
        for feed in self._beside:
            first = run(self.reference, feed)[0]
            classes = isinstance(first, np.ndarray) and is_classifier(first)
            distances = Distances.of(first) if classes else None
            if distances is None:
                return ()
            found.append((distances, first))
        return tuple(found)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def write(self, plan: Plan) -> bytes | Path:
        """The model that a plan makes; a path is overwritten by the next one.

        Raises:
            ConfigError: the plan was made for another model.
            ModelError: the opset cannot be raised.
        """
        model = load(self._source if isinstance(self._source, Path) else _parsed(self._source))
        done = SearchScales()(model, plan)
        model = raise_opset(model, required_opset(done))
        Expand(done)(model)
        if any(node.activations == "static" for node in done.quantized):
            InsertQDQ(done)(model)
        if done.quantized:
            embed_plan(model, done)
        return self._written(model, "tried.onnx")

    def __call__(self, plan: Plan) -> tuple[Measured, int]:
        """What a plan makes of the samples, and its size in bytes; the plan's scales are completed.

        Raises:
            ConfigError: the plan was made for another model, or there are no samples.
            ValidationError: a model does not load or run.
        """
        written = self.write(plan)
        return self.measure(written), _size(written)

    def size(self, plan: Plan) -> int:
        """Bytes of the model that a plan makes."""
        return _size(self.write(plan))

    def exact_bytes(self, table: Table, plan: Plan) -> Table:
        """The table with the bytes that files really have, where names and nodes count."""
        weights = sum(FLOAT_BYTES * unit.weight.size for unit in table.units)
        if weights > _NAMES_COUNT:
            return table
        return table.with_overhead(plan, self.size, self.float_bytes - weights)

    def measure(self, written: bytes | Path) -> Measured:
        """A model that was written, beside the float one."""
        actual = open_session(written, threads=self.threads)
        meter = Meter([distances for distances, _ in self._classes])
        for feed, wanted in self._pairs():
            meter.add(wanted, run(actual, feed))
        # zip: nothing is run where it is no classifier
        for (distances, first), feed in zip(self._classes, self._beside, strict=False):
            meter.add_fitted(distances.noise(first, run(actual, feed)[0]))
        return meter.measured()

    def _pairs(self) -> Iterator[tuple[Feed, list[Any]]]:
        for i, feed in enumerate(self._feeds):
            wanted = self._outputs.get(i)
            if wanted is None:
                wanted = run(self.reference, feed)
                self._kept += sum(w.nbytes for w in wanted if isinstance(w, np.ndarray))
                if self._kept <= _KEPT:
                    self._outputs[i] = wanted
            yield feed, wanted

    def _written(self, model: Model, name: str) -> bytes | Path:
        if export(model).size < _IN_MEMORY:
            content: bytes = to_proto(model).SerializeToString()
            return content
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxq-")
        # not over a file that is still mapped: a copy of the float model reads from its own
        path = Path(self._folder.name) / name
        save(model, path)
        return path


def _size(written: bytes | Path) -> int:
    return len(written) if isinstance(written, bytes) else model_bytes(written)


def _parsed(content: bytes) -> Any:
    return onnx.ModelProto.FromString(content)
