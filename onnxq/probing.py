"""Runs of a float model in which one weight, or the activation that one node reads, is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.feeds import Feed
from onnxq.meter import is_error_output
from onnxq.model import Model
from onnxq.passes.probe import open_weights
from onnxq.passes.probe_activations import NO_UNIT, SwitchedUnit, switch_activations
from onnxq.plan import Plan
from onnxq.session import open_session, run

Array = npt.NDArray[Any]


class Probe:
    """A float model in one session, whose planned weights are fed.

    Args:
        model: canonical; only read.
        plan: whose weights can be changed.
        units: whose activations can be changed.
        feeds: what is run.
        threads: of onnxruntime.

    Raises:
        ConfigError: the plan was made for another model.
        ModelError: what the model holds beside the planned weights passes 2 GiB.
        ValidationError: the model does not load or run.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        units: Sequence[SwitchedUnit],
        feeds: Sequence[Feed],
        threads: int | None,
    ) -> None:
        opened = open_weights(model, plan)
        self._inputs = opened.inputs
        fixed: Feed = {
            opened.inputs[name]: weight.from_matrix(weight.matrix()).reshape(weight.shape)
            for name, weight in opened.weights.items()
        }
        proto = opened.proto
        self._switches: tuple[str, ...] = ()
        if any(unit.modes for unit in units):
            switched = switch_activations(proto, units)
            proto, self._switches = switched.proto, (switched.unit, switched.mode)
            fixed.update(self._switch(NO_UNIT, 0))
        self._session = open_session(proto.SerializeToString(), threads=threads)
        self._feeds = [{**fixed, **feed} for feed in feeds]
        self._wanted = [run(self._session, feed) for feed in self._feeds]

    def weight_error(self, names: Sequence[str], weight: Array) -> float:
        """Of the worst output with another weight, of the stored shape, in the nodes named.

        The energy of the error, relative to the output's own; inf if not finite.
        """
        return self._error({self._inputs[name]: weight for name in names})

    def activation_error(self, unit: int, mode: int) -> float:
        """The same where a unit, which has modes, reads its activation in one of them."""
        return self._error(self._switch(unit, mode))

    def _switch(self, unit: int, mode: int) -> Feed:
        values = (np.array(unit, np.int64), np.array(mode, np.int64))
        return dict(zip(self._switches, values, strict=True))

    def _error(self, changed: Feed) -> float:
        noise: dict[int, float] = {}
        signal: dict[int, float] = {}
        for feed, wanted in zip(self._feeds, self._wanted, strict=True):
            got = run(self._session, {**feed, **changed})
            for i, (w, g) in enumerate(zip(wanted, got, strict=True)):
                if not is_error_output(w):
                    continue
                finite = np.isfinite(w)
                exact = w[finite].astype(np.float64)
                difference = g[finite].astype(np.float64) - exact
                noise[i] = noise.get(i, 0.0) + float(difference @ difference)
                signal[i] = signal.get(i, 0.0) + float(exact @ exact)
        energies = [noise[i] / signal[i] for i in noise if signal[i] > 0]
        worst = max(energies, default=0.0)
        return worst if np.isfinite(worst) else float("inf")
