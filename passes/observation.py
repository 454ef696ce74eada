"""What planning sees of a model that runs: the values of inner tensors on calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Observe(Protocol):
    """Runs the float model on all calibration samples and hands out the named tensors."""

    def __call__(self, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        """Values by tensor name.

        Together the mappings hold each name once per sample. One mapping may hold only some of the
        names: where all of them together are too large for the memory, the samples are run again
        for the rest.
        """
        ...


def is_float(array: Array) -> bool:
    """Whether an observed tensor can be quantized."""
    return bool(np.issubdtype(array.dtype, np.floating))
