"""Dropping terms from an expanded model: what is left is what fewer terms would have given."""

import numpy as np
import onnx
import pytest
from expanding import basis_nodes, expand, gamma, initializers, metadata, names, node, nodes
from small import feeds, model, run, weights

import onnxq
from onnxq.errors import ModelError
from onnxq.kernels_ref import half_range
from onnxq.model import load, to_proto
from onnxq.passes.truncate_terms import TruncateTerms, term_counts
from onnxq.pipeline import apply
from onnxq.plan import Plan


def truncated(proto: onnx.ModelProto, terms: int, plan: Plan | None = None) -> onnx.ModelProto:
    """The model with fewer terms; verified by the pipeline, checked by onnx."""
    loaded = load(proto)
    apply(TruncateTerms(terms, plan), loaded)
    after = to_proto(loaded)
    onnx.checker.check_model(after, full_check=True)
    return after


NET = model(
    """g (float[2,3,8,8] x) => (float[2,5] y) {
        [conv] c = Conv (x, w, b)
        [relu] r = Relu (c)
        [pool] p = GlobalAveragePool (r)
        [flat] f = Flatten (p)
        [fc] y = MatMul (f, v)
    }""",
    {"w": weights(16, 3, 3, 3), "b": weights(16, seed=1), "v": weights(16, 5, seed=2)},
)
MODELS = {
    "conv and matmul": NET,
    "grouped, no bias": model(
        "g (float[1,4,8,8] x) => (float[1,8,6,6] y) { [op] y = Conv <group = 2> (x, w) }",
        {"w": weights(8, 2, 3, 3)},
    ),
    "computed bias": model(
        """g (float[1,3,8,8] x, float[4] b) => (float[1,4,6,6] y) {
            [twice] d = Add (b, b)
            [op] y = Conv (x, w, d)
        }""",
        {"w": weights(4, 3, 3, 3)},
    ),
    "conv transpose": model(
        """g (float[1,4,5,5] x) => (float[1,6,11,11] y) {
            [op] y = ConvTranspose <strides = [2,2], group = 2> (x, w, b)
        }""",
        {"w": weights(4, 3, 3, 3), "b": weights(6, seed=1)},
    ),
    "batched matmul": model(
        "g (float[2,3,7] x) => (float[2,3,4] y) { [op] y = MatMul (x, w) }",
        {"w": weights(2, 7, 4)},
    ),
    "constant on the left": model(
        "g (float[2,7,3] x) => (float[2,4,3] y) { [op] y = MatMul (w, x) }",
        {"w": weights(2, 4, 7)},
    ),
    "lstm": model(
        """g (float[4,1,3] x) => (float[4,2,1,5] y) {
            [op] y = LSTM <hidden_size = 5, direction = "bidirectional"> (x, w, r, b)
        }""",
        {"w": weights(2, 20, 3), "r": weights(2, 20, 5, seed=1), "b": weights(2, 40, seed=2)},
    ),
    "shared weight": model(
        """g (float[1,3,8,8] x) => (float[1,3,4,4] y, float[1,3,6,6] c) {
            [one] c = Conv (x, w, b)
            [two] y = Conv (c, w)
        }""",
        {"w": weights(3, 3, 3, 3), "b": weights(3, seed=1)},
    ),
    "bodies": model(
        """g (bool p, float[1,3,8,8] x) => (float[1,3,8,8] y) {
            [if] y = If (p) <
                then_branch = t () => (float[1,3,8,8] yt) {
                    [one] yt = Conv <pads = [1,1,1,1]> (x, w, b)
                },
                else_branch = e () => (float[1,3,8,8] ye) {
                    [relu] r = Relu (x)
                    [two] ye = Conv <pads = [1,1,1,1]> (r, w, b)
                }
            >
        }""",
        {"w": weights(3, 3, 3, 3), "b": weights(3, seed=1)},
    ),
}
LOOP = model(
    """g (float[1,3,8,8] x, int64 n, bool go) => (float[1,3,8,8] y) {
        [loop] y = Loop (n, go, x) <
            body = b (int64 i, bool c, float[1,3,8,8] s) => (bool d, float[1,3,8,8] t) {
                [cond] d = Identity (c)
                [conv] t = Conv <pads = [1,1,1,1]> (s, w, b)
            }
        >
    }""",
    {"w": weights(3, 3, 3, 3, scale=0.2), "b": weights(3, seed=1)},
)
TABLE = model(
    """g (int64[2,3] ids) => (float[2,3,4] y) {
        [table] e = Gather (t, ids)
        [fc] y = MatMul (e, w)
    }""",
    {"t": weights(10, 8), "w": weights(8, 4, seed=1)},
)
FORMS = {
    "float parallel": {"activations": "none"},
    "float merged": {"activations": "none", "layout": "merged"},
    "float parallel, blocks": {"activations": "none", "block_size": 4},
    "float merged, blocks": {"activations": "none", "layout": "merged", "block_size": 4},
    "dynamic": {"activations": "dynamic"},
    "activation terms": {"activations": "dynamic", "activation_terms": 2, "products": "all"},
    "nibbles": {"activations": "none", "min_runtime": "1.20"},
    "nibbles, dynamic": {"activations": "dynamic", "min_runtime": "1.20", "weight_bits": 3},
    "8 bits": {"activations": "dynamic", "weight_bits": 8},
    "matmul in 4 bits": {"activations": "none", "block_size": 16, "matmul": "nbits"},
}


def assert_equal_runs(one: onnx.ModelProto, other: onnx.ModelProto, **feed: np.ndarray) -> None:
    feed = {**feeds(other), **feed}
    for optimize in (False, True):
        pairs = zip(
            run(one, feed, optimize=optimize), run(other, feed, optimize=optimize), strict=True
        )
        for got, want in pairs:
            np.testing.assert_array_equal(got, want)


def quantized(proto: onnx.ModelProto, terms: int, **options) -> onnx.ModelProto:
    settings = {"series": "fixed_ratio", "priors": False, **options}
    return onnxq.quantize(proto, terms=terms, **settings).model


class TestEqualsFewerTerms:
    """The first terms of a fixed_ratio series do not depend on those after them."""

    @pytest.mark.parametrize("form", list(FORMS))
    @pytest.mark.parametrize("name", list(MODELS))
    def test_two_of_three(self, name, form):
        proto, options = MODELS[name], FORMS[form]
        got = truncated(quantized(proto, 3, **options), 2)
        assert_equal_runs(got, quantized(proto, 2, **options))

    @pytest.mark.parametrize("form", list(FORMS))
    def test_one_of_two(self, form):
        got = truncated(quantized(NET, 2, **FORMS[form]), 1)
        assert_equal_runs(got, quantized(NET, 1, **FORMS[form]))

    @pytest.mark.parametrize("form", ["float parallel", "float merged", "dynamic"])
    def test_in_a_loop(self, form):
        got = truncated(quantized(LOOP, 3, **FORMS[form]), 2)
        feed = {"n": np.array(3), "go": np.array(True)}
        assert_equal_runs(got, quantized(LOOP, 2, **FORMS[form]), **feed)

    def test_embeddings(self):
        options = {"activations": "none", "embeddings": True}
        feed = {"ids": np.array([[0, 3, 9], [1, 1, 2]])}
        got = truncated(quantized(TABLE, 3, **options), 1)
        assert_equal_runs(got, quantized(TABLE, 1, **options), **feed)

    @pytest.mark.parametrize("form", list(FORMS))
    def test_size(self, form):
        """Names alone may be longer: `conv/sum1` for `conv/sum`, `conv/term0` for `conv`."""
        whole, options = quantized(NET, 3, **FORMS[form]), FORMS[form]
        for terms in (1, 2):
            want = quantized(NET, terms, **options).ByteSize()
            # per node a name, written where it is made and where metadata say it
            assert abs(truncated(whole, terms).ByteSize() - want) <= 2 * 20
        integers = (16 * 3 * 3 * 3 + 16 * 5) // 2  # of one term of both weights, packed
        assert truncated(whole, 1).ByteSize() <= whole.ByteSize() - 2 * integers


class TestDigits:
    @pytest.mark.parametrize("bits", [3, 4])
    @pytest.mark.parametrize("layout", ["merged", "parallel"])
    def test_float_compute_within_half_a_step(self, bits, layout):
        proto = model(
            "g (float[4,33] x) => (float[4,16] y) { [op] y = MatMul (x, w) }",
            {"w": weights(33, 16)},
        )
        whole, plan = expand(proto, activations="none", bits=bits, terms=3, layout=layout)
        assert plan["op"].series == "digit"
        x = feeds(proto)["x"]
        want = run(whole, {"x": x}, optimize=False)[0]
        for terms in (2, 1):
            got = run(truncated(whole, terms, plan), {"x": x}, optimize=False)[0]
            reach = np.abs(x).sum(1)[:, None]
            dropped = plan.scales["op"][terms - 1] / 2
            slack = 2 * gamma(33 + 4) * reach * half_range(bits) * sum(plan.scales["op"]) * 2
            assert (np.abs(got - want) <= reach * dropped + slack).all()
            assert np.abs(got - want).max() > 0
            # without the plan the digits are cut off: up to a whole step more
            cut = run(truncated(whole, terms), {"x": x}, optimize=False)[0]
            assert (np.abs(cut - want) <= 2.2 * reach * dropped + slack).all()

    def test_rounding_does_not_lean(self):
        """The mean error of cut digits is 1/32 step per weight; of rounded ones next to none."""
        proto = model(
            "g (float[1,4096] x) => (float[1,16] y) { [op] y = MatMul (x, w) }",
            {"w": weights(4096, 16)},
        )
        whole, plan = expand(proto, activations="none", bits=4, terms=2)
        ones = {"x": np.ones((1, 4096), np.float32)}
        step = plan.scales["op"][0] * 4096
        want = run(whole, ones)[0]
        cut, rounded = (
            (run(truncated(whole, 1, given), ones)[0] - want)[0] / step for given in (None, plan)
        )
        assert abs(cut.mean() * 32 + 1) < 0.2 or abs(cut.mean() * 32 - 1) < 0.2
        # 65536 independent errors of at most half a step each: 5 standard deviations
        assert abs(rounded.mean()) < 5 * 0.5 / np.sqrt(65536)

    @pytest.mark.parametrize("name", ["conv and matmul", "grouped, no bias", "bodies"])
    @pytest.mark.parametrize("terms", [1, 2])
    @pytest.mark.parametrize("bits", [2, 3])
    def test_digits_in_one_integer_and_in_several(self, name, terms, bits):
        """q0·2**X·s1 and q0·s0 are one number, s0 being s1·2**X, and both ways add in int32."""
        options = {"series": "digit", "weight_bits": bits, "activations": "dynamic"}
        whole = 3 if bits == 2 else 2
        if terms == whole:
            pytest.skip("nothing to drop")
        feed, outputs = feeds(MODELS[name]), []
        for layout in ("merged", "parallel"):
            result = onnxq.quantize(MODELS[name], terms=whole, layout=layout, **options)
            cut = truncated(result.model, terms, result.plan)
            outputs.append(run(cut, feed, optimize=False))
        for a, b in zip(*outputs, strict=True):
            # bit for bit where one product is left; else float sums of two products
            scale = np.abs(a).max()
            np.testing.assert_allclose(b, a, rtol=0, atol=0 if terms == 1 else 1e-5 * scale)

    @pytest.mark.parametrize("form", ["nibbles", "nibbles, dynamic", "8 bits", "lstm", "blocks"])
    def test_rounded_in_every_packing(self, form):
        """Whatever the form, the numbers are those of the plain one."""
        options = {"lstm": {"activations": "none"}, "blocks": FORMS["float merged, blocks"]}
        given = {"series": "digit", "terms": 2, **(options.get(form) or FORMS[form])}
        proto = MODELS["lstm" if form == "lstm" else "conv and matmul"]
        plain = {**given, "min_runtime": "1.24"}
        models = []
        for each in (given, plain):
            result = onnxq.quantize(proto, **each)
            models.append(truncated(result.model, 1, result.plan))
        if given.get("activations") == "none":
            assert_equal_runs(*models)
        for made in models:
            assert [q for q in initializers(made) if q.endswith("term0/q")]

    def test_both_optimisation_levels_agree(self):
        options = {"series": "digit", "weight_bits": 2, "activations": "dynamic"}
        got = truncated(quantized(NET, 3, layout="merged", **options), 2)
        feed = feeds(NET)
        a, b = (run(got, feed, optimize=optimize)[0] for optimize in (True, False))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


class TestWhatIsLeft:
    @pytest.mark.parametrize("form", list(FORMS))
    def test_nothing_of_the_dropped_terms(self, form):
        whole = quantized(NET, 3, **FORMS[form])
        after = truncated(whole, 1)
        assert any("/term1" in name for name in initializers(whole))
        assert not [name for name in initializers(after) if "/term1" in name or "/term2" in name]
        assert len(names(after)) == len(set(names(after)))
        read = {name for found in nodes(after.graph) for name in found.input}
        assert read >= set(initializers(after))

    @pytest.mark.parametrize("form", list(FORMS))
    def test_tensors_of_the_original_keep_their_names(self, form):
        after = truncated(quantized(NET, 3, **FORMS[form]), 1)
        written = {name for found in after.graph.node for name in found.output}
        assert {"c", "r", "p", "f", "y"} <= written
        assert [i.name for i in after.graph.input] == ["x"]
        assert [o.name for o in after.graph.output] == ["y"]

    @pytest.mark.parametrize("form", list(FORMS))
    def test_inspect_counts_them(self, form):
        whole = quantized(NET, 3, **FORMS[form])
        for terms in (2, 1):
            after = truncated(whole, terms)
            assert term_counts(load(after)) == {"conv": terms, "fc": terms}
            found = onnxq.inspect(after).quantized
            assert [node.name for node in found] == ["conv", "fc"]

    @pytest.mark.parametrize("form", list(FORMS))
    def test_in_steps_and_again(self, form):
        whole = quantized(NET, 3, **FORMS[form])
        at_once = truncated(whole, 1)
        assert truncated(truncated(whole, 2), 1) == at_once
        assert truncated(at_once, 1) == at_once
        loaded = load(at_once)
        assert not apply(TruncateTerms(1), loaded).modified

    def test_nodes_with_fewer_terms_stay(self):
        _, plan = expand(NET, activations="none", bits=4, terms=3)
        entry = plan["fc"].model_copy(update={"terms": 1})
        plan.nodes[[n.name for n in plan.nodes].index("fc")] = entry
        del plan.scales["fc"]
        whole, _ = expand(NET, plan)
        loaded = load(whole)
        result = apply(TruncateTerms(2), loaded)
        assert result.rewritten == ("conv",)
        assert term_counts(loaded) == {"conv": 2, "fc": 1}
        assert node(to_proto(loaded), "fc") == node(whole, "fc")

    def test_metadata_of_merged_terms(self):
        whole, _ = expand(NET, activations="none", bits=4, terms=3, layout="merged")
        for terms, label in ((2, "0+1"), (1, "0")):
            (basis,) = basis_nodes(truncated(whole, terms), "conv")
            assert metadata(basis)["onnxq.term"] == label

    def test_dead_nodes_of_the_user_stay(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(quantized(NET, 2, activations="none"))
        proto.graph.node.append(onnx.helper.make_node("Relu", ["x"], ["unread"], name="mine"))
        assert "mine" in names(truncated(proto, 1))


class TestChangedFiles:
    def test_a_merged_sum_without_its_mark(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(quantized(NET, 2, activations="none", layout="merged"))
        for found in proto.graph.node:
            if found.op_type == "Add":
                del found.metadata_props[:]
        with pytest.raises(ModelError, match=r"node 'conv' says that it holds term 0\+1"):
            TruncateTerms(1)(load(proto))

    def test_a_parallel_sum_without_its_mark(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(quantized(NET, 2, activations="none"))
        for found in proto.graph.node:
            if found.name == "fc/sum":
                del found.metadata_props[:]
        loaded = load(proto)
        with pytest.raises(ModelError, match=r"node 'fc/term1' .* was changed since"):
            TruncateTerms(1)(loaded)
        assert to_proto(loaded) == proto  # nothing was cut before that was found


def test_outlier_columns_lose_their_terms_too():
    """The float product of the outlier columns holds the kept terms alone."""
    plan = onnxq.quantize(NET, terms=3, series="fixed_ratio").plan
    entry = plan["fc"].model_copy(update={"outliers": (1, 4)})
    plan.nodes = [entry if node.name == "fc" else node for node in plan.nodes]
    whole = onnxq.quantize(NET, plan=plan).model
    nodes = [node.model_copy(update={"terms": 2}) for node in plan.nodes]
    two = plan.model_copy(
        update={"nodes": nodes, "scales": {k: v[:2] for k, v in plan.scales.items()}}
    )
    assert_equal_runs(truncated(whole, 2), onnxq.quantize(NET, plan=two).model)
    packed = (16 * 3 * 3 * 3 + 16 * 5) // 2
    assert truncated(whole, 2).ByteSize() <= whole.ByteSize() - packed
