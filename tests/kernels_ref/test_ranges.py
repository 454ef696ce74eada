import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.kernels_ref import PerTensor, RangeHistogram, activation_params, affine_params
from onnxq.kernels_ref import ranges as module


def filled(x, bins=2048, batches=1):
    histogram = RangeHistogram(bins)
    for part in np.array_split(x, batches):
        histogram.add(part)
    return histogram


def quantized(x, ends, bits=8):
    scale, zero_point = activation_params(*ends, bits=bits)
    level = np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1)
    return (level - zero_point) * scale


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "relu", "negative", "growing", "shifted", "constant", "huge"]),
    st.integers(1, 6),
    st.sampled_from([0.0, 50.0, 90.0, 99.0, 99.9, 100.0]),
    st.sampled_from([16, 101, 2048]),
)
def test_percentiles_are_right_within_a_bin(seed, shape, batches, p, bins):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(rng.integers(1, 500))
    change = {
        "normal": lambda v: v,
        "relu": lambda v: np.maximum(v, 0),
        "negative": lambda v: -np.abs(v),
        "growing": lambda v: v * np.geomspace(1e-6, 1e6, v.size),
        "shifted": lambda v: v + 1000,
        "constant": lambda v: np.full_like(v, 0.3),
        "huge": lambda v: v * 1e307,
    }
    x = change[shape](x)
    histogram = filled(x, bins, batches)
    assert histogram.count == x.size
    assert histogram.min_max() == (min(x.min(), 0.0), max(x.max(), 0.0))
    found = histogram.percentile(p)
    tail = (100 - p) / 2
    wanted = np.percentile(x, [tail, 100 - tail], method="inverted_cdf")
    # A rank on the edge of two samples may fall on either, by rounding: allow the neighbours.
    ordered, width = np.sort(x), histogram.bin_width
    for got, exact, ends in zip(found, wanted, [(-np.inf, 0), (0, np.inf)], strict=True):
        at = np.searchsorted(ordered, exact)
        near = ordered[[max(at - 1, 0), at, min(at + 1, x.size - 1)]]
        assert np.abs(np.clip(near, *ends) - got).min() <= width
    assert width <= 2 * max((x.max() - min(x.min(), 0)), 1e-300) / (bins - 2) or x.max() <= 0


def test_counts_are_those_of_a_histogram_made_at_once_however_the_range_grew():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(5000) * np.geomspace(1e-3, 1e3, 5000)
    histogram = filled(x, 64, batches=50)
    edges = (histogram._first + np.arange(65)) * histogram.bin_width
    np.testing.assert_array_equal(histogram._counts, np.histogram(x, edges)[0])
    assert np.flatnonzero(histogram._counts).size > 16


def test_memory_does_not_grow_with_the_samples():
    histogram = RangeHistogram(128)
    for exponent in range(-300, 300, 20):
        histogram.add(np.array([-(10.0**exponent), 10.0**exponent, 0.0]))
        assert histogram._counts.shape == (128,)
    assert histogram.count == 90
    arrays = [v for v in vars(histogram).values() if isinstance(v, np.ndarray | list)]
    assert len(arrays) == 1


def test_pieces_of_a_large_array_count_once(monkeypatch):
    x = np.random.default_rng(1).standard_normal((10, 33)).astype(np.float32)
    whole = filled(x)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 7)
    pieces = filled(x)
    assert pieces.count == whole.count == 330
    np.testing.assert_array_equal(pieces._counts, whole._counts)


def test_not_finite_values_are_counted_apart():
    histogram = RangeHistogram()
    histogram.add(np.array([1.0, np.inf, -np.inf, np.nan, -2.0], dtype=np.float32))
    assert histogram.not_finite == 3
    assert histogram.count == 2
    assert histogram.min_max() == (-2.0, 1.0)


METHODS = ["min_max", "entropy", "mse", "mae"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[], [0.0, 0.0], [3.0], [-3.0], [1e-320, 5e-324], [1e-30, 0.0]])
def test_every_range_is_finite_and_includes_zero(method, values):
    histogram = filled(np.array(values))
    rmin, rmax = getattr(histogram, method)()
    ends = histogram.min_max()
    assert ends[0] <= rmin <= 0 <= rmax <= ends[1]
    scale, zero_point = activation_params(rmin, rmax)
    assert scale > 0
    assert 0 <= zero_point <= 255


@pytest.mark.parametrize(("method", "power"), [("mse", 2), ("mae", 1)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sides", [1, 2])
def test_the_least_error_is_less_than_with_the_full_range(method, power, bits, sides):
    rng = np.random.default_rng(2)
    x = rng.standard_t(3, 50_000)
    x = np.maximum(x, 0) if sides == 1 else x
    histogram = filled(x, batches=7)
    ends = getattr(histogram, method)(2**bits - 1)
    full = histogram.min_max()
    errors = [(np.abs(quantized(x, e, bits) - x) ** power).mean() for e in (ends, full)]
    # Clipping is worth more the fewer levels there are.
    assert errors[0] < errors[1] * (0.8 if bits == 4 else 1.0)
    # No range on a grid of other factors is much better: what is left is the grid's own step.
    grid = np.linspace(0.02, 1, 25)
    others = [(full[0] * a, full[1] * b) for a in grid for b in grid]
    best = min((np.abs(quantized(x, e, bits) - x) ** power).mean() for e in others)
    assert errors[0] < 1.1 * best


@pytest.mark.parametrize("method", ["mse", "mae"])
@pytest.mark.parametrize("levels", [15, 255])
def test_a_uniform_range_is_hardly_clipped(method, levels):
    x = np.linspace(-1, 3, 40_001)
    rmin, rmax = getattr(filled(x), method)(levels)
    # With steps s = 4 / levels, cutting c costs (c - s/2)**3 / 12 (mse) or (c - s/2)**2 / 8 (mae),
    # and makes s**2 / 12 or s / 4 smaller: best at c < s. The zero point is rounded by s / 2, and
    # the ends are tried at 48 places.
    tolerance = 1.5 * 4 / levels + 3 / 48
    assert rmin == pytest.approx(-1, abs=tolerance)
    assert rmax == pytest.approx(3, abs=tolerance)


def test_zeros_do_not_decide_the_range():
    x = np.abs(np.random.default_rng(3).standard_t(3, 20_000))
    few, many = filled(x), filled(np.concatenate([x, np.zeros(1_000_000)]))
    for method in METHODS:
        assert getattr(few, method)() == getattr(many, method)()
    assert many.percentile(90) != few.percentile(90)  # these are shares of all values


def test_entropy_cuts_a_lonely_outlier_and_keeps_a_uniform_range():
    rng = np.random.default_rng(4)
    x = rng.standard_normal(100_000)
    rmin, rmax = filled(np.append(x, 100.0)).entropy()
    assert 2 < rmax < 50
    assert rmin == pytest.approx(x.min())
    uniform = rng.uniform(0, 1, 200_000)
    assert filled(uniform).entropy()[1] > 0.9


def test_activation_params_are_those_of_affine_params():
    for ends in [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-45, 0.0)]:
        for signed in (False, True):
            scale, zero_point = activation_params(*ends, signed=signed)
            expected = affine_params(np.float32(ends), 8, PerTensor(), signed=signed)
            assert isinstance(scale, np.float32)
            assert isinstance(zero_point, int)
            assert (scale, zero_point) == (expected[0], expected[1])
    scale, zero_point = activation_params(-1.0, 3.0)
    assert quantized(0.0, (-1.0, 3.0)) == 0.0
    assert (scale, zero_point) == (np.float32(4 / 255), 64)
    assert activation_params(0.0, 1.5, bits=4, signed=True) == (np.float32(0.1), -8)


def test_refuses_what_is_no_range():
    with pytest.raises(ValueError, match="rmin must not exceed"):
        activation_params(1.0, 0.0)
    with pytest.raises(ValueError, match="rmin is nan"):
        activation_params(np.nan, 0.0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        activation_params(0.0, np.inf)
    with pytest.raises(ValueError, match="bins is 1"):
        RangeHistogram(1)
    histogram = filled(np.arange(5.0))
    with pytest.raises(ValueError, match="p is 101"):
        histogram.percentile(101)
    for method in ("entropy", "mse", "mae"):
        with pytest.raises(ValueError, match="levels is 1"):
            getattr(histogram, method)(1)
