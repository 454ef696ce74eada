"""Digits of which the last are dropped: the others rounded, in the file, to what all have said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.kernels_ref.round_digits import round_digits
from onnxq.model import Model
from onnxq.passes.edit import consumers, replace_input
from onnxq.passes.recover_terms import StoredIntegers, TermReader, padded_row
from onnxq.passes.weights import RECURRENT
from onnxq.plan import NodePlan, Plan

Array = npt.NDArray[Any]


def round_terms(model: Model, plan: Plan, keep: Mapping[str, int]) -> None:
    """Round, in place, the digits of each node of which terms beyond the first `keep` are dropped.

    A row is rounded from the terms that it has; a first term of the centre tap is no digit, and
    stays. Nodes without an entry in `keep` stay.

    Raises:
        ModelError: a term that the plan speaks of is not there, or not in the form that it says.
    """
    reader = TermReader(model)
    done: set[int] = set()  # last digits, which stay as they are: weights may be shared
    for entry in plan.quantized:
        if entry.series != "digit" or entry.terms <= keep.get(entry.name, entry.terms):
            continue
        first = int(entry.centre)
        stored, rows = reader.integers(entry)[first:], reader.rows(entry)[first:]
        if id(stored[-1].tensor) in done:
            continue
        done.add(id(stored[-1].tensor))
        digits, kept = [term.read() for term in stored], keep[entry.name] - first
        if all(some is None for some in rows):
            rounded = round_digits(digits, entry.bits, kept)
        else:
            cells = _cells(entry, *reader.reading(entry))
            places = [term.places(cells, some) for term, some in zip(stored, rows, strict=True)]
            rounded = _by_row(entry, digits, places, cells, kept)
        _replace(stored, rounded)


def _replace(stored: Sequence[StoredIntegers], rounded: Sequence[Array]) -> None:
    for term, digits in zip(stored, rounded, strict=False):
        made = term.write(digits)
        for node in consumers(term.tensor):
            replace_input(node, term.tensor, made)


def _by_row(
    entry: NodePlan, digits: Sequence[Array], places: Sequence[Array], cells: Array, keep: int
) -> tuple[Array, ...]:
    """The same of terms that cover some rows, each row from as many digits as it has.

    places: of each term's integers in one that covers all rows; cells: [out, in], those of a row.
    """
    whole = [np.zeros(cells.size, np.int8) for _ in digits]
    terms = np.zeros(cells.size, np.int8)
    for full, q, at in zip(whole, digits, places, strict=True):
        full[at] = q.reshape(-1)[: at.size]
        terms[at] += 1
    for n in np.unique(terms[terms > keep]):
        at = np.flatnonzero(terms == n)
        rounded = round_digits([full[at] for full in whole[:n]], entry.bits, keep)
        for full, q in zip(whole, rounded, strict=False):
            full[at] = q
    found = []
    for full, q, at in list(zip(whole, digits, places, strict=True))[:keep]:
        flat = q.reshape(-1).copy()
        flat[: at.size] = full[at]
        found.append(flat.reshape(q.shape))
    return tuple(found)


def _cells(entry: NodePlan, node: gs.Node, slot: int) -> Array:
    """Where the integers of a row are in a term that covers all, int64 [out, in].

    Rows with blocks are padded to whole ones. The weight is read by this node and input.
    """
    split, outer = _split(entry, node, slot)
    count, out = math.prod(split), math.prod(split[axis] for axis in outer)
    if entry.block_size is not None:
        padded = padded_row(entry, count // out)
        return np.arange(out * padded).reshape(out, padded)
    order = (*outer, *(axis for axis in range(len(split)) if axis not in outer))
    turned: Array = np.arange(count).reshape(split).transpose(order)
    return turned.reshape(out, -1)


def _split(entry: NodePlan, node: gs.Node, slot: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`split` and `out_axes` of the weight, as weights.py has them."""
    shape = entry.shape
    if entry.op_type in RECURRENT:
        return shape, (0, 1)
    if entry.op_type == "ConvTranspose":
        groups = int(node.attrs.get("group", 1))
        return (groups, shape[0] // groups, *shape[1:]), (0, 2)
    if entry.op_type == "MatMul":
        inner = len(shape) - (2 if slot == 1 else 1)
        return shape, tuple(axis for axis in range(len(shape)) if axis != inner)
    return shape, (0,)
