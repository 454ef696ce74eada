"""The clip search under second-order rounding against rounding with each ratio by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxq.kernels_ref import (
    PerAxis,
    SeriesKind,
    restore,
    round_second_order,
    second_order,
    series_scales,
)
from onnxq.passes import rounded_clip
from onnxq.passes.rounded_clip import FINE, search_rounded_clip

Array = npt.NDArray[Any]

GROUPS, OUT, INPUTS, BITS = 3, 12, 20, 3


def _problem() -> tuple[Array, Array]:
    """A weight [out, in] and the second moments [groups, in, in] of inputs that are alike."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(GROUPS, 200, INPUTS))
    x[..., 1:] += 0.8 * x[..., :-1]
    return rng.standard_t(3, size=(OUT, INPUTS)), np.matmul(x.transpose(0, 2, 1), x)


def _scales(w: Array, kind: SeriesKind, terms: int) -> tuple[Array, ...]:
    return series_scales(kind, w, bits=BITS, terms=terms, granularity=PerAxis(0))


@pytest.mark.parametrize(("kind", "terms"), [("digit", 1), ("fixed_ratio", 2)])
def test_each_channel_has_its_best_ratio(kind: SeriesKind, terms: int) -> None:
    w, hessian = _problem()
    scales = _scales(w, kind, terms)
    found, offset = search_rounded_clip(w, scales, hessian, bits=BITS, kind=kind, damping=0.01)
    assert offset is None
    costs = []
    for ratio in FINE:
        trial = [scale * np.asarray(ratio, scale.dtype) for scale in scales]
        terms_ = round_second_order(w, trial, hessian, bits=BITS, kind=kind).terms
        series = restore(
            kind, terms_, trial, shape=w.shape, bits=BITS, granularity=PerAxis(0)
        ).dequantize()
        error = (w - series).reshape(GROUPS, -1, INPUTS)
        costs.append(np.einsum("gri,gij,grj->gr", error, hessian, error).reshape(-1))
    best = np.array(FINE)[np.argmin(costs, axis=0)]
    assert len(set(best)) > 1
    for mine, scale in zip(found, scales, strict=True):
        np.testing.assert_allclose(mine / scale, best, rtol=1e-6)


@pytest.mark.parametrize("with_offset", [False, True])
def test_few_ratios_at_once_find_the_same(
    monkeypatch: pytest.MonkeyPatch, with_offset: bool
) -> None:
    w, hessian = _problem()
    scales = _scales(w, "digit", 2)
    points = np.arange(OUT) % 2 + 1
    decomposed = []
    factor_all = second_order.factor_all
    monkeypatch.setattr(
        second_order, "factor_all", lambda *args: decomposed.append(1) or factor_all(*args)
    )

    def search() -> tuple[Array, ...]:
        found, offset = search_rounded_clip(
            *(w, scales, hessian),
            bits=BITS,
            kind="digit",
            damping=0.01,
            with_offset=with_offset,
            points=points,
        )
        assert (offset is not None) == with_offset
        return (*found, *(() if offset is None else (offset,)))

    whole = search()
    monkeypatch.setattr(rounded_clip, "MOST_ELEMENTS", 4 * w.size)
    for one, other in zip(whole, search(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(decomposed) == 2  # once per search, however many calls round
