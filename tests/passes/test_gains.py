"""Which nodes are computed in integers where the user does not say."""

from __future__ import annotations

import onnx
import pytest
from small import conv_model, model, weights

from onnxq.model import load
from onnxq.passes import SelectNodes
from onnxq.passes.forms import TARGETS
from onnxq.passes.gains import BREAK_EVEN, GAINS, gains_everywhere
from onnxq.plan import Plan, Target

LARGE = (320, 320)
EVERY = ("cpu-vnni", "cpu-arm")


def behind_a_conv(channels: int, inputs: int, outputs: int) -> onnx.ModelProto:
    """A Conv 3×3 of so many channels, the mean of each, and two MatMul behind."""
    return model(
        f"""g (float[N,{channels},8,8] x) => (float[N,{outputs}] y) {{
            [conv] a = Conv <pads = [1,1,1,1]> (x, w)
            p = GlobalAveragePool (a)
            f = Flatten (p)
            [small] b = MatMul (f, s)
            r = Relu (b)
            [large] y = MatMul (r, v)
        }}""",
        {
            "w": weights(channels, channels, 3, 3, scale=0.1),
            "s": weights(channels, inputs, seed=1),
            "v": weights(inputs, outputs, seed=2, scale=0.1),
        },
    )


def select(proto: onnx.ModelProto, target: Target, **options: object) -> Plan:
    chosen = {"activations": "auto", "layout": "auto", "target": target, **options}
    return SelectNodes(**chosen)(load(proto))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_the_table_says_one_thing_of_each(op: str, target: Target) -> None:
    (gain,) = (gain for gain in GAINS if gain.op == op and target in gain.targets)
    assert gain.reason and gain.fact


def test_only_x86_without_vnni_is_mixed() -> None:
    assert [target for target in TARGETS if not gains_everywhere(target)] == ["cpu-avx2"]


def test_convolutions_without_vnni() -> None:
    (entry,) = select(conv_model(), "cpu-avx2", terms=2).nodes
    assert (entry.activations, entry.layout, entry.terms) == ("none", "merged", 2)
    assert "float compute: on cpu-avx2 integer convolutions" in (entry.note or "")


@pytest.mark.parametrize("target", EVERY)
def test_convolutions_elsewhere(target: Target) -> None:
    (entry,) = select(conv_model(), target, terms=2).nodes
    assert (entry.activations, entry.layout, entry.note) == ("dynamic", "parallel", None)


def test_a_large_matmul_in_its_own_model() -> None:
    plan = select(behind_a_conv(4, *LARGE), "cpu-avx2")
    kinds = {entry.name: (entry.activations, entry.layout) for entry in plan.nodes}
    assert kinds == {
        "conv": ("none", "merged"),
        "small": ("none", "merged"),
        "large": ("dynamic", "parallel"),
    }
    assert plan["large"].note is None
    assert f"at most {BREAK_EVEN} numbers" in (plan["small"].note or "")


@pytest.mark.parametrize(("inputs", "integers"), [(256, False), (257, True)])
def test_where_a_matmul_breaks_even(inputs: int, integers: bool) -> None:
    text = f"g (float[N,{inputs}] x) => (float[N,256] y) {{ [op] y = MatMul (x, w) }}"
    (entry,) = select(model(text, {"w": weights(inputs, 256)}), "cpu-avx2").nodes
    assert (entry.activations == "dynamic") == integers


def test_a_classifier_behind_larger_convolutions() -> None:
    plan = select(behind_a_conv(128, *LARGE), "cpu-avx2")  # 147456 numbers against 102400
    assert {entry.activations for entry in plan.nodes} == {"none"}
    assert "beside layers with more weights" in (plan["large"].note or "")
    every = select(behind_a_conv(128, *LARGE), "cpu-vnni")
    assert {entry.activations for entry in every.nodes} == {"dynamic"}


def test_embedding_tables_do_not_count() -> None:
    proto = model(
        """g (int64[N] i) => (float[N,320] y) {
            [table] e = Gather (t, i)
            [dot] y = MatMul (e, w)
        }""",
        {"t": weights(2000, 320), "w": weights(*LARGE, seed=1)},
    )
    plan = select(proto, "cpu-avx2", embeddings=True)
    assert (plan["table"].activations, plan["dot"].activations) == ("none", "dynamic")


def test_left_operands_stay_in_float() -> None:
    text = "g (float[320,N] x) => (float[320,N] y) { [op] y = MatMul (w, x) }"
    (entry,) = select(model(text, {"w": weights(*LARGE)}), "cpu-avx2").nodes
    assert (entry.activations, entry.layout) == ("none", "merged")


def test_an_offset_is_for_the_nodes_in_float() -> None:
    plan = select(behind_a_conv(4, *LARGE), "cpu-avx2", offset=True)
    assert {entry.name: entry.offset for entry in plan.nodes} == {
        "conv": True,
        "small": True,
        "large": False,
    }
