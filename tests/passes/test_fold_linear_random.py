"""Random graphs of linear branches, folded against unfolded."""

import math
import os
from collections import Counter

import numpy as np
import onnx
import pytest
from branches import UNIT, Case, cases, magnitudes, roundings
from hypothesis import HealthCheck, given, settings
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from small import run

from onnxq.model import load, to_proto
from onnxq.passes import FoldLinearBranches, signature, verify
from onnxq.pipeline import canonicalize

EXAMPLES = int(os.environ.get("ONNXQ_EXAMPLES", "200"))  # of each of the two tests


def weights_of(proto: onnx.ModelProto) -> int:
    """Kernel values, counted once per Conv."""
    sizes = {i.name: math.prod(i.dims) for i in proto.graph.initializer}
    return sum(sizes[n.input[1]] for n in proto.graph.node if n.op_type == "Conv")


def folded(case: Case, *, pipeline: bool) -> onnx.ModelProto:
    """The case after the pass (or all of them), with everything checked but the numbers."""
    before = case.proto.SerializeToString()
    loaded = load(case.proto)
    if pipeline:
        canonicalize(loaded)
    else:
        contract = signature(loaded)
        FoldLinearBranches()(loaded)
        verify(loaded, contract, "FoldLinearBranches")
    after = to_proto(loaded)
    assert case.proto.SerializeToString() == before, "the source model was changed"
    assert FoldLinearBranches()(loaded).rewritten == (), "a second run is not a no-op"
    assert to_proto(loaded).SerializeToString() == after.SerializeToString()
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) <= len(case.proto.graph.node)
    assert weights_of(after) <= weights_of(case.proto)
    return after


def assert_equal(case: Case, after: onnx.ModelProto) -> None:
    """Outputs agree up to rounding; of small integers, exactly.

    Both models add up the same values, whose absolute sum is A: the folded one has the absolute
    values of sums where the unfolded one has the sums of absolute values. So the two differ by at
    most A·((1 + u)^m − 1) each, m their roundings. A itself is computed in float32: (1 + u)^m more.
    """
    names = [o.name for o in case.proto.graph.output]
    bound = magnitudes(case.proto)
    for feed in case.feeds:
        positions = math.prod(feed["x"].shape[2:])
        sums = run(bound, {k: np.abs(v) for k, v in feed.items()}, optimize=False)
        largest = max(float(a.max()) for a in sums)
        exact = case.integer and largest * 2.0**case.fraction_bits <= 2.0**24
        count = roundings(case.proto, positions), roundings(after, positions)
        part = sum(math.expm1(m * math.log1p(UNIT)) for m in count) * (1 + UNIT) ** count[0]
        for optimize in (False, True):
            want = outputs(case.proto, feed, optimize=optimize)
            got = outputs(after, feed, optimize=optimize)
            for name, a, b, total in zip(names, want, got, sums, strict=False):
                assert a.shape == b.shape, name
                limit = np.zeros_like(total) if exact else part * total
                assert np.all(np.abs(a - b) <= limit), (
                    f"{name} of {feed['x'].shape}, optimize={optimize}: off by "
                    f"{np.abs(a - b).max()}, allowed {limit.max()}"
                )


def outputs(
    proto: onnx.ModelProto, feed: dict[str, np.ndarray], *, optimize: bool
) -> list[np.ndarray]:
    """Outputs of a model.

    onnxruntime's own fusion of Pad into AveragePool makes some models that it then refuses, as the
    pads exceed the kernel; those run without optimisation.
    """
    try:
        return run(proto, feed, optimize=optimize)
    except Fail as error:
        if not optimize or "Pad should be smaller than kernel" not in str(error):
            raise
        return run(proto, feed, optimize=False)


def runnable(case: Case) -> bool:
    """Whether onnxruntime runs the unfolded model, as it is and for |x|, without NaN."""
    values = [a for feed in case.feeds for a in run(case.proto, feed, optimize=False)]
    return all(np.isfinite(a).all() for a in values)


@pytest.mark.parametrize("traps", [True, False], ids=["mixed", "linear"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["pass", "pipeline"])
def test_folded_equals_unfolded(traps, pipeline):
    seen = Counter()

    @settings(
        max_examples=EXAMPLES // 2,
        deadline=None,
        derandomize="ONNXQ_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(traps=traps))
    def check(case):
        assert runnable(case)
        after = folded(case, pipeline=pipeline)
        seen["all"] += 1
        seen["folded"] += len(after.graph.node) < len(case.proto.graph.node)
        convs = [n for n in case.proto.graph.node if n.op_type == "Conv"]
        fewer = len(convs) - sum(n.op_type == "Conv" for n in after.graph.node)
        seen["convs merged"] += fewer > 0
        seen["one node"] += len(after.graph.node) == 1
        assert_equal(case, after)

    check()
    # a test in which hardly anything folds would show nothing
    print(dict(seen))
    assert seen["folded"] > seen["all"] / 2
    assert seen["convs merged"] > seen["all"] / 6
