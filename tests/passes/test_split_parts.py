"""The graph side of `split`: which Adds are sums of terms, and what each part and stage holds."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import onnx
import pytest
from expanding import gamma, metadata
from small import feeds, model, run, weights
from splitting import chain, quantized, run_split, split

from onnxq.errors import ConfigError, ModelError
from onnxq.model import load, set_metadata, to_proto
from onnxq.passes.split_parts import SplitModel
from onnxq.passes.term_sums import find_sums

MODES = ["dynamic", "none"]


def terms_of(proto: onnx.ModelProto) -> dict[str, list[int]]:
    return {found.node: [a.term for a in found.addends] for found in find_sums(load(proto))}


def protos(made: SplitModel, part: int) -> list[onnx.ModelProto]:
    return [to_proto(stages[part].model) for stages in made.stages if stages[part].model]


def ops(made: SplitModel, part: int) -> list[Counter[str]]:
    return [Counter(n.op_type for n in proto.graph.node) for proto in protos(made, part)]


def basis(made: SplitModel, part: int) -> set[tuple[str, str]]:
    """(node, term) of the basis nodes that a part holds."""
    marks = [metadata(n) for proto in protos(made, part) for n in proto.graph.node]
    return {(m["onnxq.node"], m["onnxq.term"]) for m in marks if "onnxq.term" in m}


# --- sums


@pytest.mark.parametrize("activations", MODES)
def test_the_sum_of_the_terms_is_found_without_the_bias(activations: str) -> None:
    proto = quantized(chain(), 3, activations=activations)
    assert terms_of(proto) == {"one": [0, 1, 2], "two": [0, 1, 2]}
    for found in find_sums(load(proto)):
        assert found.adds[-1].name == f"{found.node}/sum"
        assert len(found.adds) == 2


@pytest.mark.parametrize("options", [{"terms": 1}, {"terms": 2, "layout": "merged"}])
@pytest.mark.parametrize("activations", MODES)
def test_one_term_and_merged_terms_are_no_sum(activations: str, options: dict[str, object]) -> None:
    assert terms_of(quantized(chain(), activations=activations, **options)) == {}  # type: ignore[arg-type]


def marked(labels: list[tuple[str, str | None]]) -> list[int]:
    """Terms that are found for hand-made basis nodes with these marks, added up in a chain."""
    lines, total = "", "t0"
    for i in range(len(labels)):
        lines += f"[b{i}] t{i} = Mul (x, x)\n"
    for i in range(1, len(labels)):
        after = "y" if i == len(labels) - 1 else f"s{i}"
        lines += f"[a{i}] {after} = Add ({total}, t{i})\n"
        total = after
    loaded = load(model(f"g (float[2] x) => (float[2] y) {{ {lines} }}"))
    for node in loaded.graph.nodes:
        set_metadata(node, {"onnxq.node": "n"})
        if node.op == "Mul":
            term, activation = labels[int(node.name[1:])]
            set_metadata(node, {"onnxq.term": term})
            if activation is not None:
                set_metadata(node, {"onnxq.activation_term": activation})
    (found,) = find_sums(loaded)
    return [addend.term for addend in found.addends]


@pytest.mark.parametrize(
    ("labels", "terms"),
    [
        ([("1", None), ("0", None)], [1, 0]),
        ([("0", "0"), ("0", "1"), ("1", "0")], [0, 0, 1]),  # by the weight's term
        ([("0", "0"), ("0", "1"), ("0", "2")], [0, 1, 2]),  # the weight has one
        ([("0+1", "0"), ("0+1", "1")], [0, 1]),
        ([("a", None), ("b", None), ("0", None)], [0, 1, 2]),  # by place
    ],
)
def test_the_term_of_a_product(labels: list[tuple[str, str | None]], terms: list[int]) -> None:
    assert marked(labels) == terms


# --- parts and stages


@pytest.mark.parametrize("activations", MODES)
def test_each_part_holds_the_terms_of_its_index(activations: str) -> None:
    made = split(quantized(chain(), 3, activations=activations), parts=2)
    nodes = ("one", "two")
    assert basis(made, 0) == {(node, term) for node in nodes for term in "02"}
    assert basis(made, 1) == {(node, "1") for node in nodes}


def test_parts_are_isomorphic() -> None:
    made = split(quantized(chain(), 3), parts=3)
    assert ops(made, 0) == ops(made, 1) == ops(made, 2)


def test_nothing_but_the_terms_lies_before_a_sum() -> None:
    """Bias, Relu and residual come after it: the nonlinearity sees the whole sum."""
    made = split(quantized(chain()))
    assert [len(sums) for sums in made.sums] == [1, 1, 0]
    first, second, third = ops(made, 1)
    assert first["ConvInteger"] == second["ConvInteger"] == 1
    assert {"Add", "Relu"}.isdisjoint(first)
    assert (second["Add"], second["Relu"]) == (1, 1)  # the bias
    assert third == {"Add": 2}  # bias and residual
    inputs = [set(stage[1].inputs) for stage in made.stages]
    assert inputs == [{"x"}, {"one/sum"}, {"two/sum", "r"}]
    assert made.stages[1][1].outputs == ("two/term1/rescaled", "r")
    assert made.shapes == {"one/sum": (1, 3, 6, 6), "two/sum": (1, 3, 6, 6)}


def test_sums_that_do_not_wait_for_each_other_share_a_stage() -> None:
    proto = model(
        """g (float[4,6] x) => (float[4,6] y) {
            [q] q = MatMul (x, wq)
            [k] k = MatMul (x, wk)
            [v] v = MatMul (x, wv)
            qk = Mul (q, k)
            y = Mul (qk, v)
        }""",
        {f"w{name}": weights(6, 6, seed=i) for i, name in enumerate("qkv")},
    )
    made = split(quantized(proto))
    assert [len(sums) for sums in made.sums] == [3, 0]


def test_constants_are_repeated_not_handed_on() -> None:
    """A weight that two stages read is brought to its type in both, where onnxruntime folds it."""
    proto = model(
        """g (float[4,6] x) => (float[4,6] y) {
            [one] a = MatMul (x, w)
            r = Relu (a)
            [two] y = MatMul (r, w)
        }""",
        {"w": weights(6, 6)},
    )
    made = split(quantized(proto, activations="none"))
    assert [count["Cast"] for count in ops(made, 0)] == [1, 1]
    assert made.stages[1][0].inputs == ("a",)


def test_an_output_may_be_a_sum_an_input_or_early() -> None:
    proto = model(
        """g (float[4,6] x) => (float[4,6] a, float[4,6] r, float[4,6] y, float[4,6] z) {
            r = Relu (x)
            [one] a = MatMul (x, w)
            b = Relu (a)
            [two] y = MatMul (b, w)
            z = Identity (x)
        }""",
        {"w": weights(6, 6)},
    )
    whole = quantized(proto)
    made = split(whole)
    assert len(made.stages) == 2
    feed = feeds(whole)
    for got, want in zip(
        run_split(made, feed, ["a", "r", "y", "z"]), run(whole, feed, optimize=False), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_bodies_are_computed_whole_and_read_sums_around_them() -> None:
    proto = model(
        """g (bool p, float[4,6] x) => (float[4,6] y) {
            [one] a = MatMul (x, w)
            [if] b = If (p) <
                then_branch = t () => (float[4,6] yt) { [inner] yt = MatMul (a, w) },
                else_branch = e () => (float[4,6] ye) { ye = Relu (a) }
            >
            [two] y = MatMul (b, w)
        }""",
        {"w": weights(6, 6)},
    )
    whole = quantized(proto)
    assert set(terms_of(whole)) == {"one", "two"}
    made = split(whole)
    assert set(made.stages[1][1].inputs) == {"a", "p"}
    for p in (True, False):
        feed = {"p": np.array(p), "x": weights(4, 6, seed=3)}
        (got,) = run_split(made, feed, ["y"])
        np.testing.assert_array_equal(got, run(whole, feed, optimize=False)[0])


def test_a_sequence_is_made_again_in_each_stage_that_reads_it() -> None:
    proto = model(
        """g (float[4,6] x) => (float[4,6] y) {
            zero = Constant <value = int64 {0}> ()
            r = Relu (x)
            list = SequenceConstruct (r, x)
            [one] a = MatMul (x, w)
            first = SequenceAt (list, zero)
            y = Add (a, first)
            s = SequenceLength (list)
        }""",
        {"w": weights(6, 6)},
    )
    text = quantized(proto)
    made = split(text)
    # SequenceAt waits for no sum: its result is handed on, the sequence stays where it is
    assert "first" in made.stages[1][0].inputs
    assert "list" not in made.stages[1][0].inputs
    feed = feeds(text)
    np.testing.assert_array_equal(
        run_split(made, feed, ["y"])[0], run(text, feed, optimize=False)[0]
    )


# --- the sum


@pytest.mark.parametrize("activations", MODES)
@pytest.mark.parametrize("terms", [2, 3])
def test_parts_in_order_give_the_bits_of_the_single_file(activations: str, terms: int) -> None:
    whole = quantized(chain(), terms, activations=activations)
    made = split(whole, parts=terms)
    feed = feeds(whole)
    (got,) = run_split(made, feed, ["y"])
    np.testing.assert_array_equal(got, run(whole, feed, optimize=False)[0])


def test_two_parts_may_be_added_either_way() -> None:
    """a + b = b + a, bit for bit."""
    whole = quantized(chain())
    made = split(whole)
    feed = feeds(whole)
    (got,) = run_split(made, feed, ["y"], total=lambda partials: partials[1] + partials[0])
    np.testing.assert_array_equal(got, run(whole, feed, optimize=False)[0])


def test_any_order_is_right_to_float_rounding() -> None:
    """Abelian: each order of n float32 addends is within gamma(n - 1) · Σ|addend| of the sum.

    One node, so that no later quantization tells the roundings apart; the bias is one more Add,
    Relu none.
    """
    proto = model(
        """g (float[4,8] x) => (float[4,8] y) {
            [one] a = MatMul (x, w)
            c = Add (a, b)
            y = Relu (c)
        }""",
        {"w": weights(8, 8), "b": weights(8, seed=1)},
    )
    whole = quantized(proto, 4)
    made = split(whole, parts=4)
    feed = feeds(whole)
    seen: list[np.ndarray] = []
    run_split(made, feed, ["y"], total=lambda partials: seen.extend(partials) or partials[0])
    shares = np.stack(seen[:4]).astype(np.float64)
    exact = np.maximum(shares.sum(0) + weights(8, seed=1), 0)
    limit = gamma(4) * (np.abs(shares).sum(0) + np.abs(weights(8, seed=1)))
    found = set()
    for order in permutations(range(4)):

        def total(partials: list[np.ndarray], order: tuple[int, ...] = order) -> np.ndarray:
            first, *rest = (partials[i] for i in order)
            return sum(rest, first)

        (got,) = run_split(made, feed, ["y"], total=total)
        assert (np.abs(got - exact) <= limit).all()
        found.add(got.tobytes())
    assert len(found) > 1, "the orders are all the same: nothing was tested"


def test_a_part_with_fewer_terms_adds_nothing() -> None:
    whole = quantized(chain(), {"one": 3, "two": 2})
    made = split(whole, parts=3)
    assert made.stages[1][2].partials == {}
    feed = feeds(whole)
    (got,) = run_split(made, feed, ["y"])
    np.testing.assert_array_equal(got, run(whole, feed, optimize=False)[0])


def test_nodes_of_one_term_are_computed_by_every_part() -> None:
    made = split(quantized(chain(), {"one": 1, "two": 2}))
    assert len(made.stages) == 2
    assert basis(made, 0) == {("one", "0"), ("two", "0")}
    assert basis(made, 1) == {("one", "0"), ("two", "1")}


# --- refusals


@pytest.mark.parametrize(
    ("parts", "message"),
    [(1, "--parts 1: must be 2 or more"), (3, "--parts 3: no node has more than 2 terms")],
)
def test_bad_numbers_of_parts(parts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(quantized(chain()), parts)


@pytest.mark.parametrize("options", [{"layout": "merged"}, {"terms": 1}])
def test_a_model_without_parallel_terms(options: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"no parallel basis nodes.*--layout parallel"):
        split(quantized(chain(), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lines",
    ["n = RandomNormalLike (x)", "yes = Constant <value = bool {1}> () n = Dropout (x, , yes)"],
)
def test_random_numbers(lines: str) -> None:
    proto = model(
        f"""g (float[4,6] x) => (float[4,6] y) {{
            {lines}
            z = Add (n, x)
            [one] y = MatMul (z, w)
        }}""",
        {"w": weights(6, 6)},
    )
    with pytest.raises(ModelError, match="draws random numbers"):
        split(quantized(proto))


UNKNOWN_RANK = """g (float[4,6] x, int64[N] s) => (float[4,6] y) {
    q = Reshape (x, s)
    [one] a = MatMul (x, w)
    y = Add (q, a)
}"""


def test_a_tensor_of_unknown_rank_at_a_cut() -> None:
    proto = quantized(model(UNKNOWN_RANK, {"w": weights(6, 6)}))
    with pytest.raises(ModelError, match="rank of tensor 'q' cannot be inferred"):
        split(proto)


def test_a_declared_rank_does_where_none_is_inferred() -> None:
    proto = model(UNKNOWN_RANK, {"w": weights(6, 6)})
    proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info("q", onnx.TensorProto.FLOAT, [None, None])
    )
    whole = quantized(proto)
    feed = {"x": weights(4, 6), "s": np.array([4, 6])}
    (got,) = run_split(split(whole), feed, ["y"])
    np.testing.assert_array_equal(got, run(whole, feed, optimize=False)[0])
