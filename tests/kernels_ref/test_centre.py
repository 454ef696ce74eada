import numpy as np
import pytest

from onnxq.kernels_ref import conv, split_centre


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (7, 3)])
def test_the_parts_make_up_the_kernel_exactly(dtype, kernel):
    w = np.random.default_rng(0).standard_normal((4, 3, *kernel)).astype(dtype)
    centre, rest = split_centre(w)
    assert centre.shape == (4, 3, 1, 1)
    assert centre.dtype == rest.dtype == dtype
    y, x = kernel[0] // 2, kernel[1] // 2
    assert not rest[:, :, y, x].any()
    whole = rest.copy()
    whole[:, :, y, x] = centre[:, :, 0, 0]
    np.testing.assert_array_equal(whole, w)


def test_the_parts_convolve_to_the_same_output():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((2, 3, 6, 7)), rng.standard_normal((4, 3, 3, 3))
    centre, rest = split_centre(w)
    both = conv(x, centre) + conv(x, rest, pads=[1, 1, 1, 1])
    # Sums of 27 products in another order.
    tolerance = 27 * np.finfo(np.float64).eps * np.abs(x).max() * np.abs(w).sum()
    np.testing.assert_allclose(both, conv(x, w, pads=[1, 1, 1, 1]), atol=tolerance)


def test_does_not_touch_its_argument():
    w = np.ones((1, 1, 3, 3))
    split_centre(w)[0][:] = 7
    assert (w == 1).all()


@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (2, 2, 3, 4), (2, 2, 1, 1), (2, 2, 3), (2, 2)])
def test_refuses_kernels_without_a_centre_to_split_off(shape):
    with pytest.raises(ValueError, match="odd kh and kw"):
        split_centre(np.ones(shape))
