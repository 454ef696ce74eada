"""Truncating and extending files: whole or absent, with the terms that were there untouched."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from expanding import initializers
from onnx import numpy_helper
from small import feeds, model, run, weights

import onnxq
from onnxq.embedded_plan import KEY, embed_plan, embedded_plan
from onnxq.errors import ConfigError, ModelError, OnnxqError
from onnxq.model import get_properties, load, save, set_properties, to_proto
from onnxq.passes.truncate_terms import term_counts
from onnxq.plan import Plan
from onnxq.progressive import extend, truncate

NET = model(
    """g (float[2,3,8,8] x) => (float[2,5] y) {
        [conv] c = Conv (x, w, b)
        [relu] r = Relu (c)
        [conv2] d = Conv <group = 2> (r, u)
        [pool] p = GlobalAveragePool (d)
        [flat] f = Flatten (p)
        [fc] y = MatMul (f, v)
    }""",
    {
        "w": weights(16, 3, 3, 3),
        "b": weights(16, seed=1),
        "u": weights(16, 8, 3, 3, seed=5),
        "v": weights(16, 5, seed=2),
    },
)
KIN = model(
    """g (float[4,1,3] x) => (float[4,2,1,6] y) {
        [rnn] r = LSTM <hidden_size = 5, direction = "bidirectional"> (x, w, r0, b)
        [left] t = MatMul (k, r)
        [mm] y = MatMul (t, v)
    }""",
    {
        "w": weights(2, 20, 3),
        "r0": weights(2, 20, 5, seed=1),
        "b": weights(2, 40, seed=2),
        "k": weights(4, 2, 1, 1, seed=3),
        "v": weights(4, 2, 5, 6, seed=4),
    },
)
UP = model(
    "g (float[1,4,5,5] x) => (float[1,6,11,11] y) "
    "{ [up] y = ConvTranspose <strides = [2,2], group = 2> (x, w, b) }",
    {"w": weights(4, 3, 3, 3), "b": weights(6, seed=1)},
)
MODELS = {"net": NET, "kin": KIN, "up": UP}
FORMS = {
    "float parallel": {"activations": "none", "layout": "parallel"},
    "float merged": {"activations": "none", "layout": "merged"},
    "blocks": {"activations": "none", "layout": "parallel", "block_size": 4},
    "merged blocks": {"activations": "none", "layout": "merged", "block_size": 16},
    "matmul in 4 bits": {"activations": "none", "block_size": 32, "matmul": "nbits"},
    "dynamic": {"activations": "dynamic"},
    "dynamic, unsigned": {"activations": "dynamic", "target": "cpu-vnni", "weight_bits": 3},
    "activation terms": {"activations": "dynamic", "activation_terms": 2},
    "nibbles": {"activations": "none", "min_runtime": "1.20"},
    "dynamic nibbles": {"activations": "dynamic", "min_runtime": "1.20", "weight_bits": 3},
    "8 bits": {"activations": "dynamic", "weight_bits": 8},
}

KIN_FORMS = ("float parallel", "merged blocks", "matmul in 4 bits", "nibbles")
CASES = [
    *(("net", form) for form in FORMS),
    *(("kin", form) for form in KIN_FORMS),
    *(("up", form) for form in KIN_FORMS),
]


def quantized(proto: onnx.ModelProto, plan: Plan | None = None, **options) -> onnx.ModelProto:
    """A quantized model that holds its plan."""
    settings = {} if plan else {"offset": "off", "priors": False, **options}
    result = onnxq.quantize(proto, plan=plan, **settings)
    loaded = load(result.model)
    embed_plan(loaded, result.plan, equalized=options.get("equalize", False))
    return to_proto(loaded)


def written(path: Path, proto: onnx.ModelProto) -> Path:
    save(load(proto), path)
    return path


def stored(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Integers and scales by name."""
    return {
        name: numpy_helper.to_array(tensor)
        for name, tensor in initializers(proto).items()
        if "/term" in name and name.endswith(("/q", "/scale"))
    }


def assert_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    new = stored(after)
    for name, array in stored(before).items():
        np.testing.assert_array_equal(new[name], array, err_msg=name)


def assert_same_runs(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    feed = feeds(other)
    for optimize in (True, False):
        pairs = zip(
            run(one, feed, optimize=optimize), run(other, feed, optimize=optimize), strict=True
        )
        for got, want in pairs:
            np.testing.assert_array_equal(got, want)


class TestThereAndBack:
    @pytest.mark.parametrize(("name", "form"), CASES)
    def test_a_series_goes_on_as_it_began(self, name, form):
        """With the very terms that had been dropped."""
        proto = MODELS[name]
        whole = quantized(proto, terms=3, series="fixed_ratio", **FORMS[form])
        two = extend(truncate(whole, None, 1).model, proto, None, 2).model
        back = extend(two, proto, None, 3)
        assert_kept(two, back.model)
        assert_kept(whole, back.model)
        assert_same_runs(back.model, whole)

    @pytest.mark.parametrize("form", ["float merged", "dynamic", "nibbles", "merged blocks"])
    def test_digits_are_rounded_and_extended(self, form):
        whole = quantized(NET, terms=3, series="digit", **FORMS[form])
        one = truncate(whole, None, 1).model
        back = extend(one, NET, None, 3).model
        assert_kept(one, back)
        want = run(NET, feeds(NET))[0]
        cut, extended = (np.abs(run(m, feeds(NET))[0] - want).max() for m in (one, back))
        assert extended < cut / 10

    @pytest.mark.parametrize(
        "form", ["float parallel", "merged blocks", "matmul in 4 bits", "dynamic"]
    )
    def test_joint_scales_stay_and_the_error_falls(self, form):
        two = quantized(NET, terms=2, series="joint", **FORMS[form])
        three = extend(two, NET, None, 3)
        assert_kept(two, three.model)
        assert three.report.changed == dict.fromkeys(("conv", "conv2", "fc"), (2, 3))
        assert len(stored(three.model)) == len(stored(two)) / 2 * 3
        want = run(NET, feeds(NET))[0]
        errors = [np.abs(run(m, feeds(NET))[0] - want).max() for m in (two, three.model)]
        # dynamic activations in 8 bits leave an error that weights cannot mend
        assert errors[1] < errors[0] or form == "dynamic"

    def test_equalized_channels(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(NET)
        uneven = (
            weights(16, 3, 3, 3) * np.geomspace(1, 99, 16, dtype=np.float32)[:, None, None, None]
        )
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(uneven, "w"))
        options = {"activations": "none", "series": "fixed_ratio", "equalize": True}
        whole, one = (quantized(proto, terms=n, **options) for n in (2, 1))
        assert_same_runs(extend(one, proto, None, 2).model, whole)


class TestRoundedOtherwise:
    """Integers and biases as planning on samples leaves them."""

    def plan(self) -> Plan:
        plan = onnxq.quantize(NET, terms=1, activations="none", offset="off", priors=False).plan
        rng = np.random.default_rng(0)
        for node in plan.quantized:
            out = plan.scales[node.name][0].size
            shape = out, int(np.prod(node.shape)) // out
            plan.integers[node.name] = (rng.integers(-7, 8, shape).astype(np.int8),)
            plan.bias[node.name] = rng.standard_normal(out).astype(np.float32)
        return plan

    def test_they_stay_and_the_rest_follows(self):
        one = quantized(NET, self.plan())
        four = extend(one, NET, None, 5)
        assert_kept(one, four.model)
        assert not four.report.warnings
        want = run(NET, feeds(NET))[0]
        # integers at random: what they leave is up to 2 absmax, and falls by 14 with every term
        got = run(four.model, feeds(NET))[0]
        assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()

    def test_a_node_that_gets_no_terms_loses_its_correction_and_says_so(self):
        plan = self.plan()
        fc = plan["fc"].model_copy(update={"terms": 2})
        plan.nodes = [fc if node.name == "fc" else node for node in plan.nodes]
        del plan.scales["fc"], plan.integers["fc"]
        report = extend(quantized(NET, plan), NET, None, 2).report
        assert report.changed == {"conv": (1, 2), "conv2": (1, 2)}
        assert report.unchanged == 1
        assert [w.partition(" (")[0] for w in report.warnings] == [
            "1 nodes that had 2 terms before"
        ]


class TestFiles:
    def test_truncate(self, tmp_path):
        source = written(tmp_path / "q.onnx", quantized(NET, terms=3))
        result = truncate(source, tmp_path / "out.onnx", 2, data={"x": feeds(NET)["x"]})
        report = result.report
        assert result.path == tmp_path / "out.onnx"
        assert onnx.load(result.path) == result.model
        assert report.changed == dict.fromkeys(("conv", "conv2", "fc"), (3, 2))
        assert report.size_before == source.stat().st_size
        assert report.size_after == result.path.stat().st_size < report.size_before
        assert report.comparison.size_ratio == report.size_after / report.size_before
        assert report.comparison.outputs[0].relative_error > 0

    def test_extend(self, tmp_path):
        source = written(tmp_path / "q.onnx", quantized(NET, terms=1))
        floats = written(tmp_path / "float.onnx", NET)
        result = extend(source, floats, tmp_path / "out.onnx", 2)
        assert term_counts(load(result.path)) == dict.fromkeys(("conv", "conv2", "fc"), 2)
        assert result.report.size_after == result.path.stat().st_size

    def test_the_embedded_plan_follows(self):
        three = quantized(NET, terms=3)
        for proto, terms in ((three, 3), (truncate(three, None, 2).model, 2)):
            plan = embedded_plan(load(proto)).plan
            assert [(node.name, node.terms) for node in plan.nodes] == [
                ("conv", terms),
                ("conv2", terms),
                ("fc", terms),
            ]
        longer = extend(truncate(three, None, 1).model, NET, None, 4).model
        assert {node.terms for node in embedded_plan(load(longer)).plan.nodes} == {4}
        assert_kept(three, extend(three, NET, None, 4).model)

    def test_inspect_counts_what_is_there(self):
        result = truncate(quantized(NET, terms=3, activations="none"), None, 2)
        assert {node.terms for node in onnxq.inspect(result.model).quantized} == {2}
        result = extend(result.model, NET, None, 4)
        assert {node.terms for node in onnxq.inspect(result.model).quantized} == {4}

    def test_nothing_to_do_is_done_and_said(self):
        two = quantized(NET, terms=2)
        same = truncate(two, None, 2)
        assert same.model == two
        assert same.report.warnings == ("no node has more than 2 terms: nothing was dropped",)
        same = extend(two, NET, None, 2)
        assert same.model == two
        assert same.report.warnings == ("no node has fewer than 2 terms: nothing was added",)

    def test_the_input_is_left_alone(self):
        two = quantized(NET, terms=2)
        copy = onnx.ModelProto()
        copy.CopyFrom(two)
        truncate(two, None, 1)
        extend(two, NET, None, 3)
        assert two == copy


def refused(kind: type[OnnxqError], match: str):
    return pytest.raises(kind, match=match)


class TestRefusals:
    def test_not_quantized(self, tmp_path):
        path = written(tmp_path / "float.onnx", NET)
        for call in (lambda: truncate(path, None, 1), lambda: extend(path, NET, None, 2)):
            with refused(ModelError, r"float.onnx is not quantized by onnxq: use `onnxq quantize`"):
                call()

    @pytest.mark.parametrize("terms", [0, -1])
    def test_no_terms(self, terms):
        with refused(ConfigError, f"--terms {terms}: give 1 or more"):
            truncate(NET, None, terms)
        with refused(ConfigError, f"--terms {terms}: give 1 to 8"):
            extend(NET, NET, None, terms)

    def test_too_many_terms(self):
        with refused(ConfigError, "--terms 9: give 1 to 8"):
            extend(quantized(NET, terms=1), NET, None, 9)

    def test_other_weights(self, tmp_path):
        other = onnx.ModelProto()
        other.CopyFrom(NET)
        other.graph.initializer[2].CopyFrom(numpy_helper.from_array(weights(16, 8, 3, 3), "u"))
        path = written(tmp_path / "other.onnx", other)
        what = (
            r"other.onnx is not the model that the quantized one was made from: the weight of node "
        )
        with refused(ConfigError, what + "'conv2' has other values$"):
            extend(quantized(NET, terms=1), path, tmp_path / "out.onnx", 2)
        assert not (tmp_path / "out.onnx").exists()

    def test_another_model(self):
        with refused(ConfigError, "is not the model .*: it has no Conv node 'conv'$"):
            extend(quantized(NET, terms=1), UP, None, 2)

    @pytest.mark.parametrize("terms", [1, 2])
    def test_terms_in_one_integer(self, terms):
        one = quantized(NET, terms=terms, activations="dynamic", layout="merged")
        if terms == 1:  # as no other terms have been there before, the first is no digit
            assert embedded_plan(load(one)).plan["conv"].series == "fixed_ratio"
        advice = "node 'conv' takes no further terms: .* --layout parallel, or with --activations"
        with refused(ConfigError, advice):
            extend(one, NET, None, 3)

    def test_no_plan_in_the_file(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(quantized(NET, terms=1))
        del proto.metadata_props[:]
        with refused(ConfigError, "does not hold the plan that it was made with"):
            extend(proto, NET, None, 2)
        assert truncate(proto, None, 1).report.unchanged == 3

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"nodes": 3}', "null"])
    def test_a_damaged_plan(self, text):
        loaded = load(quantized(NET, terms=2))
        set_properties(loaded, {KEY: text})
        for call in (truncate, lambda m, o, n: extend(m, NET, o, n + 2)):
            with refused(ModelError, "onnxq.plan. is damaged"):
                call(to_proto(loaded), None, 1)

    def test_a_plan_of_other_terms(self):
        loaded = load(quantized(NET, terms=2))
        document = json.loads(get_properties(loaded)[KEY])
        document["common"]["terms"] = 3
        set_properties(loaded, {KEY: json.dumps(document)})
        with refused(ModelError, r"node 'conv' is not as .* \(term 2 is not there\)"):
            extend(to_proto(loaded), NET, None, 4)

    @pytest.mark.parametrize("name", ["q.onnx", "float.onnx"])
    def test_no_input_is_overwritten(self, tmp_path, name):
        source = written(tmp_path / "q.onnx", quantized(NET, terms=2))
        floats = written(tmp_path / "float.onnx", NET)
        before = (tmp_path / name).read_bytes()
        with refused(ConfigError, "would overwrite"):
            extend(source, floats, tmp_path / name, 3)
        assert (tmp_path / name).read_bytes() == before

    @pytest.mark.parametrize("what", ["centre", "offset", "points"])
    def test_terms_of_a_part(self, what):
        loaded = load(quantized(NET, terms=2))
        plan = embedded_plan(loaded).plan
        plan.nodes[0] = plan.nodes[0].model_copy(update={what: True} if what != "points" else {})
        if what == "points":
            plan.points["conv"] = np.ones(16, np.int8)
        embed_plan(loaded, plan)
        with refused(ConfigError, "node 'conv' was made with terms of some channels or taps only"):
            extend(to_proto(loaded), NET, None, 3)


class TestProperties:
    def test_others_stay(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(NET)
        proto.metadata_props.add(key="author", value="somebody")
        loaded = load(proto)
        set_properties(loaded, {"a": "1"})
        set_properties(loaded, {"a": "2", "b": ""})
        want = {"author": "somebody", "a": "2", "b": ""}
        assert get_properties(load(to_proto(loaded))) == want
        assert get_properties(load(proto)) == {"author": "somebody"}

    def test_a_plan_comes_back(self):
        plan = onnxq.quantize(NET, terms=2, exclude=["conv2"]).plan
        loaded = load(NET)
        plan.bias["fc"] = np.zeros(5, np.float32)
        embed_plan(loaded, plan, equalized=True)
        found = embedded_plan(load(to_proto(loaded)))
        assert found.plan.nodes == [n.model_copy(update={"note": None}) for n in plan.quantized]
        assert found.equalized
        assert found.corrected == {"fc"}
