"""The integers and scales of weights, read back from a model that holds them as terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxq.errors import ModelError
from onnxq.kernels_ref import Series, restore
from onnxq.kernels_ref.fixed_ratio import scale_ratio
from onnxq.kernels_ref.half import next_scale
from onnxq.model import Model, get_metadata, graphs, is_constant, refilled, values
from onnxq.passes.edit import consumers
from onnxq.passes.packed_bits import is_packed, most_padding, pack_bits, read_bits
from onnxq.passes.stored_scales import POWER
from onnxq.passes.term_sums import NODE, TERM
from onnxq.passes.weights import RECURRENT, Weight
from onnxq.plan import NodePlan

Array = npt.NDArray[Any]

# As stored_terms.py names them; a number follows where the name was taken.
_STORED = re.compile(rf".*/term(\d+)/(q|rows|scale|scale/{POWER})(_\d+)?")
# As partial_products.py and stacked_terms.py name, after the node, where a term's outputs belong.
_COLUMNS = re.compile(r".*/term(\d+)(x\d+)?/places(_\d+)?")
_STACKED = re.compile(r".*/stacked/term(\d+)/channels/index(_\d+)?")
# The input that holds a weight of a recurrent node, by the end of the name in the plan.
_SLOTS = {"W": (1,), "R": (2,)}


class _Constant(NamedTuple):
    """A stored constant, and what the nodes that read it say of its form."""

    tensor: Any
    block: int | None  # of a DequantizeLinear with blocks


@dataclass(eq=False)
class TermReader:
    """Reads the terms of expanded nodes.

    Args:
        model: as `onnxq quantize`, `truncate` or `extend` wrote it; it is only read.
    """

    model: Model
    basis: dict[str, list[gs.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, graph in graphs(self.model):
            for node in graph.nodes:
                metadata = get_metadata(node)
                if TERM in metadata and NODE in metadata:
                    # a recurrent node holds two weights, and says so of one of them
                    name = node.name if node.op in RECURRENT else metadata[NODE]
                    self.basis.setdefault(name, []).append(node)

    def series(self, entry: NodePlan, weight: Weight) -> Series:
        """The series of one weight, terms as matrices int8 [out, in], scales float32.

        Args:
            entry: what the model says was done to the node.
            weight: the float weight; only its shape is looked at.

        Raises:
            ModelError: a term is not there, or not in the form that the plan says.
        """
        found = self._constants(entry, (weight.slot,))
        integers, scales = [], []
        for i in range(entry.terms):
            q = found.get((i, "q"))
            scale = _scale(entry, weight, i, found)
            if q is None or scale is None:
                raise _changed(entry, f"term {i} is not there")
            integers.append(_integers(entry, weight, q))
            scales.append(scale)
        try:
            return restore(
                entry.series,
                integers,
                scales,
                shape=(weight.out, weight.size // weight.out),
                bits=entry.bits,
                granularity=entry.matrix_granularity(),
            )
        except ValueError as error:
            raise _changed(entry, str(error)) from None

    def integers(self, entry: NodePlan) -> list[StoredIntegers]:
        """The stored integers of one weight's terms, in the order in which they are stored.

        Raises:
            ModelError: a term is not there.
        """
        found = self._constants(entry, _slots(entry))
        missing = [i for i in range(entry.terms) if (i, "q") not in found]
        if missing:
            raise _changed(entry, f"term {missing[0]} is not there")
        return [StoredIntegers(entry, found[i, "q"]) for i in range(entry.terms)]

    def has_scales(self, entry: NodePlan) -> bool:
        """Whether scales are stored by term; those of outputs that are stacked are not."""
        return any(what == "scale" for _, what in self._constants(entry, _slots(entry)))

    def rows(self, entry: NodePlan) -> list[Array | None]:
        """The output channels that each term covers, int [n]; None where it covers all."""
        found = self._constants(entry, _slots(entry))
        some = {
            i: values(each.tensor).reshape(-1)
            for (i, what), each in found.items()
            if what == "rows"
        }
        for node in self.basis.get(entry.name, []):
            some |= _spread_outputs(node)
        return [some.get(i) for i in range(entry.terms)]

    def reading(self, entry: NodePlan) -> tuple[gs.Node, int]:
        """A node that reads terms of the weight, and by which input.

        Raises:
            ModelError: there is none.
        """
        for node in self.basis.get(_node_name(entry), []):
            for slot in _slots(entry):
                if slot < len(node.inputs) and _before(node.inputs[slot]):
                    return node, slot
        raise _changed(entry, "no node reads its weight")

    def _constants(
        self, entry: NodePlan, slots: tuple[int, ...]
    ) -> dict[tuple[int, str], _Constant]:
        """By term and kind; of the first of these inputs that are computed from constants."""
        found: dict[tuple[int, str], _Constant] = {}
        for node in self.basis.get(_node_name(entry), []):
            behind = (_before(node.inputs[slot]) for slot in slots if slot < len(node.inputs))
            for constant in (*next(filter(None, behind), ()), *_rescaling(node)):
                match = _STORED.fullmatch(constant.tensor.name)
                if match:
                    found[int(match[1]), match[2]] = constant
        return found


@dataclass(frozen=True, eq=False)
class StoredIntegers:
    """The integers of a term as they lie in the file."""

    entry: NodePlan
    constant: _Constant

    @property
    def tensor(self) -> Any:
        """The constant that holds them."""
        return self.constant.tensor

    @property
    def _offset(self) -> int:
        """What is added to them where they are stored unsigned."""
        unsigned = self._packed or values(self.tensor).dtype == np.uint8
        return 1 << (self.entry.bits - 1) if unsigned else 0

    @cached_property
    def _packed(self) -> bool:
        return is_packed(self.tensor)

    def read(self) -> Array:
        """The integers, int8, of any shape; packed ones flat, with a few more than there are."""
        array = values(self.tensor)
        if self._packed:
            array = read_bits(array, self.entry.bits)
        return (array.astype(np.int16) - self._offset).astype(np.int8)

    def places(self, cells: Array, rows: Array | None) -> Array:
        """Where they are in a term that covers all rows, int64 [n], in the order of `read`.

        Args:
            cells: as `round_terms.py has them.
            rows: as `TermReader.rows` does.

        Raises:
            ModelError: there are not as many as the rows have.
        """
        if rows is None:
            places = np.sort(cells, axis=None)
        else:
            if rows.size and rows.max() >= len(cells):
                raise _changed(self.entry, f"{self.tensor.name!r} is of other rows")
            places = cells[rows].reshape(-1)
        _check_count(self.entry, self.tensor, self.read().size, places.size)
        return places

    def write(self, integers: Array) -> Any:
        """A constant of the same name and form that holds others."""
        array = integers.astype(np.int16) + self._offset
        if self._packed:  # what fills the last bytes up may have become anything
            array = pack_bits(array.clip(0, (1 << self.entry.bits) - 1), self.entry.bits)
        return refilled(self.tensor, array)


def _node_name(entry: NodePlan) -> str:
    return entry.name.rpartition("/")[0] if entry.op_type in RECURRENT else entry.name


def _slots(entry: NodePlan) -> tuple[int, ...]:
    """The inputs that may hold the weight, by operator."""
    if entry.op_type in RECURRENT:
        return _SLOTS[entry.name.rpartition("/")[2]]
    return (0,) if entry.op_type == "Gather" else (1, 0)


def _before(tensor: Any) -> list[_Constant]:
    """The constants from which a tensor is computed; none if anything else has a part in it."""
    waiting, seen, constants, nodes = [tensor], set(), [], []
    while waiting:
        now = waiting.pop()
        if is_constant(now):
            constants.append(now)
        elif not now.inputs or NODE in get_metadata(now.inputs[0]):
            return []
        for node in now.inputs:
            if id(node) not in seen:
                seen.add(id(node))
                nodes.append(node)
                waiting += node.inputs
    blocks = [node.attrs["block_size"] for node in nodes if "block_size" in node.attrs]
    return [_Constant(c, int(blocks[0]) if blocks else None) for c in constants]


def _rescaling(node: gs.Node) -> Iterator[_Constant]:
    """The constants by which the integer output of a basis node is multiplied."""
    if not node.op.endswith("Integer"):
        return
    waiting = [node.outputs[0]]
    while waiting:
        tensor = waiting.pop()
        for reader in consumers(tensor):
            if NODE in get_metadata(reader):
                continue
            waiting += reader.outputs if reader.op == "Cast" else []
            for other in reader.inputs:
                if other is not tensor and other.inputs and other.inputs[0].op == "Mul":
                    factors = other.inputs[0].inputs
                    yield from (_Constant(t, None) for t in factors if is_constant(t))


def _spread_outputs(node: gs.Node) -> dict[int, Array]:
    """The channels to which outputs of a node are brought that computes some of a term alone."""
    found: dict[int, Array] = {}
    waiting = list(node.outputs)
    while waiting:
        for reader in consumers(waiting.pop()):
            if NODE in get_metadata(reader):
                continue
            if reader.op in ("Cast", "Mul", "DequantizeLinear"):
                waiting += reader.outputs
            elif reader.op == "Gather":
                index = reader.inputs[1]
                if match := _STACKED.fullmatch(index.name):
                    found[int(match[1])] = _stacked_rows(values(index))
            elif reader.op == "MatMul":
                for tensor in (t for spread in reader.inputs[1].inputs for t in spread.inputs):
                    if match := _COLUMNS.fullmatch(tensor.name):
                        found[int(match[1])] = values(tensor)
    return found


def _stacked_rows(index: Array) -> Array:
    """The channels that do not read the output of zeros, the last of its group, as most do."""
    outputs, counts = np.unique(index, return_counts=True)
    return np.flatnonzero(index != outputs[counts == counts.max()][-1])


def _integers(entry: NodePlan, weight: Weight, stored: _Constant) -> Array:
    """The stored integers of one term as a matrix [out, in]; undoes what stored_terms.py does."""
    inputs = weight.size // weight.out
    block = None if entry.form == "nbits" or not entry.block_size else min(entry.block_size, inputs)
    padded = inputs if block is None else padded_row(entry, inputs)
    count = weight.out * padded
    q = StoredIntegers(entry, stored).read().reshape(-1)
    _check_count(entry, stored.tensor, q.size, count)
    q = q[:count]
    if block is not None:
        return np.ascontiguousarray(q.reshape(weight.out, padded)[:, :inputs])
    turned = q.reshape(weight.split).transpose(weight.order)
    return np.ascontiguousarray(turned.reshape(weight.out, inputs))


def padded_row(entry: NodePlan, inputs: int) -> int:
    """Integers of a row that is padded up to whole blocks; of one shorter than a block, none."""
    block = min(entry.block_size or 1, inputs)
    return -(-inputs // block) * block


def _check_count(entry: NodePlan, tensor: Any, found: int, wanted: int) -> None:
    if not 0 <= found - wanted <= most_padding(entry.bits):
        raise _changed(entry, f"{tensor.name!r} has {found} integers")


def _scale(
    entry: NodePlan, weight: Weight, i: int, found: dict[tuple[int, str], _Constant]
) -> Array | None:
    """The scale of term i, which may have to be made from the one that is stored for all.

    That is the last for digits that are merged as integers, and the first for blocks.
    """
    stored = found.get((i, "scale"))
    if stored is not None:
        power = found.get((i, f"scale/{POWER}"))
        return _shaped(entry, weight, stored, 1 if power is None else values(power.tensor))
    others = sorted(term for term, what in found if what == "scale")
    if entry.series == "joint" or not others:
        return None
    if entry.series == "fixed_ratio":
        before = _scale(entry, weight, i - 1, found) if i > others[0] else None
        return None if before is None else next_scale(before, scale_ratio(entry.bits))
    other = _scale(entry, weight, others[-1], found)
    return None if other is None else np.ldexp(other, entry.bits * (others[-1] - i))


def _shaped(entry: NodePlan, weight: Weight, stored: _Constant, power: Array | int) -> Array:
    """A stored scale in the shape of the plan: (), [out] or [out, blocks]."""
    scale = values(stored.tensor).astype(np.float32) * np.float32(power)
    if stored.block is not None:  # [blocks of the kernel, out]
        scale = scale.T
        if entry.block_size is not None and scale.shape[1] > 1:
            scale = scale[:, :: entry.block_size // stored.block]
    if entry.granularity == "per_block":
        return np.ascontiguousarray(scale.reshape(weight.out, -1))
    per_channel = np.ascontiguousarray(scale.reshape(weight.out, -1)[:, 0])
    return per_channel[0] if entry.granularity == "per_tensor" else per_channel


def _changed(entry: NodePlan, what: str) -> ModelError:
    return ModelError(
        f"node {entry.name!r} is not as the plan in the file says ({what}): the file was changed "
        "since onnxq wrote it; quantize the float model again"
    )
