"""MatMul that stays in few bits: what is written, what onnxruntime makes of it, and its numbers."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from expanding import (
    basis_nodes,
    expand,
    from_rows,
    gamma,
    initializers,
    nodes,
    optimized,
    series_of,
    with_outputs,
)
from geometry import Case, gemms, matmuls
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from small import model, ops, run, weights

from onnxq.errors import ConfigError
from onnxq.kernels_ref import spread
from onnxq.model import load
from onnxq.passes import GemmToMatMul, SelectNodes
from onnxq.passes.lower_nbits import reason_against_nbits
from onnxq.passes.weights import candidates
from onnxq.plan import Plan

SETTINGS = settings(deadline=None, max_examples=60)


def planned(proto: onnx.ModelProto, **options) -> Plan:
    """A plan in which every MatMul has form nbits."""
    source = load(proto)
    GemmToMatMul()(source)
    plan = SelectNodes(activations="none", **{"terms": 1, **options})(source)
    nbits = [
        entry.model_copy(update={"form": "nbits"}) if entry.op_type == "MatMul" else entry
        for entry in plan.nodes
    ]
    return plan.model_copy(update={"nodes": nbits})


def expanded(proto: onnx.ModelProto, **options) -> onnx.ModelProto:
    return expand(proto, planned(proto, **options))[0]


def run_in_float(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The output of MatMulNBits with float32 activations."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]


def linear(inputs: int, out: int = 7, rows: str = "4,") -> onnx.ModelProto:
    """x [rows, inputs] times w."""
    return model(
        f"g (float[{rows}{inputs}] x) => (float[{rows}{out}] y) {{ [op] y = MatMul (x, w) }}",
        {"w": weights(inputs, out)},
    )


def kernels(proto: onnx.ModelProto) -> list[str]:
    """The products, and what is left of the weights' path, in the graph that onnxruntime runs."""
    seen = [node.op_type for node in nodes(optimized(proto).graph)]
    return [op for op in seen if op in ("MatMulNBits", "MatMul", "Gemm", "DequantizeLinear")]


def int8_error(x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
    """How far a product may be off where each block of a row of x is rounded to -127 … 127.

    A block's scale is its absmax / 127, and an element at most half of that from its integer.
    """
    inputs = weight.shape[0]
    blocks = -(-inputs // block)
    padded = np.zeros((*x.shape[:-1], blocks * block))
    padded[..., :inputs] = np.abs(x)
    absmax = padded.reshape(*x.shape[:-1], blocks, block).max(-1)
    step = np.repeat(absmax / 127, block, axis=-1)[..., :inputs]
    return step / 2 @ np.abs(weight.astype(np.float64))


def check(case: Case, **options) -> None:
    """Weights bit for bit; outputs within rounding, and by default within that of int8 as well."""
    after, plan = expand(case.proto, planned(case.proto, **options))
    entry = plan["op"]
    series = series_of(entry, plan, case.weight, out_last=True)
    terms = [from_rows(t.dequantize(), case.weight.shape, out_last=True) for t in series.terms]
    found = basis_nodes(after, "op")
    assert len(found) == entry.terms
    feed = {"x": case.x}
    used = with_outputs(after, [basis.input[1] for basis in found], feed)
    for basis, term in zip(found, terms, strict=True):
        assert basis.op_type == "MatMul"
        np.testing.assert_array_equal(used[basis.input[1]], term)
    x = case.operand.astype(np.float64)
    exact, magnitude, rounding, span = (np.float64(0) for _ in range(4))
    block = next(a.i for n in after.graph.node for a in n.attribute if a.name == "block_size")
    for term, whole in zip(terms, series.terms, strict=True):
        exact, magnitude = exact + x @ term, magnitude + np.abs(x) @ np.abs(term)
        rounding = rounding + int8_error(x, term, block)
        # With int8 activations the kernel multiplies q + half and takes half off the sum: what it
        # rounds is up to (2 half - 1) + half steps, even where the weight itself is zero.
        steps = np.broadcast_to(
            spread(whole.scale, whole.q.shape, whole.granularity), whole.q.shape
        )
        half = 8 if entry.bits <= 4 else 128
        reach = from_rows(3 * half * steps.astype(np.float64), case.weight.shape, out_last=True)
        span = span + np.abs(x) @ reach + int8_error(x, reach, block)
    if case.bias is not None:
        exact, magnitude, span = (
            exact + case.bias,
            magnitude + np.abs(case.bias),
            span + np.abs(case.bias),
        )
    # Per term: the scale, `products` products and additions in any order; then the sum and the
    # bias. By default the activations' scale comes on top: its rounding, its inverse's, a product,
    # and the offset's product and sum.
    bound = gamma(case.products + entry.terms + 4) * magnitude
    assert (np.abs(run(after, feed, optimize=False)[0] - exact) <= bound).all()
    assert (np.abs(run_in_float(after, feed) - exact) <= bound).all()
    by_default = run(after, feed)[0]
    by_int8 = rounding + gamma(case.products + entry.terms + 12) * span
    assert (np.abs(by_default - exact) <= by_int8).all()
    assert by_default.shape == exact.shape


def flat(case: Case) -> bool:
    return case.weight.ndim == 2


@st.composite
def options(draw: st.DrawFn) -> dict:
    return {
        "bits": draw(st.integers(2, 8)),
        "terms": draw(st.integers(1, 3)),
        "series": draw(st.sampled_from(["fixed_ratio", "digit", "joint"])),
        "block_size": draw(st.sampled_from([None, 16, 32, 48, 256, 512])),
    }


class TestNumbers:
    @SETTINGS
    @given(case=matmuls().filter(flat), options=options())
    def test_matmul(self, case, options):
        check(case, **options)

    @SETTINGS
    @given(case=gemms(), options=options())
    def test_gemm(self, case, options):
        check(case, **options)

    @pytest.mark.parametrize("block", [None, 16, 32, 48, 64, 128, 256, 512, 1024])
    @pytest.mark.parametrize("rows", [1, 40])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_rows_of_several_blocks_and_a_shorter_one(self, block, rows, bits):
        proto = linear(1100, rows=f"{rows},")
        x, weight = weights(rows, 1100, seed=3), numpy_helper.to_array(initializers(proto)["w"])
        check(Case(proto, x, x, weight, out_last=True), block_size=block, bits=bits)


class TestStorage:
    @pytest.mark.parametrize(
        ("bits", "stored"), [(2, "INT4"), (4, "INT4"), (5, "INT8"), (8, "INT8")]
    )
    def test_types(self, bits, stored):
        found = initializers(expanded(linear(70), bits=bits, block_size=32))
        assert {name: t.data_type for name, t in found.items()} == {
            "w/term0/q": onnx.TensorProto.DataType.Value(stored),
            "w/term0/scale": onnx.TensorProto.FLOAT,
        }

    @pytest.mark.parametrize(
        ("inputs", "block", "kernel", "blocks"),
        [
            (70, 32, 32, 3),  # the last one is shorter
            (70, 48, 16, 5),  # no power of two: its scale is repeated, but for the shorter block
            (70, 64, 64, 2),
            (70, 256, 128, 1),  # a row is one block: no more padding than needed
            (1100, 512, 256, 5),  # two of the largest block
            (1100, None, 128, 9),
            (20, 32, 32, 1),
            (9, None, 16, 1),
        ],
    )
    def test_blocks(self, inputs, block, kernel, blocks):
        after = expanded(linear(inputs), block_size=block)
        (found,) = (n for n in after.graph.node if n.op_type == "DequantizeLinear")
        attributes = {a.name: a.i for a in found.attribute}
        assert attributes == {"axis": 0, "block_size": kernel}
        stored = initializers(after)
        assert list(stored["w/term0/q"].dims) == [inputs, 7]  # nothing is padded in the file
        assert list(stored["w/term0/scale"].dims) == [blocks, 7]

    def test_names_and_opset(self):
        after = expanded(linear(70), block_size=32, terms=2)
        assert ops(after) == ["DequantizeLinear", "MatMul", "DequantizeLinear", "MatMul", "Sum"]
        assert [n.name for n in basis_nodes(after, "op")] == ["op/term0", "op/term1"]
        assert after.graph.node[-1].name == "op/sum"
        assert after.opset_import[0].version == 21

    def test_round_trip_of_the_plan(self, tmp_path):
        proto = linear(70)
        after, plan = expand(proto, planned(proto, block_size=32))
        plan.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json")
        assert again["op"].form == "nbits"
        assert expand(proto, again)[0].SerializeToString() == after.SerializeToString()

    @pytest.mark.parametrize("terms", [1, 2])
    def test_a_second_run_leaves_it_alone(self, terms):
        after = expanded(linear(70), block_size=32, terms=terms)
        plan = SelectNodes()(load(after))
        assert {entry.reason for entry in plan.nodes} == {"already quantized by onnxq"}


def after_product(text: str, rows: str = "4,", **constants: np.ndarray) -> onnx.ModelProto:
    """A product p [rows, 16] and what follows it; x has 16 columns as well."""
    return model(
        f"g (float[{rows}16] x) => (float[{rows}16] y) {{ [op] p = MatMul (x, w) {text} }}",
        {"w": weights(16, 16), **constants},
    )


def refusal(proto: onnx.ModelProto, **options) -> str | None:
    (found,) = (c for c in candidates(load(proto)) if c.name == "op")
    settings = {"terms": 1, "block_size": 32, "merged": False, **options}
    return reason_against_nbits(found.node, found.found, **settings)


FUSED = {
    "matrix": linear(70),
    "vector": linear(70, rows=""),
    "batch": linear(70, rows="2,3,"),
    "unknown rows": linear(70, rows="n,"),
    "bias": after_product("y = Add (p, b)", b=weights(16)),
    "bias on the left": after_product("y = Add (b, p)", b=weights(16)),
    "bias, then Relu": after_product("s = Add (p, b) y = Relu (s)", b=weights(16)),
    "number": after_product("y = Add (p, b)", b=weights(1)),
    "residual of rank 3": after_product("y = Add (p, x)", rows="2,4,"),
    "matrix, product of rank 3": after_product("y = Add (p, b)", rows="2,4,", b=weights(4, 16)),
    "no Add": after_product("y = Mul (p, x)"),
}
NOT_FUSED = {
    "residual": after_product("y = Add (p, x)"),
    "residual on the left": after_product("y = Add (x, p)"),
    "one row": after_product("y = Add (p, b)", b=weights(1, 16)),
    "column": after_product("y = Add (b, p)", b=weights(4, 1)),
}


class TestWhatOnnxruntimeMakesOfIt:
    """Both ways: what is refused is not fused, as long as onnxruntime stays as it is."""

    @pytest.mark.parametrize("name", list(FUSED))
    @pytest.mark.parametrize(("bits", "terms"), [(4, 1), (8, 1), (4, 2)])
    @pytest.mark.parametrize("block", [None, 32])
    def test_fused(self, name, bits, terms, block):
        assert refusal(FUSED[name], terms=terms, block_size=block) is None
        after = expanded(FUSED[name], bits=bits, terms=terms, block_size=block)
        assert kernels(after) == ["MatMulNBits"] * terms

    @pytest.mark.parametrize("block", [16, 32, 48, 64, 128, 256, 512])
    def test_blocks(self, block):
        assert refusal(linear(1100), block_size=block) is None
        assert kernels(expanded(linear(1100), block_size=block)) == ["MatMulNBits"]

    @pytest.mark.parametrize("name", list(NOT_FUSED))
    def test_not_fused(self, name):
        assert "float Gemm" in refusal(NOT_FUSED[name])
        assert kernels(expanded(NOT_FUSED[name], block_size=32)) == ["DequantizeLinear", "Gemm"]

    @pytest.mark.parametrize("name", list(NOT_FUSED))
    def test_several_terms_are_no_gemm(self, name):
        assert refusal(NOT_FUSED[name], terms=2) is None
        after = expanded(NOT_FUSED[name], block_size=32, terms=2)
        assert kernels(after) == ["MatMulNBits"] * 2

    def test_a_product_of_unknown_rank(self):
        proto = after_product("y = Add (p, b)", b=weights(1, 16))
        proto.graph.input[0].type.tensor_type.ClearField("shape")
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        assert "float Gemm" in refusal(proto)

    def test_a_shared_weight_is_refused_and_works(self):
        proto = model(
            """g (float[4,70] x) => (float[4,7] y, float[4,7] z) {
                [op] y = MatMul (x, w)
                r = Relu (x)
                [other] z = MatMul (r, w)
            }""",
            {"w": weights(70, 7)},
        )
        assert "several nodes" in refusal(proto)
        assert kernels(expanded(proto, block_size=32)) == ["MatMulNBits"] * 2

    def test_a_table_that_a_gather_reads_too(self):
        proto = model(
            """g (float[4,70] x, int64[2] i) => (float[4,7] y, float[2,7] z) {
                [op] y = MatMul (x, w)
                [gather] z = Gather (w, i)
            }""",
            {"w": weights(70, 7)},
        )
        assert refusal(proto) is None
        assert kernels(expanded(proto, block_size=32)) == ["MatMulNBits"]


BODIES = """g (bool p, float[4,70] x) => (float[4,7] y) {
    [if] y = If (p) <
        then_branch = t () => (float[4,7] yt) { [one] yt = MatMul (x, w) },
        else_branch = e () => (float[4,7] ye) { r = Relu (x) [two] ye = MatMul (r, v) }
    >
}"""


class TestBodies:
    """onnxruntime wants a weight in the graph of the node; a session fails where it is not."""

    @pytest.mark.parametrize("inside", [False, True])
    def test_if(self, inside):
        proto = model(BODIES, {"w": weights(70, 7), "v": weights(70, 7, seed=1)})
        if inside:
            for attribute, tensor in zip(
                proto.graph.node[0].attribute, list(proto.graph.initializer), strict=True
            ):
                attribute.g.initializer.append(tensor)
            del proto.graph.initializer[:]
        self.check(proto)

    def test_a_weight_that_both_read(self):
        proto = model(BODIES.replace("(r, v)", "(r, w)"), {"w": weights(70, 7)})
        self.check(proto)

    @staticmethod
    def check(proto):
        after = expanded(proto, block_size=32)
        assert not [t for t in after.graph.initializer if "/term0/" in t.name]
        assert kernels(after) == ["MatMulNBits"] * 2
        for flag in (True, False):
            feed = {"p": np.array(flag), "x": weights(4, 70, seed=5)}
            want = run(after, feed, optimize=False)[0]
            magnitude = np.abs(feed["x"]).max() * np.float64(
                3 * 70 * 5
            )  # |w| < 5, dequantized < 15
            assert np.abs(run_in_float(after, feed) - want).max() <= 2 * gamma(75) * magnitude


class TestRefused:
    CASES = (
        (linear(70), {"block_size": 24}, "block_size 24"),
        (linear(70), {"block_size": 8}, "block_size 8"),
        (linear(70), {"terms": 2, "layout": "merged"}, "parallel"),
        (
            model(
                "g (float[70,3] x) => (float[7,3] y) { [op] y = MatMul (w, x) }",
                {"w": weights(7, 70)},
            ),
            {},
            "left operand",
        ),
        (
            model(
                "g (float[2,3,70] x) => (float[2,3,7] y) { [op] y = MatMul (x, w) }",
                {"w": weights(2, 70, 7)},
            ),
            {},
            "3 dimensions",
        ),
    )

    @pytest.mark.parametrize(("proto", "options", "reason"), CASES)
    def test_with_a_reason_and_in_a_plan_by_hand(self, proto, options, reason):
        asked = {key: value for key, value in options.items() if key != "layout"}
        assert reason in refusal(proto, merged=options.get("layout") == "merged", **asked)
        with pytest.raises(ConfigError, match=f"'op' cannot have form nbits: .*{reason}"):
            expanded(proto, **options)

    def test_a_block_as_long_as_the_row_may_have_any_size(self):
        assert refusal(linear(20), block_size=24) is None
        assert kernels(expanded(linear(20), block_size=24)) == ["MatMulNBits"]
