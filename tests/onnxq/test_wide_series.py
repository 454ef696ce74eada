"""Series of more bits than float32 tells apart: no offset is searched for them."""

import numpy as np
import pytest
from small import feeds, model, run, weights

import onnxq


@pytest.mark.parametrize(("bits", "terms"), [(8, 3), (8, 4), (7, 4), (6, 5), (5, 8)])
def test_they_are_as_right_as_float32(bits, terms):
    proto = model(
        "g (float[1,3,8,8] x) => (float[1,4,8,8] y) "
        "{ [conv] y = Conv <pads = [1, 1, 1, 1]> (x, w) }",
        {"w": weights(4, 3, 3, 3)},
    )
    made = onnxq.quantize(proto, weight_bits=bits, terms=terms, target="cpu-avx2")
    assert made.plan["conv"].offset == (bits * terms <= 24)
    feed = feeds(proto)
    want, got = run(proto, feed)[0], run(made.model, feed)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
