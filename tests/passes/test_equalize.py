"""Cross-layer equalization is exact, evens out ranges, and says where it cannot be done."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small import run

from onnxq.model import load, to_proto
from onnxq.passes.equalize import Equalize
from onnxq.pipeline import apply


def _model(between: str = "Relu", *, group: int = 1, shared: bool = False) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(-3, 3, 8)).astype(np.float32)
    w1 = rng.standard_normal((8, 3, 3, 3)).astype(np.float32) * spread[:, None, None, None]
    w2 = rng.standard_normal((8, 8 // group, 3, 3)).astype(np.float32)
    weights = {"w1": w1, "b1": rng.standard_normal(8).astype(np.float32), "w2": w2}
    attrs = {"min": 0.0, "max": 6.0} if between == "Clip" else {}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "conv1"),
        helper.make_node(between, ["a"], ["r"], "act", **({} if between == "Clip" else attrs)),
        helper.make_node("Conv", ["r", "w2"], ["y"], "conv2", group=group),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if shared:
        outputs.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 9, 9])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}


@pytest.mark.parametrize("group", [1, 2, 8])
def test_exact_and_even(group: int) -> None:
    proto = _model(group=group)
    model = load(proto)
    result = apply(Equalize(), model)
    after = to_proto(model)
    assert result.rewritten == ("conv1",)
    x = np.random.default_rng(1).standard_normal((1, 3, 9, 9)).astype(np.float32)
    want, got = run(proto, {"x": x})[0], run(after, {"x": x})[0]
    # scaling by s and 1/s rounds each weight twice; sums of 27 and 72/group products
    assert np.max(np.abs(want - got)) <= 200 * 2.0**-24 * np.max(np.abs(want))
    w = _weights(after)
    rows = np.abs(w["w1"]).max((1, 2, 3))
    split = w["w2"].reshape(group, -1, *w["w2"].shape[1:])
    columns = np.abs(split).max((1, 3, 4)).reshape(-1)
    np.testing.assert_allclose(rows, columns, rtol=0.05)
    before = _weights(proto)
    assert np.ptp(np.log(rows)) < 0.7 * np.ptp(np.log(np.abs(before["w1"]).max((1, 2, 3))))


def test_a_second_run_rewrites_nothing() -> None:
    model = load(_model())
    apply(Equalize(), model)
    assert not apply(Equalize(), model).modified


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (_model("Sigmoid"), "Sigmoid, which is not positively homogeneous"),
        (_model("Clip"), "Clip, which is not positively homogeneous"),
        (_model(shared=True), "read more than once"),
    ],
)
def test_left_alone_with_a_reason(proto: onnx.ModelProto, reason: str) -> None:
    model = load(proto)
    result = apply(Equalize(), model)
    assert not result.modified
    assert reason in result.skipped["conv1"]


def test_matmul_with_bias() -> None:
    rng = np.random.default_rng(2)
    w1 = (rng.standard_normal((5, 6)) * np.exp(rng.uniform(-3, 3, 6))).astype(np.float32)
    arrays = {
        "w1": w1,
        "b": rng.standard_normal(6).astype(np.float32),
        "w2": rng.standard_normal((6, 4)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["m"], "mm1"),
            helper.make_node("Add", ["m", "b"], ["a"], "bias"),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("MatMul", ["r", "w2"], ["y"], "mm2"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model = load(proto)
    assert apply(Equalize(), model).rewritten == ("mm1",)
    x = rng.standard_normal((2, 5)).astype(np.float32)
    want, got = run(proto, {"x": x})[0], run(to_proto(model), {"x": x})[0]
    assert np.max(np.abs(want - got)) <= 40 * 2.0**-24 * np.max(np.abs(want))
