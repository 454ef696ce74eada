"""How many terms each output channel gets (multipoint quantization, arXiv 2002.09049).

Most channels are right with one term; those whose output error stays high get a second, third, …
The paper adds points one at a time, each with the scale that is best for what is left; that is
`greedy_scales`. A search over the scales of all terms together (joint.py) does better.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, check_term_count
from onnxq.kernels_ref.granularity import Granularity
from onnxq.kernels_ref.hessian import batched
from onnxq.kernels_ref.moments import Float64Array
from onnxq.kernels_ref.partial import Coverage, partial_scales, realize_partial
from onnxq.kernels_ref.series import SeriesKind, expand

Points = npt.NDArray[np.int8]


def greedy_scales(
    w: FloatArray, *, bits: int, terms: int, granularity: Granularity
) -> tuple[FloatArray, ...]:
    """One scale array per term, each the best for the residual of those before it.

    They are scales of a "joint" series, whose terms round residuals. Arguments and errors as
    `series_scales`.
    """
    check_term_count(terms)
    rest, scales = w, []
    for _ in range(terms):
        one = expand("joint", rest, bits=bits, terms=1, granularity=granularity)
        scales.append(one.terms[0].scale)
        rest = one.residual(rest)
    return tuple(scales)


def channel_errors(
    w: FloatArray, approximation: FloatArray, hessian: FloatArray | None = None
) -> Float64Array:
    """Squared output error of each channel, as a share of its squared output; float64 [out].

    w, approximation: [out, in]. hessian: second moments of the inputs, [in, in], or
    [groups, in, in] with rows group after group (InputMoments.hessian); None takes the inputs as
    white. A channel that puts out nothing has error 0 where it is right, and infinity otherwise;
    one whose moments are not finite is judged without them. Raises ValueError for shapes that do
    not fit.
    """
    if w.shape != approximation.shape or w.ndim != 2:
        raise ValueError(
            f"w has shape {w.shape} and the approximation {approximation.shape}; give [out, in]"
        )
    exact = w.astype(np.float64)
    rest = exact - approximation
    noise, signal = np.square(rest).sum(axis=1), np.square(exact).sum(axis=1)
    if hessian is not None:
        h = batched(hessian, w, "hessian")
        weighed, energy = _energies(rest, h), _energies(exact, h)
        usable = np.isfinite(weighed) & np.isfinite(energy)
        noise, signal = np.where(usable, weighed, noise), np.where(usable, energy, signal)
    noise = np.maximum(noise, 0.0)
    ratio = noise / np.where(signal > 0, signal, 1.0)
    return np.where(signal > 0, ratio, np.where(noise > 0, np.inf, 0.0))


def _energies(rows: Float64Array, h: Float64Array) -> Float64Array:
    split = rows.reshape(len(h), -1, rows.shape[1])
    return np.asarray(np.einsum("gij,gij->gi", split @ h, split).reshape(-1))


def point_errors(
    kind: SeriesKind,
    w: FloatArray,
    coverage: Coverage,
    *,
    bits: int,
    terms: int,
    granularity: Granularity,
    hessian: FloatArray | None = None,
) -> Float64Array:
    """`channel_errors` with 1, 2, …, `terms` terms for all channels; float64 [out, terms].

    A term more never makes an error larger: where rounding does, the smaller one stands, since a
    channel may be left with fewer terms. coverage: its points are not looked at.
    """
    errors = np.empty((len(w), terms))
    for n in range(1, terms + 1):
        whole = replace(coverage, points=None)
        offset, scales = partial_scales(kind, w, whole, bits=bits, terms=n, granularity=granularity)
        found = realize_partial(kind, w, scales, whole, offset, bits=bits, granularity=granularity)
        errors[:, n - 1] = channel_errors(w, found.dequantize(), hessian)
    return np.minimum.accumulate(errors, axis=1)


def most_gained(
    kind: SeriesKind,
    w: FloatArray,
    *,
    bits: int,
    terms: int,
    granularity: Granularity,
    count: int,
) -> npt.NDArray[np.bool_]:
    """The `count` rows of w whose squared error falls most from one term to `terms`; bool [out].

    Not relative to the rows: what a row errs, the outputs of one node have in common units.
    Raises ValueError as `expand`.
    """
    errors = []
    for n in (1, terms):
        series = expand(kind, w, bits=bits, terms=n, granularity=granularity)
        errors.append(np.square(series.residual(w)).sum(axis=1, dtype=np.float64))
    order = np.argsort(errors[1] - errors[0], kind="stable")
    chosen = np.zeros(len(w), np.bool_)
    chosen[order[:count]] = True
    return chosen


def points_for_tolerance(errors: Float64Array, tolerance: float) -> Points:
    """The fewest terms with which each channel's error is at most `tolerance`; int8 [out].

    errors: [out, N] with 1 … N terms. A channel that N terms do not bring down gets the fewest that
    are as good as N. Raises ValueError for a negative tolerance or errors of another shape.
    """
    _check_errors(errors)
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; give a number >= 0")
    wanted = np.maximum(errors[:, -1], tolerance)
    return np.asarray((errors > wanted[:, np.newaxis]).sum(axis=1) + 1, np.int8)


def points_for_budget(
    errors: Sequence[Float64Array], costs: Sequence[float], budget: float, setup: float = 0.0
) -> list[Points]:
    """Terms for the channels of several nodes, at most `budget` beyond one for each.

    errors: per node [out, N] with 1 … N terms, in units that can be compared between nodes.
    costs: per node, of one more term of one channel, in the units of `budget`. In each step the
    channel with the largest fall of error per cost gets what brings it: one term, or several where
    a term alone brings less (the greedy step of the paper), of what still fits.
    setup: what each node with further terms costs besides. Then these terms go to the nodes in
    which they are worth that, too, at the price of error at which the budget is spent.
    Raises ValueError for costs that are not positive, or errors of a wrong shape.
    """
    for one, cost in zip(errors, costs, strict=True):
        _check_errors(one)
        if not cost > 0:
            raise ValueError(f"a term costs {cost}; costs must be positive")
    if setup > 0:
        worth = _worth_setup(errors, costs, budget, setup)
        errors = [e if w else e[:, :1] for e, w in zip(errors, worth, strict=True)]
        budget = max(budget - setup * sum(worth), 0.0)
    points = [np.ones(len(one), np.int8) for one in errors]
    waiting: list[_Step] = []

    def offer(node: int, channel: int) -> None:
        """Put the best next step that fits, if there is one, into the heap."""
        now = int(points[node][channel])
        fits = int(min(budget // costs[node], errors[node].shape[1] - now))
        step = _best_step(errors[node][channel, now - 1 : now + fits], costs[node])
        if step is not None:
            heapq.heappush(waiting, (-step[0], node, channel, now + step[1]))

    for node, one in enumerate(errors):
        for channel in range(len(one)):
            offer(node, channel)
    while waiting:
        _, node, channel, n = heapq.heappop(waiting)
        price = (n - int(points[node][channel])) * costs[node]
        if price <= budget:
            budget -= price
            points[node][channel] = n
        offer(node, channel)
    return points


_HALVINGS = 60


def _worth_setup(
    errors: Sequence[Float64Array], costs: Sequence[float], budget: float, setup: float
) -> list[bool]:
    """The nodes with further terms, at the least price, in error per cost, that fits a budget."""
    falls = [_falls(one) for one in errors]

    def bought(price: float) -> tuple[list[bool], float]:
        """The nodes that gain more than they cost, and what they cost in all."""
        found, spent = [], 0.0
        for fall, cost in zip(falls, costs, strict=True):
            steps = cost * np.arange(fall.shape[1])
            gains = fall - price * steps
            found.append(bool(gains.max(axis=1).sum() > price * setup))
            if found[-1]:
                spent += setup + float(steps[gains.argmax(axis=1)].sum())
        return found, spent

    pairs = zip(falls, costs, strict=True)
    high = max(float(f[np.isfinite(f)].max(initial=0.0)) / cost for f, cost in pairs)
    low = high * 1e-9
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        if bought(middle)[1] <= budget:
            high = middle
        else:
            low = middle
    return bought(high)[0]


def _falls(errors: Float64Array) -> Float64Array:
    """By how much each error [out, N] is smaller than the first of its row."""
    # An infinite error falls to any other at once; to an infinite one it does not fall.
    first = errors[:, :1]
    with np.errstate(invalid="ignore"):
        return np.where(errors < first, first - errors, 0.0)


_Step = tuple[float, int, int, int]  # -fall per cost, node, channel, terms afterwards


def _best_step(errors: Float64Array, cost: float) -> tuple[float, int] | None:
    """(fall per cost, number of terms) of the best step down from errors[0]."""
    if len(errors) < 2 or not errors[0] > errors[-1]:
        return None
    falls = _falls(errors[np.newaxis])[0, 1:] / (cost * np.arange(1, len(errors)))
    best = int(np.argmax(falls))
    return float(falls[best]), best + 1


def _check_errors(errors: Float64Array) -> None:
    if errors.ndim != 2 or not errors.size or np.isnan(errors).any():
        raise ValueError(f"errors have shape {errors.shape}; give numbers [out, terms]")
