"""Scales of blocks: in half the space, and the very numbers that were planned."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from expanding import expand, gamma, initializers, names, of_type, optimized, with_outputs
from onnx import TensorProto, numpy_helper
from partial_plans import SOME, oracle, planned, rows_of
from small import feeds, model, ops, run, weights

from onnxq.kernels_ref import Series, realize, series_scales
from onnxq.model import load, to_proto
from onnxq.passes import SelectNodes
from onnxq.passes.recover_terms import TermReader
from onnxq.passes.search_scales import match_plan
from onnxq.passes.stored_scales import expected_scale_bits, scale_bits, storable
from onnxq.passes.truncate_terms import TruncateTerms
from onnxq.pipeline import apply
from onnxq.plan import Plan

# 8 rows of 10 blocks: more than there must be for float16 to save anything
INPUTS, OUT, BLOCK = 80, 8, 8


def linear(scale: float = 1.0) -> onnx.ModelProto:
    return model(
        f"g (float[3,{INPUTS}] x) => (float[3,{OUT}] y) {{ [op] y = MatMul (x, w) }}",
        {"w": weights(INPUTS, OUT, scale=scale)},
    )


CONV = model(
    "g (float[1,16,6,6] x) => (float[1,8,4,4] y) { [op] y = Conv (x, w) }",
    {"w": weights(8, 16, 3, 3)},
)


def blocks(proto: onnx.ModelProto, plan: Plan | None = None, **options):
    settings = {"activations": "none", "terms": 1, "block_size": BLOCK, "layout": "merged"}
    return expand(proto, plan, **({} if plan else {**settings, "matmul": "folded", **options}))


def series(proto: onnx.ModelProto, plan: Plan) -> Series:
    entry = plan["op"]
    return realize(
        entry.series,
        rows_of(proto),
        plan.scales["op"],
        bits=entry.bits,
        granularity=entry.matrix_granularity(),
    )


def used(proto: onnx.ModelProto) -> np.ndarray:
    """The weight that the node reads, as [out, in]."""
    (op,) = (node for node in proto.graph.node if node.op_type in ("MatMul", "Conv"))
    found = with_outputs(proto, [op.input[1]], feeds(proto))[op.input[1]]
    return found.T if op.op_type == "MatMul" else found.reshape(len(found), -1)


def recovered(proto: onnx.ModelProto, after: onnx.ModelProto, plan: Plan) -> Series:
    ((entry, (_, weight)),) = match_plan(load(proto), plan)
    return TermReader(load(after)).series(entry, weight)


class TestOneTerm:
    @pytest.mark.parametrize("proto", [linear(), CONV], ids=["MatMul", "Conv"])
    @pytest.mark.parametrize("packing", ["int4", "uint8"])
    def test_float16_in_the_file(self, proto, packing):
        after, plan = blocks(proto, packing=packing)
        assert of_type(after, TensorProto.FLOAT16) == ["w/term0/scale"]
        stored = numpy_helper.to_array(initializers(after)["w/term0/scale"])
        np.testing.assert_array_equal(
            stored.reshape(OUT, -1).astype(np.float32), plan.scales["op"][0]
        )
        assert "w/term0/scale/float" in names(after)
        np.testing.assert_array_equal(used(after), series(proto, plan).dequantize())

    @pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e9])
    def test_a_power_of_two_brings_them_into_range(self, scale):
        proto = linear(scale)
        after, plan = blocks(proto)
        assert of_type(after, TensorProto.FLOAT16) == ["w/term0/scale"]
        power = numpy_helper.to_array(initializers(after)["w/term0/scale/power"])
        assert power.shape == ()
        assert np.frexp(power)[0] == 0.5
        np.testing.assert_array_equal(used(after), series(proto, plan).dequantize())
        read = recovered(proto, after, plan)
        np.testing.assert_array_equal(read.dequantize(), series(proto, plan).dequantize())

    def test_blocks_too_far_apart_keep_float32(self):
        w = weights(INPUTS, OUT)
        w[:BLOCK] *= np.float32(1e-15)
        proto = linear()
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))
        after, plan = blocks(proto)
        assert not of_type(after, TensorProto.FLOAT16)
        np.testing.assert_array_equal(used(after), series(proto, plan).dequantize())

    def test_few_scales_keep_float32(self):
        """A Cast takes more than it would save."""
        after, _ = blocks(linear(), block_size=16)  # 40 of them
        assert not of_type(after, TensorProto.FLOAT16)
        assert "Cast" not in [n.op_type for n in after.graph.node if "scale" in n.name]

    @pytest.mark.parametrize(
        "options",
        [
            {"block_size": None},
            {"block_size": 16, "matmul": "nbits", "bits": 4},
            {"block_size": None, "activations": "dynamic"},
        ],
        ids=["per channel", "MatMulNBits", "integers"],
    )
    def test_other_forms_keep_float32(self, options):
        proto = model(
            "g (float[3,160] x) => (float[3,80] y) { [op] y = MatMul (x, w) }",
            {"w": weights(160, 80)},
        )
        after, plan = blocks(proto, **options)
        entry = plan["op"]
        assert not of_type(after, TensorProto.FLOAT16)
        plain = series_scales(
            entry.series, rows_of(proto), bits=4, terms=1, granularity=entry.matrix_granularity()
        )
        np.testing.assert_array_equal(plan.scales["op"][0], plain[0])

    @pytest.mark.parametrize("terms", [1, 2])
    def test_a_plan_from_a_file_gives_exactly_its_numbers(self, tmp_path: Path, terms):
        proto = linear()
        _, plan = blocks(proto, terms=terms, series="joint")
        factor = np.float32(1.0001)  # needs more than 11 bits
        plan.scales["op"] = tuple(scale * factor for scale in plan.scales["op"])
        plan.save(tmp_path / "plan.json")
        after, again = blocks(proto, Plan.load(tmp_path / "plan.json"))
        np.testing.assert_array_equal(again.scales["op"], plan.scales["op"])
        assert not of_type(after, TensorProto.FLOAT16)
        np.testing.assert_array_equal(used(after), series(proto, plan).dequantize())


class TestSeveralTerms:
    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit", "joint"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("scale", [1.0, 1e-6])
    def test_the_weight_is_the_series_and_comes_back(self, kind, bits, scale):
        proto = linear(scale)
        after, plan = blocks(proto, terms=3, bits=bits, series=kind)
        wanted = series(proto, plan)
        np.testing.assert_array_equal(used(after), wanted.dequantize())
        read = recovered(proto, after, plan)
        for one, other in zip(read.terms, wanted.terms, strict=True):
            np.testing.assert_array_equal(one.q, other.q)
            np.testing.assert_array_equal(one.scale, other.scale)
        kept = 3 if kind == "joint" else 1
        assert len(of_type(after, TensorProto.FLOAT16)) == kept

    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit"])
    def test_scales_in_a_ratio_are_stored_once_also_as_float32(self, kind):
        proto = linear()
        _, plan = blocks(proto, terms=3, series=kind)
        factor = np.float32(1 + 2.0**-12)
        first = plan.scales["op"][0] * factor
        ratio = np.float32(16 if kind == "digit" else 14)
        plan.scales["op"] = (first, first / ratio, first / ratio / ratio)
        after, _ = blocks(proto, plan)
        stored = [name for name in initializers(after) if name.endswith("/scale")]
        assert stored == ["w/term0/scale"]
        np.testing.assert_array_equal(used(after), series(proto, plan).dequantize())
        read = recovered(proto, after, plan)
        for one, other in zip(read.terms, plan.scales["op"], strict=True):
            np.testing.assert_array_equal(one.scale, other)

    @pytest.mark.parametrize("layout", ["parallel", "merged"])
    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit", "joint"])
    def test_terms_are_dropped_with_what_made_their_scales(self, layout, kind):
        proto = linear()
        after, plan = blocks(proto, terms=3, layout=layout, series=kind)
        loaded = load(after)
        apply(TruncateTerms(1), loaded)
        cut = to_proto(loaded)
        onnx.checker.check_model(cut, full_check=True)
        assert "Div" not in ops(cut)
        assert not any("term1" in name or "term2" in name for name in initializers(cut))
        np.testing.assert_array_equal(used(cut), series(proto, plan).dequantize(1))

    @pytest.mark.parametrize("layout", ["parallel", "merged"])
    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit", "joint"])
    def test_rows_may_have_fewer_terms(self, layout, kind):
        proto = linear()
        fields = {"granularity": "per_block", "block_size": BLOCK, "activations": "none"}
        plan = planned(proto, SOME, series=kind, **{**fields, "layout": layout})
        after, plan = blocks(proto, plan)
        assert "w/term0/scale" in of_type(after, TensorProto.FLOAT16)
        terms, x = oracle(proto, plan).terms, feeds(proto)["x"].astype(np.float64)
        want = sum(x @ term.dequantize().T for term in terms)
        # sums of products in any order, and those of the terms
        bound = gamma(INPUTS + 2 * len(terms)) * sum(
            np.abs(x) @ np.abs(term.dequantize()).T for term in terms
        )
        (got,) = run(after, feeds(proto))
        assert (np.abs(got - want) <= bound).all()

    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit", "joint"])
    @pytest.mark.parametrize("packing", ["int4", "uint8"])
    @pytest.mark.parametrize("layout", ["parallel", "merged"])
    def test_nothing_is_left_of_it_when_the_model_is_loaded(self, kind, packing, layout):
        options = {"series": kind, "packing": packing, "layout": layout}
        after, _ = blocks(linear(1e-6), terms=2, **options)
        assert set(ops(optimized(after))) <= {"MatMul", "Gemm", "Add"}


class TestSpace:
    @pytest.mark.parametrize("kind", ["fixed_ratio", "digit", "joint"])
    @pytest.mark.parametrize("size", [BLOCK, 16, None])
    @pytest.mark.parametrize("terms", [1, 2, 3])
    def test_bits_are_those_in_the_file(self, kind, size, terms):
        after, plan = blocks(linear(), series=kind, block_size=size, terms=terms)
        stored = sum(
            8 * numpy_helper.to_array(tensor).nbytes
            for name, tensor in initializers(after).items()
            if name.endswith("/scale")
        )
        entry, scales = plan["op"], plan.scales["op"]
        assert scale_bits(entry, scales) == stored
        assert expected_scale_bits(entry, scales[0].size) == stored

    def test_numbers_that_fit_are_left_as_they_are(self):
        _, plan = blocks(linear(), terms=3)
        again = storable(plan.scales["op"], plan["op"])
        np.testing.assert_array_equal(again, plan.scales["op"])

    def test_a_weight_that_is_read_in_two_forms_has_the_scales_of_each(self):
        """MatMulNBits takes float32: there is nothing to round for."""
        proto = model(
            """g (float[3,256] x) => (float[3,8] y, float[3,8] z) {
                [op] y = MatMul (x, w)
                [two] z = MatMul (x, w)
            }""",
            {"w": weights(256, 8)},
        )
        options = {"bits": 4, "terms": 1, "block_size": 16, "activations": "none"}
        chosen = SelectNodes(matmul="folded", **options)(load(proto))
        chosen.nodes[1] = chosen.nodes[1].model_copy(update={"form": "nbits"})
        after, plan = expand(proto, chosen)
        assert of_type(after, TensorProto.FLOAT16) == ["w/term0/scale"]
        assert (plan.scales["op"][0] > plan.scales["two"][0]).any()
