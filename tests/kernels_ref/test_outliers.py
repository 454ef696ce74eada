"""Outlier columns: the split is exact, and columns are chosen where they shrink the range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels_ref.activation_series import activation_series
from onnxq.kernels_ref.outliers import (
    check_columns,
    choose_columns,
    column_ranges,
    furthest_columns,
    range_left,
    split_columns,
)


def _ranges(width: int, **far: float) -> tuple[np.ndarray, np.ndarray]:
    """Columns -1 … 1, but for those named c<index>, which reach to the value given."""
    rmin, rmax = -np.ones(width), np.ones(width)
    for name, value in far.items():
        (rmax if value > 0 else rmin)[int(name[1:])] = value
    return rmin, rmax


@given(st.integers(2, 40), st.data())
def test_others_and_few_make_up_the_whole(width, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    count = data.draw(st.integers(0, width - 1))
    columns = np.sort(rng.permutation(width)[:count])
    x = rng.standard_normal((2, 3, width)).astype(np.float32)
    others, few = split_columns(x, columns)
    assert few.shape == (2, 3, count)
    others[..., columns] = few
    np.testing.assert_array_equal(others, x, strict=True)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**20))
def test_columns_taken_out_add_nothing_to_the_integer_product(bits, signed, seed):
    """0 meets the zero point exactly in every affine quantization, and in the terms after it."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((4, 12)) + 3).astype(np.float32)
    columns = np.array([1, 7])
    others, _ = split_columns(x, columns)
    for term in activation_series(others, bits, 3, signed=signed):
        assert (term.q[:, columns] == term.zero_point).all()


def test_ranges_hold_zero():
    rmin, rmax = column_ranges(np.array([[1.0, -2.0, 3.0], [2.0, -1.0, -3.0]]))
    assert rmin.tolist() == [0, -2, -3]
    assert rmax.tolist() == [2, 0, 3]
    assert column_ranges(np.zeros((0, 2)))[1].tolist() == [0, 0]


def test_furthest_on_either_side():
    rmin, rmax = _ranges(6, c4=9.0, c1=-20.0, c2=5.0)
    assert furthest_columns(rmin, rmax, 2).tolist() == [1, 4]
    assert furthest_columns(rmin, rmax, 3).tolist() == [1, 2, 4]


def test_range_left():
    rmin, rmax = _ranges(6, c4=9.0, c1=-3.0)
    assert range_left(rmin, rmax, np.array([4])) == pytest.approx(4 / 12)
    assert range_left(rmin, rmax, np.array([1, 4])) == pytest.approx(2 / 12)
    assert range_left(rmin, rmax, np.array([], np.int64)) == 1
    assert range_left(np.zeros(3), np.zeros(3), np.array([1])) == 1


class TestChoice:
    def test_as_few_as_it_takes(self):
        assert choose_columns(*_ranges(256, c7=30.0)).tolist() == [7]
        assert choose_columns(*_ranges(256, c7=30.0, c9=-30.0)).tolist() == [7, 9]
        three = choose_columns(*_ranges(256, c7=30.0, c9=-30.0, c200=8.0))
        assert {7, 9, 200} <= set(three.tolist())
        assert len(three) == 4  # counts double

    def test_none_where_the_range_hardly_shrinks(self):
        assert choose_columns(*_ranges(256)).size == 0
        assert choose_columns(*_ranges(256, c7=1.8)).size == 0  # 2 / 2.8 > 0.7
        assert choose_columns(*_ranges(256, c7=2.0)).tolist() == [7]  # 2 / 3
        assert choose_columns(np.zeros(256), np.zeros(256)).size == 0

    def test_at_most_a_sixteenth(self):
        far = {f"c{i}": 100.0 / (i + 1) ** 2 for i in range(8)}
        assert len(choose_columns(*_ranges(256, **far))) == 8
        assert len(choose_columns(*_ranges(64, **far))) == 4
        assert len(choose_columns(*_ranges(64, **far), most=2)) == 2
        assert choose_columns(*_ranges(15, c3=100.0)).size == 0

    @pytest.mark.parametrize(
        ("rmin", "rmax"),
        [
            (np.array([0.0, np.nan]), np.ones(2)),
            (np.zeros(2), np.array([1.0, np.inf])),
            (np.array([0.1, 0.0]), np.ones(2)),
            (np.zeros(2), np.array([-1.0, 1.0])),
            (np.zeros(2), np.ones(3)),
            (np.zeros((2, 2)), np.ones((2, 2))),
        ],
    )
    def test_odd_ranges(self, rmin, rmax):
        with pytest.raises(ValueError, match=r"rmin|rmax"):
            choose_columns(rmin, rmax)


@pytest.mark.parametrize("columns", [[-1], [4], [2, 1], [1, 1], [0, 1, 2, 3]])
def test_odd_columns(columns):
    with pytest.raises(ValueError, match="columns"):
        check_columns(np.array(columns), 4)
