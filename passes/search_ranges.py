"""Planning, static compute: the ranges of the tensors, from what calibration samples give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.kernels_ref import RangeHistogram, activation_params
from onnxq.passes.observation import Observe, is_float
from onnxq.passes.search_scales import Progress, no_progress
from onnxq.passes.select_tensors import Selection
from onnxq.plan import Plan, Range

RangeMethod = Literal["minmax", "percentile", "mse", "mae", "entropy"]

PERCENTILE = 99.999
# Of a tensor that was 0 on all samples. Any range holds it; this one leaves the bias of the node
# behind it, whose steps are the product of two scales, well resolved.
ALL_ZERO = (0.0, 1.0)
_MOST_COARSER = 2.0
# Two terms leave an error so small that the few values beyond what samples have shown, which
# saturate in both, make up nearly all of it: twice the range costs one of 16 bits and spares them.
HEADROOM = 2.0


@dataclass(frozen=True)
class SearchRanges:
    """Fill in the ranges that a plan does not have yet.

    Given:   the groups of a Selection, and samples to run the model on
    Result:  plan.ranges[name] = (rmin, rmax), the same for all of a group

    Memory is one histogram per group, whatever the number of samples. `samples`, their number, is
    for progress alone.
    """

    observe: Observe
    method: RangeMethod = "minmax"
    progress: Progress = no_progress
    samples: int = 1

    def __call__(self, plan: Plan, selection: Selection) -> Plan:
        """`plan` with the ranges of all tensors of `selection`.

        Raises:
            CalibrationError: a tensor is NaN throughout, or a sample cannot be run.
        """
        groups = [g for g in selection.groups if any(n not in plan.ranges for n in g.names)]
        owner = {group.observed: i for i, group in enumerate(groups)}
        histograms = [RangeHistogram() for _ in groups]
        for done, values in enumerate(self.observe(list(owner))):
            self.progress("calibrating", done % self.samples, self.samples)
            for name, array in values.items():
                _add(histograms[owner[name]], name, array)
        self.progress("calibrating", self.samples, self.samples)
        for group, histogram in zip(groups, histograms, strict=True):
            found = align(_range(histogram, self.method), group.level)
            if group.limits is not None:
                found = widen(found, group.limits)
            self._fill(plan, group.names, found)
        return plan

    def _fill(self, plan: Plan, names: tuple[str, ...], found: Range) -> None:
        """A range that the user wrote for one tensor of a group holds for the others too."""
        given = next((plan.ranges[name] for name in names if name in plan.ranges), found)
        plan.ranges.update((name, given) for name in names if name not in plan.ranges)


def align(found: Range, level: float) -> Range:
    """The range widened so that `level` <= 0 is in it and, of 256 levels, is one; if that pays.

    The scale grows until the level is a whole number of steps away from 0, by a factor of at most
    (n + 1) / n where it is n steps away. The range stays as it is where the level is nearer to 0
    than a step, or so far out that the scale would more than double: what else reads the tensor,
    as the Mul of a HardSwish, would lose more than is gained.
    """
    if level == 0.0:
        return found
    rmin, rmax = min(found[0], level), found[1]
    scale = float(activation_params(rmin, rmax)[0])
    steps = -level / scale
    if steps < 1:
        return found
    factor = steps / math.floor(steps)
    if scale * factor > _MOST_COARSER * float(activation_params(*found)[0]):
        return found
    return rmin * factor, rmax * factor


def widen(found: Range, limits: Range) -> Range:
    """The range of a tensor that is split into terms: HEADROOM times as wide, within its limits."""
    rmin, rmax = (HEADROOM * end for end in found)
    return min(found[0], max(rmin, limits[0])), max(found[1], min(rmax, limits[1]))


def _add(histogram: RangeHistogram, name: str, array: np.ndarray) -> None:
    if not is_float(array):
        raise CalibrationError(f"tensor {name!r} is {array.dtype.name}, not float")
    before = histogram.count
    histogram.add(array)
    if array.size and histogram.count == before:
        raise CalibrationError(f"tensor {name!r} has no finite value on a calibration sample")


def _range(histogram: RangeHistogram, method: RangeMethod) -> Range:
    ways: dict[RangeMethod, Callable[[], Range]] = {
        "minmax": histogram.min_max,
        "percentile": lambda: histogram.percentile(PERCENTILE),
        "mse": histogram.mse,
        "mae": histogram.mae,
        "entropy": histogram.entropy,
    }
    found = ways[method]()
    return found if found[0] < found[1] else ALL_ZERO
