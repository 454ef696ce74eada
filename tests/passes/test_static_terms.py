"""Static activations of several terms: exact integers, known scales, nothing lost before them."""

from collections import Counter

import numpy as np
import onnx
import pytest
from calibrating import static
from expanding import basis_nodes, gamma, metadata, nodes, optimized, with_outputs
from onnx import numpy_helper
from small import conv_model, feeds, model, ops, run, weights

import onnxq
from onnxq.errors import ConfigError
from onnxq.inspection import inspect
from onnxq.kernels_ref import activation_params, conv, dequantize, quantize
from onnxq.kernels_ref.activation_series import residual_step
from onnxq.kernels_ref.granularity import PerTensor
from onnxq.model import load
from onnxq.passes.search_ranges import HEADROOM, widen
from onnxq.passes.search_scales import match_plan, node_series
from onnxq.plan import Plan

CONV = model(
    "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { [op] y = Conv (x, w, b) }",
    {"w": weights(4, 3, 3, 3), "b": weights(4, seed=1)},
)
CHAIN = model(
    """g (float[1,3,12,12] x) => (float[1,4,3,3] y, float[1,4] z) {
        [first] a = Conv (x, w)
        [relu] r = Relu (a)
        [pool] m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        [second] y = Conv (m, v)
        [mean] z = ReduceMean <axes = [2,3], keepdims = 0> (r)
    }""",
    {"w": weights(4, 3, 3, 3), "v": weights(4, 4, 3, 3, seed=1)},
)


def samples(proto: onnx.ModelProto, count: int = 4) -> list[dict[str, np.ndarray]]:
    return [feeds(proto, seed) for seed in range(count)]


def whole_weight(proto: onnx.ModelProto, plan: Plan, name: str) -> np.ndarray:
    """The dequantized weight of a node, of its own shape."""
    found = {entry.name: weight for entry, (_, weight) in match_plan(load(proto), plan)}
    weight = found[name]
    return weight.from_matrix(node_series(weight, plan[name], plan).dequantize())


class TestIntegers:
    @pytest.mark.parametrize("target", ["cpu-avx2", "cpu-vnni", "cpu-arm"])
    @pytest.mark.parametrize("terms", [2, 3])
    def test_bit_for_bit(self, target, terms):
        x = feeds(CONV)["x"]
        after, plan = static(CONV, samples(CONV), bits=7, activation_terms=terms, target=target)
        found = {
            int(metadata(node)["onnxq.activation_term"]): node.input[0]
            for node in basis_nodes(after, "op")
        }
        # one weight term: with products triangular the first two activation terms
        assert sorted(found) == list(range(len(found))) and len(found) >= 2
        inner = with_outputs(after, list(found.values()), {"x": x})
        signed = inner[found[0]].dtype == np.int8
        scale, zero = activation_params(*plan.ranges["x"], signed=signed)
        rest = x
        for j in range(len(found)):
            q = quantize(rest, scale, zero, bits=8, granularity=PerTensor(), signed=signed)
            np.testing.assert_array_equal(inner[found[j]], q)
            rest = rest - dequantize(q, scale, zero, granularity=PerTensor())
            scale = np.asarray(scale * residual_step(8))
            zero = 0 if signed else 128

    @pytest.mark.parametrize("layout", ["merged", "parallel"])
    @pytest.mark.parametrize("terms", [1, 2, 3])
    def test_outputs_are_those_of_the_series_within_half_a_step(self, layout, terms):
        weight = {"bits": 4, "terms": 2, "series": "digit", "layout": layout}
        after, plan = static(CONV, samples(CONV), activation_terms=terms, products="all", **weight)
        x = feeds(CONV, 1)["x"]  # one of the samples: within the range
        w = whole_weight(CONV, plan, "op")
        bias = numpy_helper.to_array(CONV.graph.initializer[1])[:, None, None]
        want = conv(x, w, dtype=np.float64) + bias
        step = activation_params(*plan.ranges["x"])[0] * np.float64(residual_step(8)) ** (terms - 1)
        reach = conv(np.ones_like(x), np.abs(w), dtype=np.float64)
        size = conv(np.abs(x) + plan.ranges["x"][1], np.abs(w), dtype=np.float64) + np.abs(bias)
        # half a step of the last term per input; and the roundings of 2·terms products of 27
        bound = step / 2 * reach + gamma(27 + 8 * terms) * size
        if "y" in plan.ranges:  # one term of both writes 8 bits
            bound = bound + activation_params(*plan.ranges["y"])[0]
        for optimize in (True, False):
            (got,) = run(after, {"x": x}, optimize=optimize)
            assert (np.abs(got - want) <= bound).all()

    def test_scales_are_constants(self):
        after, _ = static(CHAIN, samples(CHAIN), bits=7, activation_terms=2)
        constants = {t.name for t in after.graph.initializer}
        quantizers = [n for n in after.graph.node if n.op_type == "QuantizeLinear"]
        assert quantizers and all(set(n.input[1:]) <= constants for n in quantizers)
        assert not {"ReduceMax", "ReduceMin", "DynamicQuantizeLinear"} & set(ops(after))
        assert Counter(ops(optimized(after)))["ConvInteger"] == 4

    def test_readers_of_one_tensor_share_its_terms_once_loaded(self):
        proto = model(
            """g (float[2,3,8] x) => (float[2,3,4] y, float[2,3,4] z) {
                [one] y = MatMul (x, w)
                [two] z = MatMul (x, v)
            }""",
            {"w": weights(8, 4), "v": weights(8, 4, seed=1)},
        )
        after, _ = static(proto, samples(proto), bits=7, activation_terms=2)
        assert Counter(ops(optimized(after)))["QuantizeLinear"] == 2


class TestWhatIsSplitStaysFloat:
    def test_nothing_before_the_terms_has_8_bits(self):
        after, plan = static(CHAIN, samples(CHAIN), bits=7, activation_terms=2)
        assert sorted(plan.ranges) == ["m", "x"]
        assert "Relu" in ops(after)
        assert not any(n.op_type == "DequantizeLinear" for n in producers(after, "MaxPool"))
        want, got = (run(proto, feeds(CHAIN, 1)) for proto in (CHAIN, after))
        for a, b in zip(want, got, strict=True):
            # weights of 7 bits and activations of 16: far from the 0.02 of 8 bits and a lost Relu
            assert np.linalg.norm(b - a) <= 0.02 * np.linalg.norm(a)

    def test_two_terms_bring_what_dynamic_ones_do(self):
        errors = {}
        for activations in ("static", "dynamic"):
            data = {"x": np.concatenate([f["x"] for f in samples(CHAIN)])}
            made = onnxq.quantize(
                CHAIN,
                activations=activations,
                layout="parallel",
                activation_terms=2,
                weight_bits=8,
                terms=2,
                calibration=data,
                rounding="nearest",
                bias_correction=False,
                clip="absmax",
            ).model
            want, got = (run(proto, feeds(CHAIN, 1))[0] for proto in (CHAIN, made))
            errors[activations] = np.linalg.norm(got - want) / np.linalg.norm(want)
        # the range is at most HEADROOM · (range of all samples / range of this one) as wide
        assert errors["static"] <= 8 * errors["dynamic"]

    def test_twice_the_range_of_the_samples(self):
        found = samples(CONV)
        _, plan = static(CONV, found, bits=7, activation_terms=2)
        x = np.stack([sample["x"] for sample in found])
        assert plan.ranges["x"] == (HEADROOM * float(x.min()), HEADROOM * float(x.max()))

    @pytest.mark.parametrize(
        ("limits", "wanted"),
        [
            ((-np.inf, np.inf), (-2.0, 6.0)),
            ((0.0, np.inf), (-1.0, 6.0)),
            ((-1.5, 5.0), (-1.5, 5.0)),
            ((-0.5, 2.0), (-1.0, 3.0)),
        ],
    )
    def test_no_wider_than_values_can_be(self, limits, wanted):
        assert widen((-1.0, 3.0), limits) == wanted

    def test_beyond_the_range_all_terms_saturate(self):
        after, plan = static(CONV, samples(CONV), bits=7, activation_terms=2)
        x = 3 * feeds(CONV)["x"]
        scale, zero = activation_params(*plan.ranges["x"])
        low, high = -zero * np.float64(scale), (255 - zero) * np.float64(scale)
        w = whole_weight(CONV, plan, "op")
        bias = numpy_helper.to_array(CONV.graph.initializer[1])[:, None, None]
        want = conv(np.clip(x, low, high).astype(np.float32), w, dtype=np.float64) + bias
        reach = conv(np.ones_like(x), np.abs(w), dtype=np.float64)
        (got,) = run(after, {"x": x})
        assert (np.abs(got - want) <= 0.51 * scale * reach).all()

    def test_depthwise_computes_in_float(self):
        proto = model(
            """g (float[1,4,8,8] x) => (float[1,4,4,4] y) {
                [deep] d = Conv <group = 4> (x, w)
                [point] y = Conv (d, v)
            }""",
            {"w": weights(4, 1, 3, 3), "v": weights(4, 4, 3, 3, seed=1)},
        )
        after, plan = static(proto, samples(proto), bits=7, activation_terms=2)
        assert plan["deep"].activations == "none" and "depthwise" in str(plan["deep"].note)
        assert ops(after).count("ConvInteger") == 2


class TestOptions:
    def test_the_whole_way(self):
        data = {"x": np.concatenate([f["x"] for f in samples(conv_model())])}
        made = onnxq.quantize(
            conv_model(), activations="static", activation_terms=2, calibration=data
        )
        (node,) = inspect(made.model).quantized
        assert (node.activations, node.activation_terms) == ("static", 2)

    def test_float_compute_has_none(self):
        with pytest.raises(ConfigError, match="needs --activations dynamic or static"):
            onnxq.quantize(conv_model(), activations="none", activation_terms=2)

    def test_a_weight_of_a_node_with_one_term_and_one_with_two(self):
        """Their products have other types, so that each stores its own."""
        proto = model(
            """g (float[1,3,8,8] x) => (float[1,3,6,6] y, float[1,3,6,6] z) {
                [one] y = Conv (x, w)
                [two] z = Conv (x, w)
            }""",
            {"w": weights(3, 3, 3, 3)},
        )
        _, plan = static(proto, samples(proto), bits=8)
        entries = [plan["one"], plan["two"].model_copy(update={"activation_terms": 2})]
        after, _ = static(proto, [], plan.model_copy(update={"nodes": entries}))
        y, z = run(after, feeds(proto, 1))
        want = run(proto, feeds(proto, 1))[0]
        for got in (y, z):
            assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)


def producers(proto: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    """What writes the first inputs of the nodes of a type."""
    read = {n.input[0] for n in nodes(proto.graph) if n.op_type == op_type}
    return [n for n in nodes(proto.graph) if read & set(n.output)]
