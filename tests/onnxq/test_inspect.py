"""What `inspect` shows of float models and of quantized ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small
from command import DEMO, works, write

import onnxq


def test_inspect_a_float_model() -> None:
    out = works("inspect", DEMO)
    assert out.startswith("opset 13, 45 nodes\n")
    assert "candidates" in out and "quantized by onnxq" not in out
    found = json.loads(works("inspect", DEMO, "--json"))
    assert found.keys() == onnxq.Inspection.model_fields.keys()
    assert found["quantized"] == []
    kinds = {candidate["op_type"] for candidate in found["candidates"]}
    assert "Conv" in kinds
    assert all("1 term of 8 bits" in candidate["action"] for candidate in found["candidates"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--activations dynamic", (1, 8, "parallel", "dynamic")),
        ("--activations dynamic --terms 2", (2, 4, "parallel", "dynamic")),
        ("--activations dynamic --terms 3 --weight-bits 3", (3, 3, "parallel", "dynamic")),
        ("--activations dynamic --layout merged", (2, 4, "merged", "dynamic")),
        ("--activations none --weight-bits 8", (2, 8, "parallel", "none")),
        ("--activations none --layout merged", (2, 4, "merged", "none")),
        ("--activations dynamic --terms 1", (1, 4, "parallel", "dynamic")),
        ("--target cpu-vnni --terms 2", (2, 4, "parallel", "dynamic")),
        ("--target cpu-avx2 --terms 2", (2, 4, "merged", "none")),
    ],
)
def test_inspect_a_quantized_model(
    tmp_path: Path, options: str, expected: tuple[int, int, str, str]
) -> None:
    source = write(small.conv_model(), tmp_path / "in.onnx")
    works("quantize", source, tmp_path / "out.onnx", *options.split())
    found = json.loads(works("inspect", tmp_path / "out.onnx", "--json"))
    (node,) = found["quantized"]
    assert (node["name"], node["op_type"]) == ("conv", "Conv")
    assert (node["terms"], node["bits"], node["layout"], node["activations"]) == expected
    assert found["candidates"] == []
    out = works("inspect", tmp_path / "out.onnx")
    assert "quantized by onnxq" in out and "candidates" not in out


def test_inspect_says_why_a_node_is_left_alone(tmp_path: Path) -> None:
    text = "g (float[2,3] x, float[3,2] w) => (float[2,2] y) { [dot] y = MatMul (x, w) }"
    (node,) = json.loads(
        works("inspect", write(small.model(text), tmp_path / "in.onnx"), "--json")
    )["candidates"]
    assert node["action"] == "left in float" and node["reason"]


def test_inspect_a_model_without_weights(tmp_path: Path) -> None:
    proto = small.model("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    out = works("inspect", write(proto, tmp_path / "in.onnx"))
    assert "no node with weights that onnxq knows" in out


@pytest.mark.parametrize("bits", ["", "many"])
def test_inspect_foreign_marks(tmp_path: Path, bits: str) -> None:
    proto = small.conv_model(ir=10)
    proto.graph.node[0].metadata_props.add(key="onnxq.term", value="0")
    if bits:
        proto.graph.node[0].metadata_props.add(key="onnxq.bits", value=bits)
        proto.graph.node[0].metadata_props.add(key="onnxq.node", value="conv")
    found = json.loads(works("inspect", write(proto, tmp_path / "in.onnx"), "--json"))
    assert found["quantized"] == []


@pytest.mark.parametrize("name", ["[/conv]", "a[bold]b", "x :smile: y", "ä×→"])
def test_names_are_printed_as_they_are(tmp_path: Path, name: str) -> None:
    proto = small.conv_model()
    proto.graph.node[0].name = name
    source = write(proto, tmp_path / "in.onnx")
    assert name in works("inspect", source)
    works("quantize", source, tmp_path / "out.onnx")
    assert name in works("inspect", tmp_path / "out.onnx")
