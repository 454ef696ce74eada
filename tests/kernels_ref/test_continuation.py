"""A series with further terms: the old ones stay, the residual falls as the bound says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels_ref import PerAxis, PerBlock, PerTensor, Series, expand, half_range, restore
from onnxq.kernels_ref.continuation import continue_series

# float32 rounding of residuals: a few units in the last place of absmax
ULPS = 4 * 2.0**-23


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((6, 33)).astype(np.float32)


def first(series: Series, terms: int) -> Series:
    return Series(series.terms[:terms], series.kind)


def assert_begins_with(longer: Series, series: Series) -> None:
    for old, new in zip(series.terms, longer.terms, strict=False):
        np.testing.assert_array_equal(new.q, old.q)
        np.testing.assert_array_equal(new.scale, old.scale)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerBlock(1, 10)])
@pytest.mark.parametrize("kind", ["fixed_ratio", "digit"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_beginning_of_a_series_gives_the_series_back(kind, bits, granularity):
    whole = expand(kind, weight(), bits=bits, terms=3, granularity=granularity)
    for terms in (1, 2):
        longer = continue_series(first(whole, terms), weight(), 3)
        assert longer.kind == kind
        assert_begins_with(longer, whole)
        assert len(longer) == 3


@given(
    kind=st.sampled_from(["fixed_ratio", "digit", "joint"]),
    bits=st.integers(3, 8),
    counts=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    shift=st.floats(0.3, 3),
    seed=st.integers(0, 5),
)
def test_any_series_is_kept_and_its_residual_falls(kind, bits, counts, shift, seed):
    """Scales may have been chosen otherwise, as planning on samples does: here, times `shift`."""
    known, more = counts
    w, granularity = weight(seed), PerAxis(0)
    made = expand(kind, w, bits=bits, terms=known, granularity=granularity)
    series = restore(
        "joint" if kind == "digit" else kind,
        [term.q for term in made.terms],
        [term.scale * np.float32(shift) for term in made.terms],
        shape=w.shape,
        bits=bits,
        granularity=granularity,
    )
    longer = continue_series(series, w, known + more)
    assert_begins_with(longer, series)
    if longer.kind == "fixed_ratio":  # it goes on as it began
        bound = longer.terms[-1].scale / 2
    else:
        left = np.abs(series.residual(w)).max(axis=1)
        bound = left / (2 * half_range(bits) * (2**bits - 2) ** (more - 1))
    assert (np.abs(longer.residual(w)).max(axis=1) <= bound + ULPS * np.abs(w).max(axis=1)).all()


def test_zero_channels():
    w = weight()
    w[2] = 0
    series = expand("fixed_ratio", w, bits=4, terms=1, granularity=PerAxis(0))
    assert not continue_series(series, w, 3).residual(w)[2].any()


def test_as_many_terms_is_the_series_itself():
    series = expand("joint", weight(), bits=4, terms=2, granularity=PerAxis(0))
    assert continue_series(series, weight(), 2) is series


def test_fewer_terms_are_refused():
    series = expand("joint", weight(), bits=4, terms=2, granularity=PerAxis(0))
    with pytest.raises(ValueError, match="terms is 1, but the series has 2"):
        continue_series(series, weight(), 1)


def test_another_shape_is_refused():
    series = expand("joint", weight(), bits=4, terms=2, granularity=PerAxis(0))
    with pytest.raises(ValueError, match="shape"):
        continue_series(series, weight()[:, 1:], 3)
