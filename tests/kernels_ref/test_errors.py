import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels_ref import (
    cosine,
    mae,
    max_abs_error,
    relative_error,
    sqnr_db,
    top1_agreement,
)

MEASURES = (cosine, mae, max_abs_error, relative_error, sqnr_db, top1_agreement)
REFERENCE = np.array([[3.0, 4.0], [0.0, 0.0]])
ACTUAL = np.array([[3.0, 4.5], [0.0, 0.0]])


def test_values_worked_out_by_hand():
    assert mae(REFERENCE, ACTUAL) == 0.125
    assert max_abs_error(REFERENCE, ACTUAL) == 0.5
    assert relative_error(REFERENCE, ACTUAL) == pytest.approx(0.1, rel=1e-14)
    assert sqnr_db(REFERENCE, ACTUAL) == pytest.approx(20, rel=1e-14)
    assert cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(0.5**0.5, rel=1e-14)
    assert cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])) == -1
    assert cosine(np.array([1.0, 0.0]), np.array([0.0, 3.0])) == 0


def test_identical_inputs():
    for x in (REFERENCE, np.zeros(4)):
        assert sqnr_db(x, x) == np.inf
        assert mae(x, x) == max_abs_error(x, x) == relative_error(x, x) == 0
        assert cosine(x, x) == pytest.approx(1, abs=1e-15)
        assert top1_agreement(x, x) == 1


def test_a_zero_reference_or_actual():
    zero, one = np.zeros(3), np.ones(3)
    assert sqnr_db(zero, one) == -np.inf
    assert relative_error(zero, one) == np.inf
    assert relative_error(one, zero) == 1
    assert sqnr_db(one, zero) == 0
    assert cosine(zero, one) == cosine(one, zero) == 0


def test_top1_agreement_counts_positions_along_the_axis():
    a = np.array([[1, 2, 0], [5, 4, 4], [0, 0, 1], [3, 3, 1]])
    b = np.array([[0, 9, 1], [4, 5, 4], [0, 0, 1], [4, 3, 1]])
    assert top1_agreement(a, b) == 0.75  # a tie counts as its first place
    assert top1_agreement(a, b, axis=0) == pytest.approx(2 / 3)
    assert top1_agreement(np.array([1, 2]), np.array([2, 1])) == 0
    with pytest.raises(ValueError, match="axis is 2, but the tensors have 2 axes"):
        top1_agreement(a, b, axis=2)


def test_half_precision_and_integers_are_summed_in_float64():
    reference = np.full(100_000, 200, np.float16)
    actual = reference + np.float16(0.125)
    assert mae(reference, actual) == 0.125
    assert relative_error(reference, actual) == pytest.approx(0.125 / 200, rel=1e-12)
    assert max_abs_error(np.array([255], np.uint8), np.array([0], np.uint8)) == 255


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_squares_neither_overflow_nor_underflow(size):
    r, a = np.array([3.0, 4.0]) * size, np.array([3.0, 4.5]) * size
    assert relative_error(r, a) == pytest.approx(0.1, rel=1e-12)
    assert sqnr_db(r, a) == pytest.approx(20, rel=1e-12)
    assert cosine(r, 2 * r / 3) == pytest.approx(1, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, (2, 12), elements=st.floats(-100, 100)))
def test_measures_agree_with_each_other(pair):
    r, a = pair
    assert mae(r, a) <= max_abs_error(r, a) * (1 + 1e-15)
    assert -1 <= cosine(r, a) <= 1
    relative = relative_error(r, a)
    if 0 < relative < np.inf:
        assert sqnr_db(r, a) == pytest.approx(-20 * np.log10(relative), abs=1e-9)
    noise, signal = np.linalg.norm(a - r), np.linalg.norm(r)
    if min(noise, signal) > 1e-100:  # below, its squares underflow
        assert relative == pytest.approx(noise / signal, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_output_never_looks_good(bad):
    broken = np.array([[3.0, bad], [0.0, 0.0]])
    assert not relative_error(REFERENCE, broken) < np.inf
    assert not mae(REFERENCE, broken) < np.inf
    assert not max_abs_error(REFERENCE, broken) < np.inf
    assert not sqnr_db(REFERENCE, broken) > -np.inf
    assert not cosine(REFERENCE, broken) > 0


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_that_differ_and_empty_tensors_are_refused(measure):
    with pytest.raises(ValueError, match=r"reference has shape \(2, 3\), actual \(3, 2\)"):
        measure(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="no elements to compare"):
        measure(np.ones((0, 3)), np.ones((0, 3)))
