"""Kin of Conv and MatMul: ConvTranspose, recurrent nodes, embeddings, constants on the left."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from small import feeds, model, ops, run, weights

import onnxq
from onnxq.kernels_ref import PerAxis, PerBlock, expand

# What is compared is the same operator with the weight that the series stands for, computed here in
# numpy. Both are float32: they differ by the rounding of sums of a few dozen products.
SAME = 1e-5


def quantized(proto: onnx.ModelProto, **options) -> onnx.ModelProto:
    settings = {"activations": "none", **options}
    return onnxq.quantize(
        proto, **{"weight_bits": 4, "terms": 2, "offset": "off", "priors": False, **settings}
    ).model


def replaced(proto: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.ModelProto:
    """The same model with another value of one initializer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    target = next(i for i in copy.graph.initializer if i.name == name)
    target.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return copy


def series_of(matrix: np.ndarray, terms: int, block_size: int | None = None) -> np.ndarray:
    """The matrix [out, in] as the default series of 4-bit terms gives it."""
    granularity = PerAxis(0) if block_size is None else PerBlock(1, block_size)
    kind = "fixed_ratio" if terms == 1 else "digit"
    contiguous = np.ascontiguousarray(matrix)
    return expand(kind, contiguous, bits=4, terms=terms, granularity=granularity).dequantize()


def assert_same(proto: onnx.ModelProto, want: onnx.ModelProto) -> None:
    feed = feeds(want)
    for optimize in (True, False):
        for a, b in zip(
            run(want, feed, optimize=optimize), run(proto, feed, optimize=optimize), strict=True
        ):
            np.testing.assert_allclose(b, a, rtol=0, atol=SAME * np.abs(a).max())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("layout", ["parallel", "merged"])
def test_conv_transpose(groups, terms, block_size, layout):
    w = weights(4, 6 // groups, 3, 3)
    proto = model(
        f"""g (float[1,4,5,5] x) => (float[1,6,11,11] y) {{
            [up] y = ConvTranspose <strides = [2,2], group = {groups}> (x, w, b)
        }}""",
        {"w": w, "b": weights(6, seed=1)},
    )
    # output channels are axis 1, within each group
    rows = w.reshape(groups, 4 // groups, 6 // groups, 9).transpose(0, 2, 1, 3).reshape(6, -1)
    back = series_of(rows, terms, block_size).reshape(groups, 6 // groups, 4 // groups, 9)
    want = replaced(proto, "w", back.transpose(0, 2, 1, 3).reshape(w.shape))
    made = quantized(proto, terms=terms, block_size=block_size, layout=layout)
    assert ops(made).count("ConvTranspose") == (terms if layout == "parallel" else 1)
    assert_same(made, want)


def recurrent(op: str, gates: int) -> onnx.ModelProto:
    hidden, inputs = 5, 3
    return model(
        f"""g (float[4,1,3] x) => (float[4,2,1,5] y) {{
            [rnn] y = {op} <hidden_size = {hidden}, direction = "bidirectional"> (x, w, r, b)
        }}""",
        {
            "w": weights(2, gates * hidden, inputs),
            "r": weights(2, gates * hidden, hidden, seed=1),
            "b": weights(2, 2 * gates * hidden, seed=2),
        },
    )


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_recurrent_weights_are_merged(op, gates, activations):
    proto = recurrent(op, gates)
    result = onnxq.quantize(proto, activations=activations, terms=2, offset="off")
    assert [node.name for node in result.plan.quantized] == ["rnn/W", "rnn/R"]
    assert all(node.layout == "merged" for node in result.plan.quantized)
    want = proto
    for name in ("w", "r"):
        array = numpy_helper.to_array(next(i for i in proto.graph.initializer if i.name == name))
        rows = array.reshape(-1, array.shape[2])
        want = replaced(want, name, series_of(rows, 2).reshape(array.shape))
    assert ops(result.model).count(op) == 1
    assert_same(result.model, want)


def embedding() -> onnx.ModelProto:
    return model(
        """g (int64[2,3] ids) => (float[2,3,4] y) {
            [table] e = Gather (t, ids)
            [fc] y = MatMul (e, w)
        }""",
        {"t": weights(10, 8), "w": weights(8, 4, seed=1)},
    )


def test_embeddings_on_request():
    proto = embedding()
    result = onnxq.quantize(proto, activations="none", embeddings=True, terms=2, offset="off")
    assert [node.name for node in result.plan.quantized] == ["table", "fc"]
    t, w = weights(10, 8), weights(8, 4, seed=1)
    want = replaced(replaced(proto, "t", series_of(t, 2)), "w", series_of(w.T, 2).T)
    assert_same(result.model, want)


def test_embeddings_are_left_alone_otherwise():
    result = onnxq.quantize(embedding(), activations="none", terms=2)
    assert result.report.left_alone == {"table": "an embedding table; quantized with --embeddings"}


@pytest.mark.parametrize("block_size", [None, 3])
def test_a_constant_left_operand(block_size):
    w = weights(2, 4, 7)
    proto = model("g (float[2,7,3] x) => (float[2,4,3] y) { [mm] y = MatMul (w, x) }", {"w": w})
    want = replaced(proto, "w", series_of(w.reshape(-1, 7), 2, block_size).reshape(w.shape))
    made = quantized(proto, block_size=block_size)
    assert ops(made).count("MatMul") == 2
    assert_same(made, want)
    kinds = {node.note for node in onnxq.quantize(proto, terms=2).plan.quantized}
    assert kinds == {"constant left operand: float compute"}


@pytest.mark.parametrize("spatial", [1, 3])
def test_one_and_three_dimensional_convolutions(spatial):
    w = weights(4, 3, *([3] * spatial))
    size = ",".join(["6"] * spatial)
    small = ",".join(["4"] * spatial)
    proto = model(
        f"g (float[1,3,{size}] x) => (float[1,4,{small}] y) {{ [c] y = Conv (x, w) }}", {"w": w}
    )
    want = replaced(proto, "w", series_of(w.reshape(4, -1), 2).reshape(w.shape))
    assert_same(quantized(proto), want)


def test_attention_products_are_left_alone_with_the_reason():
    proto = model(
        """g (float[2,3,4] q, float[2,4,3] k) => (float[2,3,4] y) {
            [scores] s = MatMul (q, k)
            [out] y = MatMul (s, w)
        }""",
        {"w": weights(3, 4)},
    )
    report = onnxq.quantize(proto, activations="none", terms=2).report
    assert report.left_alone == {"scores": "no constant operand"}


def test_stored_in_four_bits():
    made = quantized(recurrent("LSTM", 4))
    packed = [i for i in made.graph.initializer if i.data_type == TensorProto.INT4]
    assert len(packed) == 4  # W and R, two terms each
