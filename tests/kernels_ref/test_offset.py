"""The offset term: a constant per row, and digits that need not lie around 0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import PerAxis, expand
from onnxq.kernels_ref.offset import offset_range, offset_scales, realize_offset

SETTINGS = settings(deadline=None, max_examples=60)


def rows(seed: int, kind: str, out: int = 6, inputs: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.laplace(size=(out, inputs)) if kind == "laplace" else rng.standard_normal((out, inputs))
    if kind == "one-sided":
        w = np.abs(w) + 1
    return np.ascontiguousarray(w, np.float32)


def approximation(w: np.ndarray, bits: int, terms: int) -> np.ndarray:
    beta, scales = offset_scales(w, bits=bits, terms=terms)
    integers = realize_offset(w, beta, scales, bits)
    total = np.repeat(beta.astype(np.float64)[:, None], w.shape[1], axis=1)
    for scale, q in zip(scales, integers, strict=True):
        total += scale.astype(np.float64)[:, None] * q
    return total


@SETTINGS
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["gauss", "laplace", "one-sided"]),
    bits=st.integers(2, 5),
    terms=st.integers(1, 3),
)
def test_never_worse_than_without(seed, kind, bits, terms):
    w = rows(seed, kind)
    exact = w.astype(np.float64)
    plain = expand("digit", w, bits=bits, terms=terms, granularity=PerAxis(0)).dequantize()
    error = np.linalg.norm(approximation(w, bits, terms) - exact, axis=1)
    before = np.linalg.norm(plain - exact, axis=1)
    # both are compared as float32 arithmetic gives them: a few roundings of each element
    rounding = 8 * 2.0**-24 * np.linalg.norm(exact, axis=1)
    assert (error <= before + 2 * rounding).all()


@SETTINGS
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 5), terms=st.integers(1, 3))
def test_a_shift_of_the_weights_costs_nothing(seed, bits, terms):
    """One-sided rows are as good as rows around 0: the search sees them from their middle."""
    w = rows(seed, "gauss")
    near = np.square(approximation(w, bits, terms) - w).sum()
    far = np.square(approximation(w + np.float32(8), bits, terms) - (w + np.float32(8))).sum()
    rounding = w.size * (16 * 2.0**-24) ** 2 * 4
    # not the same starts: the one without an offset is of no use far from 0
    assert far <= 1.3 * near + rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("terms", [1, 2])
def test_integers_are_in_range(bits, terms):
    w = rows(0, "laplace")
    beta, scales = offset_scales(w, bits=bits, terms=terms)
    for q in realize_offset(w, beta, scales, bits):
        assert q.dtype == np.int8
        assert q.min() >= -(1 << (bits - 1))
        assert q.max() < 1 << (bits - 1)


def test_two_bits_have_four_levels():
    w = np.tile(np.array([1.0, 2.0, 3.0, 4.0], np.float32), (1, 4))
    np.testing.assert_allclose(approximation(w, 2, 1), w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.5, -1e-30, 1e30])
def test_a_row_of_one_value_is_exact(value):
    w = np.full((2, 9), value, np.float32)
    np.testing.assert_array_equal(approximation(w, 2, 1).astype(np.float32), w)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_magnitudes(scale):
    w = rows(1, "gauss")
    error = np.abs(approximation(w * np.float32(scale), 4, 1) / scale - w)
    assert error.max() <= np.ptp(w, axis=1).max() / 15


def test_range():
    assert offset_range(4, 1) == (-8, 7)
    assert offset_range(2, 2) == (-8, 5)  # digits -2..1: 1·4 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": np.zeros((2, 2, 2), np.float32)}, r"\[out, in\]"),
        ({"w": np.full((2, 2), np.nan, np.float32)}, "NaN"),
        ({"bits": 8, "terms": 4}, "24 bits"),
        ({"bits": 1}, "bits"),
    ],
)
def test_refuses(arguments, message):
    given_arguments = {"w": np.ones((2, 2), np.float32), "bits": 4, "terms": 1, **arguments}
    w = given_arguments.pop("w")
    with pytest.raises(ValueError, match=message):
        offset_scales(w, **given_arguments)


def test_scales_that_do_not_fit():
    w = rows(0, "gauss")
    beta, scales = offset_scales(w, bits=4, terms=2)
    with pytest.raises(ValueError, match="each needs"):
        realize_offset(w, beta[:3], scales, 4)
    with pytest.raises(ValueError, match="not 16 times"):
        realize_offset(w, beta, (scales[0], scales[0]), 4)
