"""Integer Conv with terms of some channels: one node that has them as further output channels.

Measured (benchmarks/point_forms.py, 5 to 30 % of the channels): a second node of all channels
doubles the time of a convolution; one of these channels whose output is scattered adds 10 to 45 %,
since the input is unfolded twice; further outputs of the same node, gathered to their places, add
0 to 30 %. The sum of the inputs that an offset is multiplied with is one more such output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxq.passes.site import Site
from onnxq.passes.stored_terms import ADDED_TERM
from onnxq.passes.whole_terms import spread_rows

Array = npt.NDArray[Any]

# Up to this share of further outputs the stacked form is the faster one.
LARGEST_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Stack:
    """What a Conv computes besides the weight of one product.

    Its outputs lie group after group, in each the channels of the product and then `extra` more:
    the rows of `terms`, all zeros for channels that do not have them, all ones for the offset.

    Attributes:
        site: the node.
        terms: indices of terms that cover some rows only.
        offset: whether the sums of the inputs are wanted.
    """

    site: Site
    terms: tuple[int, ...]
    offset: bool
    slots: dict[int, Array] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return int(self.site.node.attrs.get("group", 1))

    @property
    def out(self) -> int:
        """Channels of the node."""
        return self.site.stored.weight.out

    @property
    def extra(self) -> int:
        """Further outputs of each group."""
        return self._rows() + bool(self.terms) + self.offset

    @property
    def pays(self) -> bool:
        """Whether it is faster than a node of its own for each term."""
        return self.extra * self.groups <= max(LARGEST_SHARE * self.out, self.groups + 1)

    def weight(self, carrier: Any, to: int, zero_point: int) -> Any:
        """The integer weight `carrier` with the further rows."""
        site, builder = self.site, self.site.builder
        base = f"{site.name}/stacked"
        inner = site.stored.weight.shape[1:]
        shape = (self.groups * self.extra, *inner)
        kind = np.int8 if to == TensorProto.INT8 else np.uint8
        rows = spread_rows(builder, carrier, np.empty(0, int), shape, base, fill=kind(zero_point))
        for i in self.terms:
            part = site.stored.integer_rows(builder, i, to, zero_point)
            mark = {ADDED_TERM: str(i)}  # what `truncate` takes out
            rows = _scattered(site, rows, part, self._places(i), f"{base}/term{i}", metadata=mark)
        if self.offset:
            target = builder.constant(
                f"{base}/ones/shape", np.array((self.groups, *inner), np.int64)
            )
            one = builder.scalar(kind(zero_point + 1))
            ones = builder.add("Expand", f"{base}/ones", [one, target])
            rows = _scattered(site, rows, ones, self._last(), f"{base}/with_ones")
        if self.groups == 1:
            return builder.add("Concat", f"{base}/weight", [carrier, rows], attrs={"axis": 0})
        by_group = [
            _reshaped(site, tensor, (self.groups, -1, *inner), f"{base}/{what}")
            for tensor, what in ((carrier, "channels"), (rows, "rows"))
        ]
        joined = builder.add("Concat", f"{base}/joined", by_group, attrs={"axis": 1})
        return _reshaped(site, joined, (-1, *inner), f"{base}/weight")

    def scales(self, carrier: int) -> Array:
        """One scale per output, float32, 1 for the further outputs that have none."""
        series = self.site.stored.series
        rows = np.ones(self.groups * self.extra, np.float32)
        for i in self.terms:
            term = series.terms[i]
            rows[self._places(i)] = np.asarray(term.scale)[term.rows]
        own = np.broadcast_to(np.asarray(series.terms[carrier].scale, np.float32), (self.out,))
        both = [part.reshape(self.groups, -1) for part in (own, rows)]
        return np.ascontiguousarray(np.concatenate(both, axis=1).reshape(-1))

    def unstack(self, outputs: Any) -> list[Any]:
        """What is to be added up, from the rescaled outputs: all with `out` channels."""
        site, builder = self.site, self.site.builder
        base = f"{site.name}/stacked"
        each = self.out // self.groups
        first = np.arange(self.out) // each * (each + self.extra) + np.arange(self.out) % each
        found = [self._gathered(outputs, first, f"{base}/channels")]
        for i in self.terms:
            index = np.full(self.out, self._output(self._rows()), np.int64)  # zeros
            rows = site.stored.series.terms[i].rows
            index[rows] = self._output(self._places(i))
            found.append(self._gathered(outputs, index, f"{base}/term{i}/channels"))
        if self.offset:
            index = self._output(self._last())
            index = index if self.groups == 1 else np.repeat(index, each)
            sums = self._gathered(outputs, index, f"{base}/sums")
            shape = (self.out, *(1 for _ in site.stored.weight.shape[2:]))
            offset = site.stored.channel_offset(builder, shape)
            found.append(builder.add("Mul", f"{site.name}/offset", [sums, offset]))
        return found

    def _rows(self) -> int:
        """The most rows of terms that a group has."""
        return max((self._count(group) for group in range(self.groups)), default=0)

    def _count(self, group: int) -> int:
        return sum(int((self._group_of(i) == group).sum()) for i in self.terms)

    def _group_of(self, i: int) -> Array:
        rows = self.site.stored.series.terms[i].rows
        return np.asarray(rows) // (self.out // self.groups)

    def _places(self, i: int) -> Array:
        """Where the rows of term i lie among the further rows of all groups."""
        if not self.slots:
            used = np.zeros(self.groups, np.int64)
            for term in self.terms:
                places = []
                for group in self._group_of(term):
                    places.append(group * self.extra + used[group])
                    used[group] += 1
                self.slots[term] = np.array(places, np.int64)
        return self.slots[i]

    def _last(self) -> Array:
        """The places of the sums, one in each group."""
        return np.arange(self.groups) * self.extra + self.extra - 1

    def _output(self, places: Array | int) -> Array:
        """The output channels of further rows."""
        each = self.out // self.groups
        group, within = np.divmod(np.asarray(places, np.int64), self.extra)
        return np.asarray(group * (each + self.extra) + each + within)

    def _gathered(self, outputs: Any, index: Array, name: str) -> Any:
        builder = self.site.builder
        if np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            ends = [
                builder.constant(f"{name}/{what}", np.array([end], np.int64))
                for what, end in (("from", index[0]), ("to", index[-1] + 1), ("axis", 1))
            ]
            return builder.add("Slice", name, [outputs, *ends])
        places = builder.constant(f"{name}/index", index.astype(np.int32))
        return builder.add("Gather", name, [outputs, places], attrs={"axis": 1})


def _scattered(
    site: Site,
    whole: Any,
    part: Any,
    places: Array,
    base: str,
    *,
    metadata: dict[str, str] | None = None,
) -> Any:
    index = site.builder.constant(f"{base}/places", places[:, np.newaxis].astype(np.int64))
    return site.builder.add("ScatterND", base, [whole, index, part], metadata=metadata)


def _reshaped(site: Site, tensor: Any, shape: Sequence[int], name: str) -> Any:
    target = site.builder.constant(f"{name}/shape", np.array(shape, np.int64))
    return site.builder.add("Reshape", name, [tensor, target])
