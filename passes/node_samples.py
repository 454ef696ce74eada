"""What planning sees of one node: its inputs, float and quantized, and the outputs they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref import InputMoments, Series
from onnxq.passes.node_rows import NodeRows

Array = npt.NDArray[Any]

HELD_OUT_EVERY = 4
# Rows that the moments are summed over, in all; more of the same images tell nothing new.
MOST_ROWS = 65536
# Rows that outputs are computed of, to judge and to fit the affine.
JUDGED_ROWS = 4096
# Elements of one array of rows.
MOST_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Numbers:
    """What is planned for one node: a series [out, in], and float64 [out] added to its output."""

    series: Series
    bias: Array

    @property
    def scales(self) -> tuple[Array, ...]:
        """Float32, one array per term."""
        return tuple(np.asarray(term.scale) for term in self.series.terms)

    @property
    def integers(self) -> tuple[Array, ...]:
        """int8 [out, in], one array per term."""
        return tuple(np.asarray(term.q) for term in self.series.terms)

    def affine(self, gamma: Array, beta: Array | float) -> Numbers:
        """With outputs γ times as large, plus β; γ > 0 and β are [out] or one number."""
        tiny = np.finfo(np.float32).tiny
        terms = tuple(
            replace(term, scale=np.maximum((term.scale.T * gamma).T.astype(np.float32), tiny))
            for term in self.series.terms
        )
        offset = self.series.offset
        if offset is not None:
            offset = np.asarray(offset * gamma, np.float32)
        series = replace(self.series, terms=terms, offset=offset)
        return Numbers(series, gamma * self.bias + beta)


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows of the quantized prefix, [groups, n, inputs], and the outputs wanted there, [n, out]."""

    x_hat: Array
    wanted: Array

    def some(self, rows: slice) -> Judged:
        """With the outputs of some channels only; all of one group."""
        return replace(self, wanted=self.wanted[:, rows])

    def outputs(self, numbers: Numbers) -> Array:
        """What the node makes of the rows, float32 [n, out], without its own bias."""
        return products(numbers.series.dequantize(), self.x_hat) + numbers.bias.astype(np.float32)

    def error(self, numbers: Numbers) -> float:
        """Mean absolute error of the output."""
        return self.off(numbers.series.dequantize(), numbers.bias)

    def off(self, matrix: Array, bias: Array) -> float:
        """Mean absolute error of the output of a matrix [out, in] and a bias [out]."""
        found = products(matrix, self.x_hat) + bias.astype(np.float32)
        return float(np.abs(found - self.wanted).mean())


def products(matrix: Array, rows: Array) -> Array:
    """[n, out] of a matrix [out, in] and rows [groups, n, in]."""
    split = matrix.astype(np.float32, copy=False).reshape(len(rows), -1, matrix.shape[1])
    found = np.matmul(rows, split.transpose(0, 2, 1))
    return np.ascontiguousarray(found.transpose(1, 0, 2)).reshape(rows.shape[1], -1)


class NodeSamples:
    """The inputs of one node over all samples, float and as the quantized prefix gives them.

    Every fourth sample is held out to judge what was fitted on the others; then it is taken in too.

    Args:
        rows: how the node reads its input.
        exact, quantized: the input per sample, in both variants; the same objects where nothing
            quantized lies before the node.
        seed: of the positions that are drawn.
        added: what is added to the output, per sample and in both variants: the node aims at the
            float model's sum. Left out where it is not of the output's shape.
        most_rows: that the moments are summed over, in all.

    Attributes:
        moments: of the samples that are not held out, or of all.
        fit, held: some rows of either part; the same where there are too few samples to hold out.

    Raises ValueError where the inputs do not fit the weight, or are not finite.
    """

    def __init__(
        self,
        rows: NodeRows,
        exact: Sequence[Array],
        quantized: Sequence[Array],
        seed: int,
        added: tuple[Sequence[Array], Sequence[Array]] | None = None,
        *,
        most_rows: int = MOST_ROWS,
    ) -> None:
        self.rows, self._exact, self._quantized, self._seed = rows, exact, quantized, seed
        self.matrix, self._most_rows = rows.weight.matrix(), most_rows
        self.moments = InputMoments(rows.groups, rows.inputs)
        self._added = added if added is not None and self._fits(added[0]) else None
        out = len(self.matrix)
        self._extra, self._missing = np.zeros((out, rows.inputs)), np.zeros(out)
        count = len(exact)
        self._held = range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY)
        self.fit = self._take([i for i in range(count) if i not in self._held], add=True)
        self.held = self._take(self._held, add=False) if self._held else self.fit

    @property
    def judges(self) -> bool:
        """Whether there are samples that the fit has not seen."""
        return self.held is not self.fit

    @property
    def exact_prefix(self) -> bool:
        """Whether nothing quantized lies before the node."""
        return all(x is y for x, y in zip(self._exact, self._quantized, strict=True))

    def take_in_held_out(self) -> None:
        """Add the held-out samples to the moments."""
        if self._held:
            self._take(self._held, add=True)
            self._held = range(0)

    def extra(self) -> tuple[Array, Array] | None:
        """What is wanted beside the float model's products, d, of the samples in `moments`.

        (Σ d x̂ᵀ [out, in], mean d [out]), float64; None where there is nothing else.
        """
        if self._added is None:
            return None
        return self._extra, self._missing / max(self.moments.count, 1)

    def _fits(self, added: Sequence[Array]) -> bool:
        try:
            shapes = [self.rows.output_shape(x.shape) for x in self._exact]
        except ValueError:
            return False
        return shapes == [array.shape for array in added]

    def _take(self, samples: Sequence[int], *, add: bool) -> Judged:
        limit, judged = self._per_sample(self._most_rows), self._per_sample(JUDGED_ROWS)
        found = [self._one(i, limit, judged, add=add) for i in samples]
        return Judged(
            np.concatenate([part.x_hat for part in found], axis=1),
            np.concatenate([part.wanted for part in found]),
        )

    def _one(self, sample: int, limit: int, judged: int, *, add: bool) -> Judged:
        """Some rows of one sample; all of them are taken in if wanted."""
        same = self._quantized[sample] is self._exact[sample]
        x = self._read(self._exact[sample], limit, sample)
        x_hat = x if same else self._read(self._quantized[sample], limit, sample)
        missing = self._missing_rows(sample, limit)
        if not all(np.isfinite(rows).all() for rows in (x, x_hat, missing)):
            raise ValueError("its inputs are not finite")
        if add:
            self.moments.add(x_hat, x)
        if add and missing.ndim == 2:
            split = missing.T.reshape(self.rows.groups, -1, len(missing))
            self._extra += np.matmul(split, x_hat).reshape(self._extra.shape)
            self._missing += missing.sum(axis=0, dtype=np.float64)
        some = np.linspace(0, x.shape[1] - 1, min(judged, x.shape[1])).astype(int)
        kept = x[:, some]
        kept_hat = kept if same else x_hat[:, some]
        more = missing[some] if missing.ndim == 2 else missing
        return Judged(kept_hat, products(self.matrix, kept) + more)

    def _missing_rows(self, sample: int, limit: int) -> Array:
        """Float less quantized of what is added, [n, out], or one zero."""
        if self._added is None:
            return np.zeros(1, np.float32)
        shape = self._exact[sample].shape
        exact, quantized = (
            self.rows.read_output(part[sample], shape, limit, self._rng(sample))
            for part in self._added
        )
        with np.errstate(invalid="ignore"):  # what is not finite is refused by the caller
            return exact - quantized

    def _per_sample(self, rows: int) -> int:
        """How many of so many rows in all come from one sample, of what memory allows."""
        widest = self.rows.groups * self.rows.inputs
        if self._added is not None:
            widest = max(widest, len(self.matrix))
        return max(1, min(rows, MOST_ELEMENTS // widest) // len(self._exact))

    def _read(self, x: Array, limit: int, sample: int) -> Array:
        return self.rows.read(x, limit, self._rng(sample))

    def _rng(self, sample: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, sample))
