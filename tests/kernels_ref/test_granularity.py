import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import PerAxis, PerBlock, PerTensor, reduce_absmax, scale_shape, spread
from onnxq.kernels_ref.granularity import reduce_range
from onnxq.kernels_ref.layout import (
    as_row_params,
    as_rows,
    from_row_params,
    from_rows,
    tiles,
)

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def shape_and_granularity(draw):
    shape = draw(SHAPES)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    block = draw(st.integers(1, 9))
    return shape, draw(st.sampled_from([PerTensor(), PerAxis(axis), PerBlock(axis, block)]))


def slow_index(index, granularity):
    """The index into the scale of the element at `index`, from the definition."""
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerAxis):
        return (index[granularity.axis],)
    scaled = list(index)
    scaled[granularity.axis] //= granularity.block_size
    return tuple(scaled)


def test_scale_shapes_are_those_of_onnx():
    assert scale_shape((4, 7), PerTensor()) == ()
    assert scale_shape((4, 7), PerAxis(-1)) == (7,)
    assert scale_shape((4, 7, 2), PerBlock(1, 3)) == (4, 3, 2)
    assert scale_shape((4, 7), PerBlock(1, 100)) == (4, 1)


@settings(deadline=None, max_examples=100)
@given(shape_and_granularity())
def test_spread_and_reduce_absmax_equal_the_definition(case):
    shape, granularity = case
    x = np.random.default_rng(0).standard_normal(shape)
    absmax = reduce_absmax(x, granularity)
    expected = np.zeros(scale_shape(shape, granularity))
    for index in np.ndindex(shape):
        at = slow_index(index, granularity)
        expected[at] = max(expected[at], abs(x[index]))
    np.testing.assert_array_equal(absmax, expected)
    wide = np.broadcast_to(spread(absmax, shape, granularity), shape)
    for index in np.ndindex(shape):
        assert wide[index] == absmax[slow_index(index, granularity)]


@settings(deadline=None, max_examples=100)
@given(shape_and_granularity())
def test_rows_and_row_params_go_there_and_back(case):
    shape, granularity = case
    x = np.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)
    rows = as_rows(x, granularity)
    np.testing.assert_array_equal(from_rows(rows, shape, granularity), x)
    param = np.arange(np.prod(scale_shape(shape, granularity)), dtype=float)
    param = param.reshape(scale_shape(shape, granularity))
    flat = as_row_params(param, granularity)
    np.testing.assert_array_equal(from_row_params(flat, shape, granularity), param)
    # Each row holds exactly the elements that share its scale, and zeros for padding.
    for row, value in zip(rows, flat, strict=True):
        mask = np.broadcast_to(spread(param, shape, granularity), shape) == value
        assert sorted(row[row != 0]) == sorted(x[mask])


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((3, 40_000)),
        np.zeros((500, 300)),
        np.zeros((3000, 30)),
        np.zeros((300, 500)).T,
        np.zeros((2, 40_000)).T,
        np.zeros((1, 5)),
    ],
    ids=["long", "middle", "short", "columns", "tall", "one"],
)
def test_tiles_cover_every_element_once_and_load_store_agree(matrix):
    source = matrix.copy(order="K")
    source[:] = np.random.default_rng(0).integers(-100, 100, size=matrix.shape)
    per_row = np.arange(float(len(matrix)))
    seen = np.zeros(matrix.shape, dtype=int)
    back = np.full(matrix.shape, 111, dtype=np.int8)
    for tile in tiles(source):
        seen[tile.rows, tile.cols] += 1
        values = tile.load(source)
        assert not np.shares_memory(values, source)
        wide = np.broadcast_to(tile.params(per_row), values.shape)
        here = wide.T if tile.transposed else wide
        np.testing.assert_array_equal(here[:, 0], per_row[tile.rows])
        tile.store(values, back)
    assert (seen == 1).all()
    np.testing.assert_array_equal(back, source)


def test_range_always_includes_zero():
    x = np.array([[1.0, 3.0], [-2.0, -5.0]], dtype=np.float32)
    rmin, rmax = reduce_range(x, PerAxis(0))
    np.testing.assert_array_equal(rmin, [0, -5])
    np.testing.assert_array_equal(rmax, [3, 0])
    assert rmin.dtype == np.float32


def test_a_missing_axis_is_refused():
    with pytest.raises(ValueError, match=r"axis is 2, but the tensor has 2 axes"):
        scale_shape((3, 4), PerAxis(2))
    with pytest.raises(ValueError, match="axis is -3"):
        scale_shape((3, 4), PerBlock(-3, 2))


def test_an_empty_block_is_refused():
    with pytest.raises(ValueError, match="block_size is 0"):
        PerBlock(0, 0)


def test_a_param_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"param has shape \(4,\).*needs \(3,\)"):
        spread(np.ones(4), (3, 4), PerAxis(0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = np.ones((2, 2))
    x[1, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        reduce_absmax(x, PerAxis(0))


def test_other_dtypes_and_empty_tensors_are_refused():
    with pytest.raises(ValueError, match="x is int64; cast"):
        reduce_absmax(np.ones(3, dtype=np.int64), PerTensor())
    with pytest.raises(ValueError, match="no elements"):
        reduce_absmax(np.ones((0, 3)), PerAxis(1))
