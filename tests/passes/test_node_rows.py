"""The rows of a node times its weight matrix are the node's output."""

from __future__ import annotations

import numpy as np
import pytest
from small import model, run, weights

from onnxq.model import load
from onnxq.passes.node_rows import NodeRows
from onnxq.passes.weights import find_weight

CONVS = {
    "plain": ("", (4, 3, 3, 3), (2, 3, 7, 6)),
    "pads, strides": ("<pads = [1,2,0,1], strides = [2,1]>", (4, 3, 3, 3), (2, 3, 7, 6)),
    "dilations": ("<dilations = [2,1]>", (4, 3, 3, 2), (1, 3, 9, 6)),
    "groups": ("<group = 2>", (6, 2, 1, 1), (2, 4, 5, 5)),
    "depthwise": ("<group = 4, pads = [1,1,1,1]>", (4, 1, 3, 3), (1, 4, 5, 5)),
    "same upper": ('<auto_pad = "SAME_UPPER", strides = [2,2]>', (4, 3, 3, 4), (1, 3, 8, 7)),
    "same lower": ('<auto_pad = "SAME_LOWER", strides = [1,2]>', (4, 3, 2, 4), (1, 3, 8, 7)),
    "valid": ('<auto_pad = "VALID", strides = [2,2]>', (4, 3, 3, 3), (1, 3, 8, 7)),
    "one axis": ("<pads = [1,1]>", (4, 3, 3), (2, 3, 9)),
    "three axes": ("", (2, 3, 2, 2, 2), (1, 3, 4, 3, 3)),
}


def rows_and_output(
    node: str, w: np.ndarray, x: np.ndarray, out_rank: int
) -> tuple[NodeRows, np.ndarray]:
    dims = ",".join(f"A{i}" for i in range(x.ndim))
    outs = ",".join(f"B{i}" for i in range(out_rank))
    proto = model(f"g (float[{dims}] x) => (float[{outs}] y) {{ [n] y = {node} }}", {"w": w})
    made = load(proto)
    found = find_weight(made, made.graph.nodes[0])
    assert not isinstance(found, str)
    rows = NodeRows.of(made.graph.nodes[0], found)
    assert isinstance(rows, NodeRows)
    return rows, run(proto, {"x": x})[0]


def products(rows: NodeRows, x: np.ndarray) -> np.ndarray:
    """[groups, positions, out / groups]."""
    matrix = rows.weight.matrix().reshape(rows.groups, -1, rows.inputs)
    return rows.read(x, 10**6, np.random.default_rng(0)) @ matrix.transpose(0, 2, 1)


@pytest.mark.parametrize(("attributes", "w", "x"), CONVS.values(), ids=CONVS)
def test_conv(attributes: str, w: tuple[int, ...], x: tuple[int, ...]) -> None:
    values = weights(*x, seed=1)
    rows, wanted = rows_and_output(f"Conv {attributes} (x, w)", weights(*w), values, len(x))
    found = products(rows, values)  # channels lie group after group
    by_position = np.moveaxis(wanted, 1, -1).reshape(-1, rows.groups, w[0] // rows.groups)
    np.testing.assert_allclose(found, by_position.transpose(1, 0, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("node", "w", "x"),
    [
        ("MatMul (x, w)", (6, 4), (2, 3, 6)),
        ("MatMul (x, w)", (6, 4), (6,)),
        ("MatMul (w, x)", (4, 6), (6, 5)),
        ("MatMul (w, x)", (4, 6), (2, 6, 5)),
        ("MatMul (x, w)", (2, 6, 4), (2, 3, 6)),
        ("MatMul (x, w)", (2, 6, 4), (3, 2, 5, 6)),
        ("MatMul (x, w)", (2, 6, 4), (5, 6)),
    ],
    ids=str,
)
def test_matmul(node: str, w: tuple[int, ...], x: tuple[int, ...]) -> None:
    values = weights(*x, seed=1)
    rank = len(np.broadcast_shapes(w[:-2], x[:-2])) + (2 if len(x) > 1 else 1)
    rows, wanted = rows_and_output(node, weights(*w), values, rank)
    found = np.sort(products(rows, values).ravel())
    np.testing.assert_allclose(found, np.sort(wanted.ravel()), rtol=0, atol=1e-4)
    ones = rows.spread(np.arange(rows.weight.out, dtype=np.float32))
    assert (wanted + ones).shape == wanted.shape


@pytest.mark.parametrize(
    ("node", "w", "x"), [("MatMul (w, x)", (4, 6), (6,)), ("MatMul (x, w)", (2, 6, 4), (6,))]
)
def test_vectors_that_have_no_rows_are_refused(
    node: str, w: tuple[int, ...], x: tuple[int, ...]
) -> None:
    values = weights(*x)
    rows, _ = rows_and_output(node, weights(*w), values, len(w) - 1)
    with pytest.raises(ValueError, match="vector"):
        rows.read(values, 10, np.random.default_rng(0))


def test_the_same_positions_of_two_inputs() -> None:
    x = weights(2, 3, 9, 9)
    rows, _ = rows_and_output("Conv (x, w)", weights(4, 3, 3, 3), x, 4)
    one = rows.read(x, 10, np.random.default_rng(5))
    other = rows.read(2 * x, 10, np.random.default_rng(5))
    assert one.shape == (1, 10, 27)
    np.testing.assert_array_equal(2 * one, other)


def test_conv_transpose_has_no_rows() -> None:
    proto = model(
        "g (float[N,4,5,5] x) => (float[N,3,6,6] y) { [n] y = ConvTranspose (x, w) }",
        {"w": weights(4, 3, 2, 2)},
    )
    made = load(proto)
    found = find_weight(made, made.graph.nodes[0])
    assert not isinstance(found, str)
    assert NodeRows.of(made.graph.nodes[0], found) == "ConvTranspose is not calibrated"
