"""External data: checked at load, mapped when read, streamed when written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import kitchen_sink
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto
from onnx import helper as oh
from onnx import numpy_helper as nh

from onnxq.errors import ModelError
from onnxq.model import load, save, to_proto, values


def _external(folder: Path, tensor: TensorProto, **entries: object) -> Path:
    """A model with one tensor in `w.bin`, which has 16 bytes in front of it."""
    (folder / "w.bin").write_bytes(b"\xaa" * 16 + tensor.raw_data)
    entries = {"location": "w.bin", "offset": 16, "length": len(tensor.raw_data)} | entries
    stub = TensorProto(name="w", data_type=tensor.data_type, dims=tensor.dims)
    stub.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        if value is not None:
            stub.external_data.add(key=key, value=str(value))
    out = oh.make_tensor_value_info("y", tensor.data_type, list(tensor.dims))
    graph = oh.make_graph([oh.make_node("Identity", ["w"], ["y"])], "g", [], [out], [stub])
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


FLOATS = nh.from_array(np.arange(500, dtype=np.float32), "w")


def test_values_are_mapped_not_read(tmp_path: Path) -> None:
    model = load(_external(tmp_path, FLOATS))
    constant = model.graph.nodes[0].inputs[0]
    got = values(constant)
    assert isinstance(got, np.memmap)
    assert got.tolist() == list(range(500))
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1
    assert got.base is not None


def test_no_offset_no_length(tmp_path: Path) -> None:
    path = _external(tmp_path, FLOATS, offset=None, length=None)
    (tmp_path / "w.bin").write_bytes(FLOATS.raw_data)
    assert values(load(path).graph.nodes[0].inputs[0])[499] == 499


@pytest.mark.parametrize("name", ["INT4", "UINT4", "INT2", "UINT2"])
def test_packed_types_are_unpacked(tmp_path: Path, name: str) -> None:
    if name not in TensorProto.DataType.keys():  # noqa: SIM118 an enum wrapper
        pytest.skip(f"this onnx has no {name}")
    data = np.random.default_rng(0).integers(0, 256, 1500, np.uint8).tobytes()
    count = 1500 * 8 // int(name[-1])
    tensor = TensorProto(
        name="w", data_type=TensorProto.DataType.Value(name), dims=[count], raw_data=data
    )
    model = load(_external(tmp_path, tensor))
    got = values(model.graph.nodes[0].inputs[0])
    assert got.dtype == (np.int8 if name.startswith("INT") else np.uint8)
    np.testing.assert_array_equal(got, nh.to_array(tensor).astype(got.dtype))
    assert to_proto(model).graph.initializer[0].raw_data == data
    save(model, tmp_path / "out.onnx", external=True)
    assert (tmp_path / "out.onnx.data").read_bytes() == data
    again = load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(values(again.graph.nodes[0].inputs[0]), got)


def test_the_working_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _external(tmp_path, FLOATS)
    monkeypatch.chdir(tmp_path)
    model = load(path.name)
    monkeypatch.chdir("/")
    assert values(model.graph.nodes[0].inputs[0])[3] == 3


@pytest.mark.parametrize("location", ["/etc/w.bin", "../w.bin", "a/../../w.bin", "", "C:\\w.bin"])
def test_locations_outside_the_folder(tmp_path: Path, location: str) -> None:
    path = _external(tmp_path, FLOATS, location=location)
    with pytest.raises(ModelError, match=r"tensor 'w' has the external location .* not inside"):
        load(path)


def test_a_location_in_a_subfolder(tmp_path: Path) -> None:
    path = _external(tmp_path, FLOATS, location="a/./b/../w.bin")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "w.bin").rename(tmp_path / "a" / "w.bin")
    assert values(load(path).graph.nodes[0].inputs[0])[3] == 3


def test_missing_file(tmp_path: Path) -> None:
    path = _external(tmp_path, FLOATS)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"tensor 'w': external data file .*w\.bin is missing"):
        load(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = _external(tmp_path, FLOATS)
    (tmp_path / "w.bin").write_bytes(b"x" * 2015)
    with pytest.raises(ModelError, match=r"'w' needs bytes 16 to 2016 of .*w\.bin, .* only 2015"):
        load(path)


def test_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'w' needs 2000 bytes, but its .* says 1999"):
        load(_external(tmp_path, FLOATS, length=1999))


@pytest.mark.parametrize("offset", ["-4", "x"])
def test_bad_offset(tmp_path: Path, offset: str) -> None:
    with pytest.raises(ModelError, match=f"external data offset '{offset}' is not a number"):
        load(_external(tmp_path, FLOATS, offset=offset))


def test_in_memory_models_have_no_folder(tmp_path: Path) -> None:
    proto = onnx.load(_external(tmp_path, FLOATS), load_external_data=False)
    with pytest.raises(
        ModelError, match=r"'w' .* external file 'w\.bin', .* load it from its path"
    ):
        load(proto)


def test_external_data_in_an_odd_place(tmp_path: Path) -> None:
    proto = onnx.load(_external(tmp_path, FLOATS), load_external_data=False)
    proto.training_info.add().algorithm.initializer.add().CopyFrom(proto.graph.initializer[0])
    (tmp_path / "odd.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"'w' is part of .* training information"):
        load(tmp_path / "odd.onnx")


def test_constant_nodes_may_be_external(tmp_path: Path) -> None:
    proto = onnx.load(_external(tmp_path, FLOATS), load_external_data=False)
    tensor = proto.graph.initializer.pop()
    node = oh.make_node("Constant", [], ["w"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    proto.graph.node.insert(0, node)
    (tmp_path / "c.onnx").write_bytes(proto.SerializeToString())
    save(load(tmp_path / "c.onnx"), tmp_path / "out.onnx", external=True)
    got = ort.InferenceSession(tmp_path / "out.onnx").run(None, {})[0]
    assert got.tolist() == list(range(500))


def _wide(count: int, size: int) -> ModelProto:
    """`count` initializers of `size` floats, added up."""
    adds = "\n".join(f"s{i + 1} = Add (s{i}, w{i})" for i in range(count))
    proto = kitchen_sink.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        agraph (float[{size}] s0) => (float[{size}] s{count}) {{ {adds} }}"""
    )
    for index in range(count):
        proto.graph.initializer.append(nh.from_array(np.full(size, index, np.float32), f"w{index}"))
    return proto


def test_saving_streams(tmp_path: Path) -> None:
    """16 tensors of 4 MiB: never more than two of them in Python's memory."""
    onnx.save(
        _wide(16, 2**20), tmp_path / "big.onnx", save_as_external_data=True, location="big.bin"
    )
    tracemalloc.start()
    try:
        model = load(tmp_path / "big.onnx")
        for node in model.graph.nodes:
            values(node.inputs[1])
        save(model, tmp_path / "out.onnx", external=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert (tmp_path / "out.onnx").stat().st_size < 2**16
    feed = {"s0": np.zeros(2**20, np.float32)}
    got = ort.InferenceSession(tmp_path / "out.onnx").run(None, feed)[0]
    assert got[0] == got[-1] == sum(range(16))


def test_external_files_hold_large_initializers_of_bodies_too(tmp_path: Path) -> None:
    proto = kitchen_sink.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        agraph (bool c, float[N] x) => (float[N] y) {
          y = If (c) <then_branch = t () => (float[N] a) { a = Add (x, v) },
                      else_branch = e () => (float[N] b) { b = Neg (x) }>
        }"""
    )
    branch = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    branch.initializer.append(nh.from_array(np.arange(500, dtype=np.float32), "v"))
    save(load(proto), tmp_path / "m.onnx", external=True)
    assert (tmp_path / "m.onnx.data").stat().st_size == 2000
    session = ort.InferenceSession(tmp_path / "m.onnx")
    got = session.run(None, {"c": np.array(True), "x": np.zeros(500, np.float32)})[0]
    assert got.tolist() == list(range(500))


def test_a_source_with_external_data_is_embedded_when_small(tmp_path: Path) -> None:
    save(load(_external(tmp_path, FLOATS)), tmp_path / "one.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "one.onnx", "w.bin"]
    assert nh.to_array(onnx.load(tmp_path / "one.onnx").graph.initializer[0])[499] == 499
