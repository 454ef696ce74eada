"""What must hold after every pass: each rule with a graph that breaks it."""

from dataclasses import dataclass

import onnx_graphsurgeon as gs
import pytest
from small import conv_model, model, weights

from onnxq.errors import PassError
from onnxq.model import Model, constant, load
from onnxq.passes import PassResult, signature, verify
from onnxq.passes.verify import RULES
from onnxq.pipeline import apply


def chain() -> Model:
    """x -> a (Relu) -> b (Neg) -> y (Abs)."""
    return load(
        model(
            """g (float[2] x) => (float[2] y) {
                [one] a = Relu(x)
                [two] b = Neg(a)
                [three] y = Abs(b)
            }"""
        )
    )


def in_body() -> Model:
    return load(
        model("""g (bool p, float[2] x) => (float[2] y) {
            [if] y = If (p) <
                then_branch = t () => (float[2] a) { [neg] n = Neg(x) [abs] a = Abs(n) },
                else_branch = e () => (float[2] b) { [relu] b = Relu(x) }
            >
        }""")
    )


def same_node_name(model: Model) -> None:
    model.graph.nodes[1].name = "one"


def same_node_name_in_a_body(model: Model) -> None:
    model.graph.nodes[0].attrs["then_branch"].nodes[0].name = "relu"


def two_producers(model: Model) -> None:
    first = model.graph.nodes[0]
    model.graph.nodes.insert(
        0, gs.Node("Neg", "extra", inputs=list(first.inputs), outputs=list(first.outputs))
    )


def two_tensors_of_one_name(model: Model) -> None:
    model.graph.nodes[1].inputs[0] = gs.Variable("a")


def wrong_order(model: Model) -> None:
    model.graph.nodes.reverse()


def cycle(model: Model) -> None:
    model.graph.nodes[0].inputs[0] = model.graph.nodes[1].outputs[0]


def dangling_input(model: Model) -> None:
    model.graph.nodes[1].inputs[0] = gs.Variable("nowhere")


def dangling_input_in_a_body(model: Model) -> None:
    model.graph.nodes[0].attrs["then_branch"].nodes[1].inputs[0] = gs.Variable("nowhere")


def output_without_a_producer(model: Model) -> None:
    model.graph.nodes[2].outputs[0] = gs.Variable("elsewhere")


def another_output(model: Model) -> None:
    model.graph.outputs[0] = model.graph.nodes[1].outputs[0]


def renamed_output(model: Model) -> None:
    model.graph.outputs[0].name = "z"


def input_dropped(model: Model) -> None:
    made = constant("k", weights(2))
    model.graph.nodes[0].inputs[0] = made
    model.graph.inputs.clear()


def input_written(model: Model) -> None:
    model.graph.nodes[0].outputs[0].name = "x"


CASES = [
    (chain, input_written, "inputs are given, not produced", "Relu 'one' writes the input 'x'"),
    (chain, same_node_name, "unique node names", "2 nodes are named 'one'"),
    (in_body, same_node_name_in_a_body, "unique node names", "2 nodes are named 'relu'"),
    (chain, two_producers, "one producer per tensor", "tensor 'a' is produced by 2 nodes"),
    (
        chain,
        two_tensors_of_one_name,
        "one tensor per name",
        "two distinct tensors are named 'a'",
    ),
    (
        chain,
        wrong_order,
        "sorted, acyclic, nothing dangling",
        "Abs 'three' reads 'b', which no earlier node, input or initializer provides",
    ),
    (
        chain,
        cycle,
        "sorted, acyclic, nothing dangling",
        "Relu 'one' reads 'b', which no earlier node, input or initializer provides",
    ),
    (
        chain,
        dangling_input,
        "sorted, acyclic, nothing dangling",
        "Neg 'two' reads 'nowhere', which no earlier node, input or initializer provides",
    ),
    (
        in_body,
        dangling_input_in_a_body,
        "sorted, acyclic, nothing dangling",
        "Abs 'abs' reads 'nowhere', which no earlier node, input or initializer provides in "
        "if/then_branch",
    ),
    (
        chain,
        output_without_a_producer,
        "sorted, acyclic, nothing dangling",
        "output 'y' is not produced",
    ),
    (chain, another_output, "signature unchanged", "outputs changed from ['y'] to ['b']"),
    (chain, renamed_output, "signature unchanged", "outputs changed from ['y'] to ['z']"),
    (chain, input_dropped, "signature unchanged", "inputs changed from ['x'] to []"),
]


@pytest.mark.parametrize(("make", "break_", "rule", "fault"), CASES)
def test_reports(make, break_, rule, fault):
    broken = make()
    before = signature(broken)
    verify(broken, before, "Nothing")  # sound before
    break_(broken)
    with pytest.raises(PassError) as error:
        verify(broken, before, "MyPass")
    message = str(error.value)
    assert message.startswith(f"pass MyPass broke the graph ({rule}): ")
    assert fault in message
    assert message.endswith("This is a fault of onnxq: please report it with the model")


def test_every_rule_has_a_failing_example():
    assert {rule for _, _, rule, _ in CASES} == set(RULES)


@pytest.mark.parametrize("make", [chain, in_body, lambda: load(conv_model())])
def test_keeps_quiet_about_sound_graphs(make):
    sound = make()
    verify(sound, signature(sound), "Nothing")


def test_a_body_may_read_the_outer_graph_only_before_it():
    """What the main graph makes after the If is not there yet when the If runs."""
    loaded = load(
        model("""g (bool p, float[2] x) => (float[2] z) {
            [if] y = If (p) <
                then_branch = t () => (float[2] a) { [neg] a = Neg(x) },
                else_branch = e () => (float[2] b) { [relu] b = Relu(x) }
            >
            [late] z = Abs(y)
        }""")
    )
    before = signature(loaded)
    late = loaded.graph.nodes[1].outputs[0]
    loaded.graph.nodes[0].attrs["then_branch"].nodes[0].inputs[0] = late
    with pytest.raises(PassError, match="Neg 'neg' reads 'z', which no earlier node"):
        verify(loaded, before, "MyPass")


def test_the_pipeline_verifies_after_each_pass():
    @dataclass(frozen=True)
    class Breaks:
        def __call__(self, model: Model) -> PassResult:
            wrong_order(model)
            return PassResult(("one",))

    with pytest.raises(PassError, match=r"pass Breaks broke the graph \(sorted"):
        apply(Breaks(), chain())
