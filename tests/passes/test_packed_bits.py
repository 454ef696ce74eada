"""Weights of 2, 3 and 5 to 7 bits take that many in the file, and nothing at run time."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from small import feeds, model, run, weights

import onnxq
from onnxq.passes import stored_terms
from onnxq.passes.packed_bits import most_padding, pack_bits, read_bits
from onnxq.session import open_session

BITS = (2, 3, 5, 6, 7)


@st.composite
def integers(draw):
    bits = draw(st.integers(2, 7))
    return bits, draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=33))


@given(integers())
def test_they_come_back(made):
    bits, values = made
    packed = pack_bits(np.array(values, np.int16), bits)
    assert packed.dtype == np.uint8
    read = read_bits(packed, bits)
    assert read[: len(values)].tolist() == values
    assert len(read) - len(values) <= most_padding(bits)
    assert not read[len(values) :].any()


@pytest.mark.parametrize("bits", range(2, 8))
def test_no_bit_of_a_byte_is_left_over(bits):
    """But for 3 and 5 to 7 bits that needs whole groups of 8 integers, 4 of 6 bits."""
    assert pack_bits(np.zeros(64, np.uint8), bits).nbytes == 8 * bits
    every = pack_bits(np.full(64, (1 << bits) - 1), bits)
    assert (every == 255).all()


@pytest.mark.parametrize("values", [[8], [-1], [0, 99]])
def test_no_bit_is_lost_in_silence(values):
    with pytest.raises(ValueError, match="in 3 bits"):
        pack_bits(np.array(values), 3)


def source(channels: int = 32) -> onnx.ModelProto:
    """Weights large enough to be packed; `channels` 33 leaves the last bytes half full."""
    return model(
        f"""g (float[1,32,6,6] x) => (float[1,{channels}] y) {{
            [conv] c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
            [relu] r = Relu (c)
            [pool] p = GlobalAveragePool (r)
            [flat] f = Flatten (p)
            [fc] y = MatMul (f, v)
        }}""",
        {
            "w": weights(channels, 32, 3, 3),
            "b": weights(channels, seed=1),
            "v": weights(channels, channels, seed=2),
        },
    )


def quantized(proto: onnx.ModelProto, bits: int, compute: str, **options) -> onnxq.Result:
    if compute == "static":
        options["calibration"] = {k: np.repeat(v, 8, axis=0) for k, v in feeds(proto).items()}
        options.update(effort="fast")
    options = {"terms": 1, "offset": "off", "priors": False, **options}
    return onnxq.quantize(proto, weight_bits=bits, activations=compute, **options)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", ["none", "dynamic"])
@pytest.mark.parametrize("channels", [32, 33])
def test_the_same_outputs_as_in_whole_bytes(monkeypatch, bits, compute, channels):
    proto = source(channels)
    packed = quantized(proto, bits, compute)
    monkeypatch.setattr(stored_terms, "PACKING_BYTES", 2**40)
    whole = quantized(proto, bits, compute)
    assert packed.report.size_after < whole.report.size_after
    feed = feeds(proto)
    for optimize in (True, False):
        want, got = (run(made.model, feed, optimize=optimize)[0] for made in (whole, packed))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", BITS)
def test_as_many_bits_in_the_file(bits):
    proto = source()
    made = quantized(proto, bits, "none")
    stored = {i.name: numpy_helper.to_array(i) for i in made.model.graph.initializer}
    assert stored["w/term0/q"].nbytes == 32 * 32 * 9 * bits / 8
    assert made.report.weight_bits == pytest.approx(bits, abs=1.2)  # scales; v is too small


@pytest.mark.parametrize("compute", ["none", "dynamic"])
def test_what_unpacks_is_no_candidate(compute):
    made = quantized(source(), 6, compute).model
    assert "MatMulInteger" in {node.op_type for node in made.graph.node}
    found = onnxq.inspect(made)
    assert found.candidates == ()
    assert [node.name for node in found.quantized] == ["conv", "fc"]


@pytest.mark.parametrize("bits", [2, 3])
def test_small_weights_are_not_packed(bits):
    proto = model(
        "g (float[1,32] x) => (float[1,8] y) { y = MatMul (x, w) }", {"w": weights(32, 8)}
    )
    made = quantized(proto, bits, "none").model
    assert TensorProto.INT4 in {i.data_type for i in made.graph.initializer}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("compute", ["none", "dynamic"])
@pytest.mark.parametrize("options", [{}, {"terms": 2}])
def test_nothing_is_left_of_it_at_run_time(tmp_path, bits, compute, options):
    proto = quantized(source(), bits, compute, target="cpu-vnni", **options).model
    session = ort.SessionOptions()
    session.log_severity_level = 3
    session.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), session, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"BitShift", "Slice"}


def test_static_compute_reaches_the_integer_convolution(tmp_path):
    proto = quantized(source(), 6, "static").model
    assert "BitShift" in {node.op_type for node in proto.graph.node}
    session = ort.SessionOptions()
    session.log_severity_level = 3
    session.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), session, providers=["CPUExecutionProvider"])
    assert "QLinearConv" in {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}


def test_the_opset_is_not_raised_beyond_what_unpacking_needs():
    proto = source()
    proto.opset_import[0].version = 13
    made = quantized(proto, 6, "none").model
    assert max(o.version for o in made.opset_import) == 13
    open_session(made.SerializeToString())


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("compute", ["none", "dynamic"])
def test_terms_can_be_cut_off_and_added(bits, compute):
    proto = source()
    made = {n: quantized(proto, bits, compute, terms=n, series="fixed_ratio") for n in (1, 2)}
    one = onnxq.truncate(made[2].model, None, 1).model
    again = onnxq.extend(made[1].model, proto, None, 2).model
    feed = feeds(proto)
    for got, terms in ((one, 1), (again, 2)):
        want = run(made[terms].model, feed)[0]
        np.testing.assert_array_equal(run(got, feed)[0], want)


@pytest.mark.parametrize("compute", ["none", "dynamic"])
def test_digits_are_rounded_where_terms_are_cut_off(compute):
    proto = source(33)
    made = quantized(proto, 3, compute, terms=3, series="digit").model
    cut = onnxq.truncate(made, None, 2).model
    feed = feeds(proto)
    want, got = run(proto, feed)[0], run(cut, feed)[0]
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()  # 6 bits of weight


def test_a_changed_file_is_refused_in_one_line():
    """Whoever edits the nodes that unpack gets a reason, not another weight."""
    proto = source()
    made = quantized(proto, 6, "none", series="fixed_ratio").model
    for node in made.graph.node:
        if node.op_type == "BitShift":
            node.op_type = "Sub"
            del node.attribute[:]
    with pytest.raises(onnxq.OnnxqError, match="not as the plan in the file says"):
        onnxq.extend(made, proto, None, 2)
