"""Planning: which nodes share the bytes for further terms, where each takes some besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.multipoint import points_for_budget

Array = npt.NDArray[Any]
Gain = tuple[int, float]


def gained(errors: Sequence[Array], points: Sequence[Array]) -> Gain:
    """What terms bring: how many errors become finite, and by how much the others fall in all.

    errors: float64 [out, terms] per node; points: int [out], the terms of its channels.
    """
    freed, fallen = 0, 0.0
    for each, terms in zip(errors, points, strict=True):
        reached = each[np.arange(len(each)), np.minimum(terms, each.shape[1]) - 1]
        finite = np.isfinite(each[:, 0])
        freed += int((~finite & np.isfinite(reached)).sum())
        fallen += float((each[finite, 0] - reached[finite]).sum())
    return freed, fallen


def share_budget(
    errors: Sequence[Array], costs: Sequence[float], budget: float, setup: float
) -> list[Array]:
    """`points_for_budget`, with other choices of nodes tried too: the best of them.

    Nodes that are alike become worth their setup at one price, and all of them may be too many.
    Therefore also those that bring most on their own are tried, as the first 1, 2, 4, … of them.
    """
    best = list(points_for_budget(errors, costs, budget, setup))
    if not setup:
        return best
    alone = [
        gained([one], points_for_budget([one], [cost], max(budget - setup, 0.0)))
        for one, cost in zip(errors, costs, strict=True)
    ]
    order = sorted(range(len(errors)), key=lambda i: alone[i], reverse=True)
    useful = sum(gain > (0, 0.0) for gain in alone)
    most = min(useful, int(budget // setup))
    for count in sorted({min(2**i, most) for i in range(most.bit_length() + 1)} - {0}):
        chosen = set(order[:count])
        some = [one if i in chosen else one[:, :1] for i, one in enumerate(errors)]
        made = points_for_budget(some, costs, budget - setup * count)
        if gained(errors, made) > gained(errors, best):
            best = list(made)
    return best
