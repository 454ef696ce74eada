"""A Relu is left to saturation only where nothing sees what comes before it."""

import numpy as np
import onnx
import pytest
from calibrating import static
from small import feeds, model, ops, run, weights

CONSTANTS = {"w": weights(4, 3, 3, 3), "v": weights(4, 4, 3, 3, seed=1)}


def net(tail: str, outputs: str) -> onnx.ModelProto:
    return model(
        f"""g (float[1,3,8,8] x) => (float[1,4,4,4] y{outputs}) {{
            [first] a = Conv (x, w)
            [relu] r = Relu (a)
            [second] y = Conv (r, v)
            {tail}
        }}""",
        CONSTANTS,
    )


MODELS = {
    "a float reader": net("z = Exp (r)", ", float[1,4,6,6] z"),
    "a graph output": net("", ", float[1,4,6,6] r"),
    "none": net("", ""),
}
WRITERS = {
    "integer kernel": {},
    "terms in parallel": {"bits": 4, "terms": 2, "layout": "parallel"},
    "float": {"exclude": ("first",)},
}


@pytest.mark.parametrize("reader", MODELS)
@pytest.mark.parametrize("writer", WRITERS)
def test_all_readers_see_it_rectified(reader, writer):
    proto = MODELS[reader]
    samples = [feeds(proto, seed) for seed in range(4)]
    after, _ = static(proto, samples, **WRITERS[writer])
    kept = reader != "none" and writer != "integer kernel"
    assert ("Relu" in ops(after)) == kept
    for want, got in zip(run(proto, samples[0]), run(after, samples[0]), strict=True):
        assert np.linalg.norm(got - want) <= 0.1 * np.linalg.norm(want)
