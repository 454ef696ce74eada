"""Blocks cover the graph, end where little is live, and stages where the spatial size changes."""

from __future__ import annotations

import itertools

import onnx
import pytest
from small import model, weights

from onnxq.passes.find_blocks import LONGEST_STAGE, Block, Stage, find_blocks

RESIDUAL = """g (float[1,4,8,8] x) => (float[1,4,4,4] y) {
    [a] p = Conv <pads = [1,1,1,1]> (x, w)
    p1 = Relu (p)
    [b] q = Conv <pads = [1,1,1,1]> (p1, w)
    q1 = Relu (q)
    [c] r = Conv <pads = [1,1,1,1]> (q1, w)
    s = Add (r, p1)
    s1 = Relu (s)
    [d] t = Conv <pads = [1,1,1,1], strides = [2,2]> (s1, w)
    y = Relu (t)
}"""
WEIGHTS = {"w": weights(4, 4, 3, 3)}
SIZES = {"p1": (1, 4, 8, 8), "s1": (1, 4, 8, 8), "y": (1, 4, 4, 4)}


def names(proto: onnx.ModelProto, block: Block, chosen: str) -> str:
    found = [proto.graph.node[i].name for i in block.nodes]
    return "".join(name for name in found if name and name in chosen)


def flat(stages: list[Stage]) -> list[Block]:
    return [block for stage in stages for block in stage.blocks]


def test_residual_blocks_stay_whole_and_take_their_activation() -> None:
    proto = model(RESIDUAL, WEIGHTS)
    blocks = flat(find_blocks(proto.graph, set("abcd"), {}))
    assert [names(proto, block, "abcd") for block in blocks] == ["a", "bc", "d"]
    assert [block.outputs for block in blocks] == [("p1",), ("s1",), ("y",)]
    assert [block.inputs for block in blocks] == [("x",), ("p1",), ("s1",)]


def test_stages_end_where_the_size_changes() -> None:
    proto = model(RESIDUAL, WEIGHTS)
    stages = find_blocks(proto.graph, set("abcd"), SIZES)
    assert [len(stage.blocks) for stage in stages] == [2, 1]
    assert [stage.outputs for stage in stages] == [("s1",), ("y",)]
    assert len(find_blocks(proto.graph, set("abcd"), {})) == 1


def chain(count: int, skip: bool) -> onnx.ModelProto:
    """Convs c0, c1, … one after the other; with `skip`, the first one's output is added at last."""
    body = ["[c0] t0 = Conv <pads = [1,1,1,1]> (x, w)"]
    body += [f"[c{i}] t{i} = Conv <pads = [1,1,1,1]> (t{i - 1}, w)" for i in range(1, count)]
    body.append(f"y = Add (t{count - 1}, t0)" if skip else f"y = Relu (t{count - 1})")
    text = "g (float[1,4,8,8] x) => (float[1,4,8,8] y) {\n" + "\n".join(body) + "\n}"
    return model(text, WEIGHTS)


@pytest.mark.parametrize("count", [6, 9, 12])
def test_under_a_skip_over_everything_parts_are_cut_at_two_tensors(count: int) -> None:
    proto = chain(count, skip=True)
    chosen = {f"c{i}" for i in range(count)}
    blocks = flat(find_blocks(proto.graph, chosen, {}))
    planned = [sum(proto.graph.node[i].name in chosen for i in b.nodes) for b in blocks]
    assert sum(planned) == count and max(planned) <= 4
    assert all("t0" in block.outputs for block in blocks[:-1])
    assert {len(block.outputs) for block in blocks[1:-1]} == {2}


def test_not_where_too_much_is_live() -> None:
    proto = chain(9, skip=True)
    chosen = {f"c{i}" for i in range(1, 9)}
    assert len(flat(find_blocks(proto.graph, chosen, {}, most_live=1))) == 1


def test_long_stages_are_cut() -> None:
    proto = chain(10, skip=False)
    stages = find_blocks(proto.graph, {f"c{i}" for i in range(10)}, {})
    assert [len(stage.blocks) for stage in stages] == [LONGEST_STAGE, LONGEST_STAGE, 2]


@pytest.mark.parametrize("skip", [False, True])
def test_blocks_follow_each_other_and_leave_nothing_out(skip: bool) -> None:
    proto = chain(7, skip)
    blocks = flat(find_blocks(proto.graph, {"c2", "c3", "c6"}, {}))
    assert [i for block in blocks for i in block.nodes] == list(range(len(proto.graph.node)))
    assert blocks[-1].outputs == ("y",)
    for before, block in itertools.pairwise(blocks):
        assert block.inputs == before.outputs


def test_constants_and_outputs_in_the_middle() -> None:
    text = """g (float[1,4,8,8] x) => (float[1,4,8,8] m, float[1,4,8,8] y) {
        half = Constant <value_float = 0.5> ()
        [a] m = Conv <pads = [1,1,1,1]> (x, w)
        n = Mul (m, half)
        [b] y = Conv <pads = [1,1,1,1]> (n, w)
    }"""
    proto = model(text, WEIGHTS)
    blocks = flat(find_blocks(proto.graph, set("ab"), {}))
    assert [block.nodes for block in blocks] == [(1, 2), (3,)]
    assert blocks[0].outputs == ("n",) and set(blocks[1].outputs) == {"y"}


def test_without_planned_nodes_there_are_no_stages() -> None:
    assert find_blocks(model(RESIDUAL, WEIGHTS).graph, (), {}) == []
