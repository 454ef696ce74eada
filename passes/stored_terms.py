"""How the integer tensor of a term is stored in the file, and brought to the type that computes.

Everything from the stored constant to the returned tensor depends on constants alone, so
onnxruntime computes it once, when it loads the model under default session options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxq.kernels_ref import Series, Term
from onnxq.passes.edit import Builder
from onnxq.passes.packed_bits import pack_bits, unpack_bits
from onnxq.passes.stored_scales import StoredScales
from onnxq.passes.weights import Weight
from onnxq.passes.whole_terms import spread_centre, spread_rows
from onnxq.plan import NodePlan, Packing

Array = npt.NDArray[Any]

PACKED_BITS = 4
_NIBBLES = TensorProto.INT4, TensorProto.UINT4
_BYTES = TensorProto.INT8, TensorProto.UINT8
# Metadata of an Add that merges a term into the ones before it: the term's index.
ADDED_TERM = "onnxq.added_term"


# What the nodes that unpack bits take in the file beyond a Cast, about.
PACKING_BYTES = 800


def stored_bits(entry: NodePlan, count: int) -> int:
    """Bits that one value of a term takes in the file, of so many values."""
    if entry.form == "nbits":
        return _plain(entry.bits)
    return _width(entry.bits, count, entry.packing)


def _plain(bits: int) -> int:
    """Bits of the narrowest of ONNX's own types that holds them."""
    return PACKED_BITS if bits <= PACKED_BITS else 8


def _width(bits: int, count: int, packing: Packing) -> int:
    """The type that holds the bits, or, where that saves more than its nodes take, they alone."""
    if not count:
        return 8
    if packing == "uint8" and bits <= PACKED_BITS:
        return bits
    plain = _plain(bits)
    return bits if (plain - bits) * count > 8 * PACKING_BYTES else plain


@dataclass(eq=False)
class StoredTerms:
    """The constants of one weight's terms; several nodes that share the weight share them."""

    weight: Weight
    plan: NodePlan
    series: Series
    constants: dict[str, Any] = field(default_factory=dict)
    derived: dict[tuple[int, str], Any] = field(default_factory=dict)

    @property
    def _block(self) -> int | None:
        """Values per stored block: a block longer than a row is not padded up to its size."""
        size = self.plan.block_size
        return None if size is None else min(size, int(self.series.terms[0].q.shape[1]))

    def float_weight(self, builder: Builder, indices: tuple[int, ...]) -> Any:
        """The float weight Σ scale·q over the named terms, in the weight's own shape.

        Cast → Mul (→ Reshape) is the form that onnxruntime folds for Conv; DequantizeLinear would
        run again at every inference.
        """
        key = (id(builder.graph), f"float {indices}")
        if key not in self.derived:
            self.derived[key] = self._float_weight(builder, indices)
        return self.derived[key]

    def _float_weight(self, builder: Builder, indices: tuple[int, ...]) -> Any:
        parts = [self._float_term(builder, i) for i in indices]
        total = parts[0]
        for i, part in zip(indices[1:], parts[1:], strict=True):
            total = builder.add(
                "Add", f"{self._base(i)}/merged", [total, part], metadata={ADDED_TERM: str(i)}
            )
        if self.series.offset is not None and 0 in indices:
            # Last: the rounding of the sum is that of Series.dequantize.
            offset = self.channel_offset(builder, self.weight.channel_shape())
            name = f"{self.weight.tensor.name}/channel_offset/added"
            total = builder.add("Add", name, [total, offset])
        return self._in_shape(builder, total)

    def _float_term(self, builder: Builder, i: int) -> Any:
        base = self._base(i)
        as_float = self._loaded(builder, i, partial(self._stored_q, i), TensorProto.FLOAT)
        scale = self._scales.as_float(builder, i)
        part = builder.add("Mul", f"{base}/dequantized", [as_float, scale])
        return self._whole(builder, i, part, np.float32(0))

    def _whole(self, builder: Builder, i: int, part: Any, fill: np.generic) -> Any:
        """A term that covers a part of the weight, with `fill` elsewhere; a whole one as it is."""
        term, weight, base = self.series.terms[i], self.weight, self._base(i)
        if term.columns is not None:
            return spread_centre(builder, part, weight.shape[2:], base, fill=fill)
        if term.rows is None:
            return part
        inner = self._row_shape()
        whole = spread_rows(builder, part, term.rows, (weight.out, *inner), base, fill=fill)
        if self._block is not None or weight.out_axes == (0,):
            return whole
        return self._from_matrix(builder, whole, base)

    def _row_shape(self) -> tuple[int, ...]:
        """The shape in which a row is stored where a term does not cover all of them."""
        if self._block is not None:
            return (-(-self.series.terms[0].q.shape[1] // self._block), self._block)
        return tuple(self.weight.split[axis] for axis in self.weight.in_axes)

    def _from_matrix(self, builder: Builder, tensor: Any, base: str) -> Any:
        """[out, in] in the shape of `split`."""
        weight = self.weight
        dims = tuple(weight.split[axis] for axis in weight.order)
        tensor = self._reshape(builder, tensor, dims, f"{base}/channels_first")
        back = [int(axis) for axis in np.argsort(weight.order)]
        if back == sorted(back):
            return tensor
        return builder.add("Transpose", f"{base}/turned", [tensor], attrs={"perm": back})

    def _in_shape(self, builder: Builder, tensor: Any) -> Any:
        """From the order in which the terms are stored to the shape that the node reads."""
        weight, base = self.weight, self.weight.tensor.name
        if self._block is not None:
            tensor = self._from_matrix(builder, self._unblock(builder, tensor, self._block), base)
        if weight.split == weight.shape:
            return tensor
        return self._reshape(builder, tensor, weight.shape, f"{base}/reshaped")

    def _unblock(self, builder: Builder, blocked: Any, block_size: int) -> Any:
        """[out, blocks, block_size] to [out, in], without the padding of the last block."""
        base = self.weight.tensor.name
        out, inputs = self.series.terms[0].q.shape
        padded = -(-inputs // block_size) * block_size
        if padded == inputs:
            return blocked
        whole = self._reshape(builder, blocked, (out, padded), f"{base}/padded")
        ends = {"slice_start": 0, "slice_end": inputs, "slice_axis": 1}
        named = [
            self._constant(f"{base}/{what}", builder, partial(np.array, [end], np.int64))
            for what, end in ends.items()
        ]
        return builder.add("Slice", f"{base}/unpadded", [whole, *named])

    def _reshape(self, builder: Builder, tensor: Any, shape: tuple[int, ...], name: str) -> Any:
        target = self._constant(f"{name}/shape", builder, lambda: np.array(shape, np.int64))
        return builder.add("Reshape", name, [tensor, target])

    def integer_weight(
        self, builder: Builder, indices: tuple[int, ...], *, signed: bool, zero_point: int
    ) -> Any:
        """The int8 or uint8 weight Σ 2^(X·j)·q over the named terms, plus `zero_point`.

        One index gives the term itself; several give a digit series summed as one integer.
        """
        to = TensorProto.INT8 if signed else TensorProto.UINT8
        key = (id(builder.graph), f"{to} {indices}")
        if key not in self.derived:
            if len(indices) == 1:
                made = self._one_integer(builder, indices[0], to, zero_point)
            else:
                made = self._summed_digits(builder, indices, to, zero_point)
            self.derived[key] = made
        return self.derived[key]

    def _summed_digits(
        self, builder: Builder, indices: tuple[int, ...], to: int, zero_point: int
    ) -> Any:
        base = self.weight.tensor.name
        total = None
        for i in indices:
            part = self._loaded(builder, i, partial(self._plain_q, i), TensorProto.INT32)
            part = self._whole(builder, i, part, np.int32(0))
            if total is not None:
                part = builder.add(
                    "Add", f"{self._base(i)}/added", [total, part], metadata={ADDED_TERM: str(i)}
                )
            if i != indices[-1]:
                radix = self._constant(
                    f"{base}/radix", builder, lambda: np.array(2**self.plan.bits, np.int32)
                )
                part = builder.add("Mul", f"{self._base(i)}/shifted", [part, radix])
            total = part
        if zero_point:
            offset = self._constant(
                f"{base}/offset", builder, lambda: np.array(zero_point, np.int32)
            )
            total = builder.add("Add", f"{base}/positive", [total, offset])
        return builder.add("Cast", f"{base}/integer", [total], attrs={"to": to})

    def _one_integer(self, builder: Builder, i: int, to: int, zero_point: int) -> Any:
        fill = helper.tensor_dtype_to_np_dtype(to).type(zero_point)
        return self._whole(builder, i, self.integer_rows(builder, i, to, zero_point), fill)

    def integer_rows(self, builder: Builder, i: int, to: int, zero_point: int) -> Any:
        """The part that term i covers, plus `zero_point`, as elements of type `to`.

        The rows alone, [rows, inputs, …], or the centre taps alone, [out, in, 1, …]; a term that
        covers all has the shape of `split`.
        """

        def make() -> Array:
            return np.asarray(self._plain_q(i).astype(np.int16) + zero_point)

        return self._loaded(builder, i, make, to, unsigned=to == TensorProto.UINT8)

    def _loaded(
        self,
        builder: Builder,
        i: int,
        make: Callable[[], Array],
        to: int,
        *,
        unsigned: bool = False,
    ) -> Any:
        """The stored integers of a term, as the element type `to` once the model is loaded."""
        base, bits, values = self._base(i), self.series.terms[i].bits, make()
        width = _width(bits, values.size, self.plan.packing)
        plain = {8: _BYTES}
        if self.plan.packing == "int4":
            plain[PACKED_BITS] = _NIBBLES
        if width not in plain:
            offset = 0 if unsigned else 1 << (bits - 1)
            packed = self._constant(
                f"{base}/q", builder, lambda: pack_bits(values.astype(np.int16) + offset, bits)
            )
            return unpack_bits(builder, packed, values.shape, base, bits=bits, offset=offset, to=to)
        kind = plain[width][unsigned]
        q = self._constant(f"{base}/q", builder, lambda: values, kind)
        return q if to == kind else builder.add("Cast", f"{base}/cast", [q], attrs={"to": to})

    def channel_scale(
        self, builder: Builder, i: int, shape: tuple[int, ...], *, part: bool = False
    ) -> Any:
        """The term's scale per output channel, in `shape`; with `part` of its rows alone."""
        term, name = self.series.terms[i], f"{self._base(i)}/scale"
        scale = np.asarray(term.scale, np.float32)
        full = np.broadcast_to(scale, (self.weight.out,))
        if part and term.rows is not None:
            return self._constant(f"{name}/rows", builder, partial(full[term.rows].reshape, shape))
        return self._constant(name, builder, partial(full.reshape, shape))

    def channel_offset(self, builder: Builder, shape: tuple[int, ...]) -> Any:
        """The offset per output channel, in `shape`; only where the series has one."""
        name = f"{self.weight.tensor.name}/channel_offset"
        offset = np.asarray(self.series.offset, np.float32)
        return self._constant(name, builder, partial(offset.reshape, shape))

    def _base(self, i: int) -> str:
        return f"{self.weight.tensor.name}/term{i}"

    def _constant(
        self,
        name: str,
        builder: Builder,
        make: Callable[[], Array],
        data_type: int | None = None,
    ) -> Any:
        if name not in self.constants:
            self.constants[name] = builder.constant(name, make(), data_type)
        return self.constants[name]

    def _plain_q(self, i: int) -> Array:
        """The integers of the part that term i covers, as the node reads them but for blocks."""
        term, weight = self.series.terms[i], self.weight
        if term.columns is not None:
            taps = [1] * len(weight.shape[2:])
            return term.q[:, term.columns].reshape(*weight.shape[:2], *taps)
        if term.rows is not None:
            return term.q[term.rows].reshape(len(term.rows), *self._row_shape())
        return weight.from_matrix(term.q)

    def _stored_q(self, i: int) -> Array:
        term = self.series.terms[i]
        if self._block is None:
            return self._plain_q(i)
        q = term.q if term.rows is None else term.q[term.rows]
        blocks = -(-q.shape[1] // self._block)
        padded = np.zeros((len(q), blocks * self._block), np.int8)
        padded[:, : q.shape[1]] = q
        return padded.reshape(len(q), blocks, self._block)

    @cached_property
    def _scales(self) -> StoredScales:
        terms = self.series.terms
        names = tuple(f"{self._base(i)}/scale" for i in range(len(terms)))
        return StoredScales(self.plan, tuple(map(self._stored_scale, terms)), names)

    def _stored_scale(self, term: Term) -> Array:
        scale = np.asarray(term.scale, np.float32)
        if term.rows is not None:
            scale = scale[term.rows]
        if self._block is not None:
            return scale[:, :, None]
        if term.rows is not None:
            return scale.reshape(-1, *(1 for _ in self._row_shape()))
        return np.broadcast_to(scale, (self.weight.out,)).reshape(self.weight.channel_shape())
