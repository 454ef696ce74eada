"""4-bit integers packed in bytes: the same values, for runtimes without INT4."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from small import feeds, model, run, weights

import onnxq
from onnxq.session import open_session


def source(outputs: int = 4) -> onnx.ModelProto:
    return model(
        """g (float[1,3,8,8] x) => (float[1,5] y) {
            [conv] c = Conv (x, w, b)
            [relu] r = Relu (c)
            [pool] p = GlobalAveragePool (r)
            [flat] f = Flatten (p)
            [fc] y = MatMul (f, v)
        }""",
        {
            "w": weights(outputs, 3, 3, 3),
            "b": weights(outputs, seed=1),
            "v": weights(outputs, 5, seed=2),
        },
    )


@pytest.mark.parametrize("outputs", [4, 5])  # 5·27 and 5·5 are odd
@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("layout", ["parallel", "merged"])
@pytest.mark.parametrize("options", [{}, {"block_size": 4}, {"weight_bits": 2, "terms": 3}])
def test_the_same_outputs_as_int4(outputs, activations, layout, options):
    if activations == "dynamic" and "block_size" in options:
        pytest.skip("blocks are for float compute")
    proto = source(outputs)
    made = {
        packing: onnxq.quantize(
            proto, activations=activations, layout=layout, min_runtime=runtime, **options
        ).model
        for packing, runtime in (("int4", "1.23"), ("uint8", "1.22"))
    }
    kinds = {i.data_type for i in made["uint8"].graph.initializer}
    assert not kinds & {TensorProto.INT4, TensorProto.UINT4}
    assert max(o.version for o in made["uint8"].opset_import) == 17  # not raised
    feed = feeds(proto)
    for optimize in (True, False):
        want = run(made["int4"], feed, optimize=optimize)
        got = run(made["uint8"], feed, optimize=optimize)
        np.testing.assert_array_equal(got[0], want[0])


def test_is_folded_when_the_model_is_loaded(tmp_path):
    import onnxruntime as ort

    proto = onnxq.quantize(source(), activations="none", layout="merged", min_runtime="1.22").model
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"BitShift", "MatMulInteger", "Cast", "Mul"}


@pytest.mark.parametrize(
    ("version", "packing", "activations"),
    [("1.22.1", "uint8", "uint8"), ("1.23.0", "int4", "uint8"), ("1.24.0", "int4", "int8")],
)
def test_the_forms_follow_the_runtime(monkeypatch, version, packing, activations):
    from onnxq import session

    monkeypatch.setattr(session.ort, "__version__", version)
    installed = onnxq.quantize(source()).plan
    monkeypatch.undo()
    asked = onnxq.quantize(source(), min_runtime=version).plan
    for plan in (installed, asked):
        assert {node.packing for node in plan.quantized} == {packing}
        assert {node.conv_activations for node in plan.quantized} == {activations}


def test_uint8_activations_give_the_same_outputs():
    """The int8 form is the uint8 form shifted by 128: products and scales are the same."""
    made = [onnxq.quantize(source(), min_runtime=version).model for version in ("1.23", "1.24")]
    feed = feeds(source())
    want, got = (run(proto, feed)[0] for proto in made)
    # the two compute the same scale by different operators: it may differ in its last bit
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_version_that_is_none():
    with pytest.raises(onnxq.ConfigError, match="--min-runtime 'new': give a version"):
        onnxq.quantize(source(), min_runtime="new")


def test_file_size(tmp_path):
    """Bytes take the room of INT4, but for the few nodes that unpack them."""
    proto = model(
        "g (float[1,256] x) => (float[1,256] y) { [fc] y = MatMul (x, w) }",
        {"w": weights(256, 256)},
    )
    sizes = [
        onnxq.quantize(proto, activations="none", min_runtime=runtime).report.size_after
        for runtime in ("1.23", "1.22")
    ]
    assert sizes[0] < sizes[1] < sizes[0] + 4000
    open_session(onnxq.quantize(proto, min_runtime="1.22").model.SerializeToString())
