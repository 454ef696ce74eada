"""Series whose terms cover only a part of the weight matrix [out, in].

Three kinds of part, which can be combined: a row may have fewer terms than others (its points,
multipoint.py); the first term may hold the centre tap of a kernel alone (CFWS, centre.py); and a
row may have a constant, a term of all ones (offset.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import FloatArray, IntArray, check_term_count
from onnxq.kernels_ref.granularity import Granularity, PerAxis, PerBlock, scale_shape
from onnxq.kernels_ref.offset import offset_scales, realize_offset
from onnxq.kernels_ref.series import Series, SeriesKind, realize, restore, series_scales
from onnxq.kernels_ref.term import Term

Scales = tuple[FloatArray, ...]


@dataclass(frozen=True, eq=False)
class Coverage:
    """Which part of a weight matrix each term of a series covers; by default the whole.

    Attributes:
        points: int [out], the number of terms of each row, at least 1; term i covers the rows with
            more than i.
        centre: indices of the columns that term 0 is confined to. The terms behind it round what
            it leaves of the whole matrix: its own columns get the finer levels too.
        offset: whether each row has a constant.
    """

    points: IntArray | None = None
    centre: IntArray | None = None
    offset: bool = False

    @property
    def plain(self) -> bool:
        """Whether all terms cover the whole and there is no offset."""
        return self.points is None and self.centre is None and not self.offset

    def rows(self, i: int) -> npt.NDArray[np.intp] | None:
        """The rows of term i, None where it covers all."""
        if self.points is None or (self.points > i).all():
            return None
        return np.flatnonzero(self.points > i)

    def columns(self, i: int) -> IntArray | None:
        """The columns of term i, None where it covers all."""
        return self.centre if i == 0 else None

    def check(self, out: int, terms: int, granularity: Granularity) -> None:
        """Raise ValueError where it does not fit a series of `terms` terms for `out` rows."""
        points = self.points
        if points is not None:
            if not isinstance(granularity, PerAxis | PerBlock):
                raise ValueError("points need a scale per row, but there is one for all")
            if points.shape != (out,) or points.dtype.kind not in "iu":
                raise ValueError(
                    f"points are {points.dtype} of shape {points.shape}; give integers [{out}]"
                )
            if points.min() < 1 or points.max() > terms:
                raise ValueError(
                    f"points are {points.min()} to {points.max()}; a row has 1 to {terms} terms"
                )
        if self.offset and granularity != PerAxis(0):
            raise ValueError("an offset needs one scale per row")
        if self.offset and self.centre is not None:
            raise ValueError("an offset and a term of the centre cannot be combined")

    def groups(self, terms: int) -> list[tuple[npt.NDArray[np.intp] | slice, int]]:
        """Rows with the same number of terms, and that number."""
        if self.points is None:
            return [(slice(None), terms)]
        return [(np.flatnonzero(self.points == p), int(p)) for p in np.unique(self.points)]


WHOLE = Coverage()


def partial_scales(
    kind: SeriesKind,
    w: FloatArray,
    coverage: Coverage,
    *,
    bits: int,
    terms: int,
    granularity: Granularity,
) -> tuple[FloatArray | None, Scales]:
    """(offset [out] or None, one scale array per term) for w [out, in].

    Each row's scales are those of a series with as many terms as it has points; those of terms
    that it does not have go on by the factor 2**-bits. Raises ValueError as `series_scales`, and
    for a coverage that does not fit.
    """
    check_term_count(terms)
    coverage.check(len(w), terms, granularity)
    if coverage.points is None:
        return _scales(kind, w, coverage, bits=bits, terms=terms, granularity=granularity)
    made = tuple(np.empty(scale_shape(w.shape, granularity), w.dtype) for _ in range(terms))
    offset = np.empty(len(w), w.dtype) if coverage.offset else None
    for rows, points in coverage.groups(terms):
        beta, scales = _scales(
            kind, w[rows], coverage, bits=bits, terms=points, granularity=granularity
        )
        for i, whole in enumerate(made):
            whole[rows] = scales[i] if i < points else _finer(made[i - 1][rows], bits)
        if offset is not None:
            offset[rows] = beta
    return offset, made


def realize_partial(
    kind: SeriesKind,
    w: FloatArray,
    scales: Sequence[FloatArray],
    coverage: Coverage,
    offset: FloatArray | None = None,
    *,
    bits: int,
    granularity: Granularity,
) -> Series:
    """Round w [out, in] to a series with the given scales (and offset [out]).

    Raises ValueError as `realize`, and for a coverage or an offset that does not fit.
    """
    coverage.check(len(w), len(scales), granularity)
    _check_offset(offset, coverage, len(w))
    if coverage.plain:
        return realize(kind, w, scales, bits=bits, granularity=granularity)
    integers = [np.zeros(w.shape, np.int8) for _ in scales]
    for rows, points in coverage.groups(len(scales)):
        here = [np.asarray(scale)[rows] if scale.ndim else scale for scale in scales[:points]]
        beta = None if offset is None else offset[rows]
        found = _integers(kind, w[rows], here, coverage, beta, bits=bits, granularity=granularity)
        for q, part in zip(integers, found, strict=False):  # rows may have fewer terms
            q[rows] = part
    own = [np.asarray(scale, dtype=w.dtype) for scale in scales]
    whole = restore(kind, integers, own, shape=w.shape, bits=bits, granularity=granularity)
    return _marked(whole, coverage, None if offset is None else np.asarray(offset, w.dtype))


def restore_partial(
    kind: SeriesKind,
    integers: Sequence[IntArray],
    scales: Sequence[FloatArray],
    coverage: Coverage,
    offset: FloatArray | None = None,
    *,
    shape: tuple[int, ...],
    bits: int,
    granularity: Granularity,
) -> Series:
    """The series of integers that were rounded before; they must be 0 outside their term's part.

    Raises ValueError as `restore`, and for a coverage or an offset that does not fit.
    """
    whole = restore(kind, integers, scales, shape=shape, bits=bits, granularity=granularity)
    coverage.check(shape[0], len(scales), granularity)
    _check_offset(offset, coverage, shape[0])
    for i, term in enumerate(whole.terms):
        inside = term.q[_part(coverage, i, shape)]
        if np.count_nonzero(inside) != np.count_nonzero(term.q):
            raise ValueError(f"term {i} has integers outside of the part that it covers")
    return _marked(whole, coverage, offset)


def _part(coverage: Coverage, i: int, shape: tuple[int, ...]) -> tuple[IntArray, ...]:
    rows, columns = coverage.rows(i), coverage.columns(i)
    return np.ix_(
        np.arange(shape[0]) if rows is None else rows,
        np.arange(shape[1]) if columns is None else columns,
    )


def _marked(series: Series, coverage: Coverage, offset: FloatArray | None) -> Series:
    terms: list[Term] = [
        replace(term, rows=coverage.rows(i), columns=coverage.columns(i))
        for i, term in enumerate(series.terms)
    ]
    return Series(tuple(terms), series.kind, offset)


def _check_offset(offset: FloatArray | None, coverage: Coverage, out: int) -> None:
    if (offset is not None) != coverage.offset:
        raise ValueError("an offset belongs to a coverage with offset, and only to it")
    if offset is not None and (offset.shape != (out,) or not np.isfinite(offset).all()):
        raise ValueError(f"the offset has shape {offset.shape}; give finite numbers [{out}]")


def _scales(
    kind: SeriesKind,
    w: FloatArray,
    coverage: Coverage,
    *,
    bits: int,
    terms: int,
    granularity: Granularity,
) -> tuple[FloatArray | None, Scales]:
    """As `partial_scales`, for rows that have all terms."""
    if coverage.offset:
        if terms > 1 and kind != "digit":
            raise ValueError(f"several terms with an offset are digits; the series is {kind}")
        return offset_scales(w, bits=bits, terms=terms)
    if coverage.centre is None:
        return None, series_scales(kind, w, bits=bits, terms=terms, granularity=granularity)
    centre = _only(w, coverage.centre)
    first = series_scales(kind, centre, bits=bits, terms=1, granularity=granularity)
    if terms == 1:
        return None, first
    coarse = realize(kind, centre, first, bits=bits, granularity=granularity)
    rest = w - coarse.dequantize()
    more = series_scales(kind, rest, bits=bits, terms=terms - 1, granularity=granularity)
    return None, (*first, *more)


def _integers(
    kind: SeriesKind,
    w: FloatArray,
    scales: Sequence[FloatArray],
    coverage: Coverage,
    offset: FloatArray | None,
    *,
    bits: int,
    granularity: Granularity,
) -> list[IntArray]:
    """The integers of rows that have all terms."""
    if offset is not None:
        own = [np.asarray(scale, w.dtype) for scale in scales]
        return list(realize_offset(w, np.asarray(offset, w.dtype), own, bits))
    if coverage.centre is None:
        plain = realize(kind, w, scales, bits=bits, granularity=granularity)
        return [term.q for term in plain.terms]
    centre = _only(w, coverage.centre)
    coarse = realize(kind, centre, scales[:1], bits=bits, granularity=granularity)
    integers = [coarse.terms[0].q]
    if len(scales) > 1:
        rest = realize(
            kind, w - coarse.dequantize(), scales[1:], bits=bits, granularity=granularity
        )
        integers += [term.q for term in rest.terms]
    return integers


def _only(w: FloatArray, columns: IntArray) -> FloatArray:
    """A copy of w with zeros in all other columns."""
    kept = np.zeros_like(w)
    kept[:, columns] = w[:, columns]
    return kept


def _finer(scale: FloatArray, bits: int) -> FloatArray:
    finer = np.ldexp(scale, -bits).astype(scale.dtype)
    return np.asarray(np.maximum(finer, np.finfo(scale.dtype).tiny))
