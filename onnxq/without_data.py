"""The numbers of a plan beyond rounding to nearest, without any data.

Two things are known of a node's inputs all the same: neighbouring positions of a feature map are
alike, and BatchNormalization tells the mean of each channel.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref import Series
from onnxq.kernels_ref.alike import neighbour_correlation, round_alike
from onnxq.model import Model
from onnxq.passes.channel_statistics import ChannelMoments
from onnxq.passes.node_rows import NodeRows
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.passes.weights import Weight
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]

# Correlation of direct neighbours. On real models it is .85 to .96 for pictures and .2 to .75 for
# what is inside of a network; that outputs are often averaged over positions asks for more.
RHO = 0.7


def complete(
    model: Model,
    plan: Plan,
    statistics: Mapping[str, ChannelMoments],
    names: Container[str] | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """A plan whose kernels are rounded for inputs that are alike, and whose biases make up for it.

    Only of nodes with one term, or one behind that of the centre tap: several leave little to gain,
    and as they are, the first of them are those of a plan with fewer. Rounded are kernels of a Conv
    that reach over several positions along two axes or more, with one scale per channel. An offset
    is then chosen so that the errors of a row sum to 0 again. Where the mean m of a node's input is
    known, (W - Ŵ)·m is added to its bias (arXiv 1906.04721). What earlier nodes get wrong is not
    known without data, and not made up for.

    Args:
        model: the canonical model; only read.
        plan: with all scales. Integers, points and biases that it has already are kept.
        statistics: the moments of tensors of `model`, see `channel_statistics`.
        names: of the nodes that are looked at; all if not given.

    Returns:
        A new plan, and a note for the user.

    Raises:
        ConfigError: the plan was made for another model.
    """
    copies = {key: dict(getattr(plan, key)) for key in ("integers", "offsets", "bias")}
    made = plan.model_copy(update=copies)
    rounded = corrected = 0
    for entry, (candidate, weight) in match_plan(model, made):
        if candidate.inner or (names is not None and entry.name not in names):
            continue
        if entry.terms > 1 and not entry.centre:
            continue
        node = candidate.node
        series = node_series(weight, entry, made)
        given = entry.name in made.integers or entry.name in made.points
        if not given and _reaches_neighbours(entry, weight):
            series = _rounded(node, weight, entry, series)
            made.integers[entry.name] = tuple(t.q.astype(np.int8) for t in series.terms)
            if series.offset is not None:
                made.offsets[entry.name] = series.offset
            rounded += 1
        if entry.name not in made.bias:
            shift = _shift(node, weight, series, statistics)
            if shift is not None:
                made.bias[entry.name] = shift
                corrected += 1
    return made, _notes(rounded, corrected, len(made.quantized))


def _reaches_neighbours(entry: NodePlan, weight: Weight) -> bool:
    """Whether a node is rounded here.

    The errors of a depthwise kernel with an offset sum to 0 as it is, and more is not gained.
    """
    return (
        entry.op_type == "Conv"
        and sum(size > 1 for size in weight.shape[2:]) >= 2
        and entry.granularity == "per_channel"
        and not (entry.offset and weight.shape[1] == 1)
    )


def _rounded(node: gs.Node, weight: Weight, entry: NodePlan, series: Series) -> Series:
    """The series with other integers, and an offset that suits them."""
    kernel = weight.shape[2:]
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    rest, offset = weight.matrix(), series.offset
    if offset is not None:
        rest = rest - offset[:, np.newaxis]
    kept, changed = series.terms[:0], series.terms
    if entry.centre:  # what it leaves is rounded
        kept, changed = series.terms[:1], series.terms[1:]
        rest = rest - kept[0].dequantize()
    found = round_alike(
        rest,
        [term.scale for term in changed],
        neighbour_correlation(kernel, dilations, RHO),
        bits=entry.bits,
        kind=entry.series,
        full_range=offset is not None,
    )
    pairs = zip(changed, found, strict=True)
    made = replace(series, terms=(*kept, *(replace(term, q=q) for term, q in pairs)))
    if offset is None:
        return made
    left = (weight.matrix() - made.dequantize()).mean(axis=1, dtype=np.float64)
    return replace(made, offset=(offset + left).astype(offset.dtype))


def _shift(
    node: gs.Node, weight: Weight, series: Series, statistics: Mapping[str, ChannelMoments]
) -> Array | None:
    """What makes the mean of the outputs right, float32 [out]; None if the inputs' is unknown."""
    rows = NodeRows.of(node, weight)
    if isinstance(rows, str):
        return None
    known = statistics.get(node.inputs[rows.slot].name)
    if known is None:
        return None
    taps = int(np.prod(weight.shape[2:])) if node.op == "Conv" else 1
    mean = np.repeat(known.mean, taps)
    if len(mean) != rows.groups * rows.inputs:
        return None
    error = weight.matrix().astype(np.float64) - series.dequantize()
    by_group = error.reshape(rows.groups, -1, rows.inputs)
    shift = by_group @ mean.reshape(rows.groups, rows.inputs, 1)
    return np.asarray(shift.reshape(-1), np.float32)


def _notes(rounded: int, corrected: int, total: int) -> tuple[str, ...]:
    found = []
    if rounded:
        found.append(f"{rounded} of {total} rounded for inputs alike at neighbouring positions")
    if corrected:
        found.append(f"{corrected} of {total} biases corrected by BatchNormalization's means")
    return (f"without data: {'; '.join(found)}",) if found else ()
