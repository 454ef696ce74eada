"""Small models timed against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

from onnxq.comparison import paired_ratios, quartiles, time_in_turns
from onnxq.excerpts import signature

Array = npt.NDArray[Any]

_WARMUP = 2
_FATAL_ONLY = 4


class Runner:
    """Calls a session without copies of what goes in and out.

    Args:
        session: whose inputs are tensors.
        feed: what it is run on, by input name.
    """

    def __init__(self, session: ort.InferenceSession, feed: Mapping[str, Array]) -> None:
        self._session = session
        self._outputs = [value.name for value in session.get_outputs()]
        self._feed = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).reshape(array.shape))
            for name, array in feed.items()
        }

    def __call__(self) -> None:
        """Run once."""
        self._session.run_with_ort_values(self._outputs, self._feed)


@dataclass(eq=False)
class Timer:
    """Times small models in turns; those that onnxruntime makes the same of, only once.

    Args:
        path: where onnxruntime leaves an optimized model for a moment.
        threads: of onnxruntime.
        rounds: of each comparison.
        clock: seconds.
    """

    path: Path
    threads: int | None
    rounds: int
    clock: Callable[[], float] = time.perf_counter
    _ratios: dict[tuple[Hashable, Hashable], float] = field(default_factory=dict)
    _kinds: dict[Hashable, Hashable] = field(default_factory=dict)
    _opened: tuple[Hashable, Runner] | None = None

    def kind(self, model: ModelProto, values: Mapping[str, Array]) -> Hashable | None:
        """What onnxruntime makes of a model, numbers aside; None if it does not run.

        Models of one kind take the same time.
        """
        given = signature(model)
        if given not in self._kinds:
            self._kinds[given] = self._open(model, values)
        return self._kinds[given]

    def runner(self, model: ModelProto, values: Mapping[str, Array]) -> Runner:
        """A model that has a kind, opened."""
        kind = self.kind(model, values)
        if self._opened is None or self._opened[0] != kind:
            self._open(model, values)
        assert self._opened is not None
        return self._opened[1]

    def ratio(
        self,
        reference: tuple[Hashable, Runner],
        model: ModelProto,
        values: Mapping[str, Array],
        seconds: float,
    ) -> float:
        """Time of a model over that of the reference (its kind, and it itself); nan if it fails.

        What a call takes by itself is in both.
        """
        kind = self.kind(model, values)
        if kind is None:
            return np.nan
        key = reference[0], kind
        if reference[0] == kind:
            return 1.0
        if key not in self._ratios:
            times = self.times([reference[1], self.runner(model, values)], seconds)
            self._ratios[key] = quartiles(paired_ratios(times)[:, 1]).median
        return self._ratios[key]

    def times(self, runs: Sequence[Callable[[], None]], seconds: float) -> Array:
        """Seconds, float64 [rounds, runs]."""
        return time_in_turns(
            runs, warmup=_WARMUP, rounds=self.rounds, seconds=seconds, clock=self.clock
        )

    def empty(self) -> Runner:
        """A model that does nothing, for what a call takes by itself."""
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "empty", [x], [y])
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
        return self.runner(model, {"x": np.zeros(1, np.float32)})

    def _open(self, model: ModelProto, values: Mapping[str, Array]) -> Hashable | None:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.optimized_model_filepath = str(self.path)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
            runner = Runner(session, values)
            runner()
        except Exception:  # onnxruntime raises many unrelated types
            return None
        kind = signature(onnx.load(self.path))
        self._opened = kind, runner
        return kind
