"""What a truncated file says of itself: a plan that later commands take, or refuse truthfully."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from small import feeds, model, run, weights

import onnxq
from onnxq.embedded_plan import embed_plan, embedded_plan
from onnxq.errors import ConfigError
from onnxq.model import load, to_proto
from onnxq.passes.truncate_terms import term_counts
from onnxq.progressive import extend, truncate

TAPS = weights(16, 8, 3, 3, scale=0.02)
TAPS[:, :, 1, 1] = weights(16, 8, seed=1)  # as branches of 1x1 leave them
NET = model(
    """g (float[2,8,8,8] x) => (float[2,5] y) {
        [conv] c = Conv <pads = [1,1,1,1]> (x, w, b)
        [relu] r = Relu (c)
        [pool] p = GlobalAveragePool (r)
        [flat] f = Flatten (p)
        [fc] y = MatMul (f, v)
    }""",
    {"w": TAPS, "b": weights(16, seed=2), "v": weights(16, 5, seed=3)},
)


def quantized(**options: object) -> onnx.ModelProto:
    """A model that holds its plan."""
    result = onnxq.quantize(NET, **{"offset": "off", "priors": False, **options})
    loaded = load(result.model)
    embed_plan(loaded, result.plan)
    return to_proto(loaded)


def error(proto: onnx.ModelProto) -> float:
    want, got = (run(each, feeds(NET))[0] for each in (NET, proto))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("layout", ["merged", "parallel"])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
class TestCentre:
    def options(self, activations: str, layout: str) -> dict[str, object]:
        if (activations, layout) == ("dynamic", "merged"):
            pytest.skip("no centre in this form")
        return {"activations": activations, "layout": layout, "centre": "on"}

    def test_it_is_no_term_that_is_asked_for(self, activations: str, layout: str) -> None:
        options = self.options(activations, layout)
        whole = quantized(terms=2, **options)
        assert term_counts(load(whole)) == {"conv": 3, "fc": 2}
        cut = truncate(whole, None, 1)
        assert cut.report.changed == {"conv": (3, 2), "fc": (2, 1)}
        assert cut.report.warnings == (
            "1 nodes keep 2 terms (first: 'conv'): one holds the centre tap of the kernel alone, "
            "and is of no use without the next",
        )
        # about what one term beside the centre makes of it; without its 4 bits, no less than 1
        assert error(cut.model) < 2 * error(quantized(terms=1, **options)) < 0.5

    def test_the_plan_is_valid(self, activations: str, layout: str) -> None:
        whole = quantized(terms=2, **self.options(activations, layout))
        cut = truncate(whole, None, 1).model
        plan = embedded_plan(load(cut)).plan
        assert {node.name: (node.terms, node.centre) for node in plan.nodes} == {
            "conv": (2, True),
            "fc": (1, False),
        }
        again = truncate(cut, None, 1)
        assert again.model == cut
        assert again.report.warnings[0] == (
            "no node has more than 1 terms besides that of a centre tap: nothing was dropped"
        )
        with pytest.raises(ConfigError, match="node 'conv' was made with terms of some"):
            extend(cut, NET, None, 2)


@pytest.mark.parametrize("layout", ["merged", "parallel"])
def test_channels_with_one_term_each_can_be_extended(layout: str) -> None:
    """A first term covers all channels, whatever those after it did."""
    some = quantized(terms=2, points="14%", activations="none", layout=layout)
    assert embedded_plan(load(some)).partial
    with pytest.raises(ConfigError, match="was made with terms of some channels"):
        extend(some, NET, None, 2)
    cut = truncate(some, None, 1).model
    assert embedded_plan(load(cut)).partial == frozenset()
    longer = extend(cut, NET, None, 2)
    assert set(term_counts(load(longer.model)).values()) == {2}
    assert error(longer.model) < error(cut) / 2


def test_stacked_outputs_take_no_further_terms() -> None:
    """Their scales are those of all outputs, in the order of the node that has computed them."""
    some = quantized(terms=2, points="14%", activations="dynamic", layout="parallel")
    assert any("/stacked/" in node.name for node in some.graph.node)
    cut = truncate(some, None, 1).model
    assert "conv" in embedded_plan(load(cut)).partial
    with pytest.raises(ConfigError, match="node 'conv' was made with terms of some channels"):
        extend(cut, NET, None, 2)
    assert truncate(cut, None, 1).model == cut
