"""Small models, written as ONNX text, and the one check that every pass goes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from kitchen_sink import parse_model
from onnx import numpy_helper

from onnxq.model import load, to_proto
from onnxq.passes import GraphPass, PassResult, signature, verify


def model(
    text: str, constants: Mapping[str, np.ndarray] | None = None, *, opset: int = 17, ir: int = 9
) -> onnx.ModelProto:
    """A checked model from the text of its graph; `constants` become initializers."""
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
    proto = parse_model(f"{header}\n{text}")
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def weights(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Seeded normal float32 values."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def conv_model(**kwargs: Any) -> onnx.ModelProto:
    """x [1, 3, 8, 8] -> Conv `conv` 3×3, 4 outputs, bias -> Relu -> y."""
    return model(
        """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
            [conv] c = Conv <pads = [1,1,1,1]> (x, w, b)
            [relu] y = Relu (c)
        }""",
        {"w": weights(4, 3, 3, 3), "b": weights(4, seed=1)},
        **kwargs,
    )


def run(
    proto: onnx.ModelProto, feed: Mapping[str, np.ndarray], *, optimize: bool = True
) -> list[np.ndarray]:
    """Outputs in onnxruntime, with or without graph optimisation."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, dict(feed)))


def feeds(proto: onnx.ModelProto, seed: int = 7) -> dict[str, np.ndarray]:
    """Seeded inputs of the declared shapes; symbolic dimensions are 2."""
    rng = np.random.default_rng(seed)
    initializers = {i.name for i in proto.graph.initializer}
    made = {}
    for value in proto.graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or 2 for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        floats = np.issubdtype(dtype, np.floating)
        drawn = rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
        made[value.name] = np.asarray(drawn, dtype)
    return made


def ops(proto: onnx.ModelProto) -> list[str]:
    """Operator types in graph order."""
    return [node.op_type for node in proto.graph.node]


def assert_pass(
    proto: onnx.ModelProto,
    pass_: GraphPass,
    *,
    expect: list[str],
    rewritten: tuple[str, ...] | None = None,
    skipped: Mapping[str, str] | None = None,
    rtol: float = 0.0,
) -> onnx.ModelProto:
    """Run a pass and check everything that a pass promises.

    `rtol` bounds |difference| by rtol · max|output|, with and without graph optimisation; 0 means
    that the outputs are bit-identical.
    """
    before = proto.SerializeToString()
    loaded = load(proto)
    contract = signature(loaded)
    result: PassResult = pass_(loaded)
    verify(loaded, contract, type(pass_).__name__)
    after = to_proto(loaded)
    onnx.checker.check_model(after, full_check=True)
    assert ops(after) == expect
    if rewritten is not None:
        assert result.rewritten == rewritten
    if skipped is not None:
        assert set(result.skipped) == set(skipped)
        for name, reason in skipped.items():
            assert reason in result.skipped[name]
    assert proto.SerializeToString() == before, "the source model was changed"
    again = pass_(loaded)
    assert again.rewritten == (), "a second run is not a no-op"
    feed = feeds(proto)
    for optimize in (True, False):
        for want, got in zip(
            run(proto, feed, optimize=optimize), run(after, feed, optimize=optimize), strict=True
        ):
            assert want.shape == got.shape and want.dtype == got.dtype
            limit = rtol * np.abs(want).max() if want.size else 0.0
            np.testing.assert_allclose(got, want, rtol=0, atol=limit)
    return after
