"""The plan as data: what it refuses, and that nothing is lost on the way through its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from pydantic import ValidationError

import onnxq
from onnxq.errors import ConfigError
from onnxq.plan import NodePlan, Plan, scales_path


def _node(name: str = "conv", **fields: Any) -> NodePlan:
    return NodePlan(name=name, op_type="Conv", weight="w", shape=(4, 3, 3, 3), **fields)


def _plan(*nodes: NodePlan) -> Plan:
    plan = Plan(nodes=list(nodes))
    for node in plan.quantized:
        scales = [np.full(4, 0.1 + i, np.float32) for i in range(node.terms)]
        plan.scales[node.name] = tuple(scales)
    return plan


def test_save_and_load(tmp_path: Path) -> None:
    plan = _plan(
        _node(terms=2, crc32="0123abcd", note="why"),
        _node("a/b.c:0", terms=3, bits=5, series="joint", activations="dynamic"),
        _node("left", reason="excluded by --exclude left"),
    )
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.nodes == plan.nodes
    assert loaded.scales.keys() == {"conv", "a/b.c:0"}
    for name, scales in plan.scales.items():
        assert len(loaded.scales[name]) == len(scales)
        for one, two in zip(loaded.scales[name], scales, strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.npz"]


def test_saving_twice_gives_the_same_json(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        _plan(_node(terms=2)).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_json_says_everything_that_can_be_edited(tmp_path: Path) -> None:
    _plan(_node(terms=2), _node("left", reason="why")).save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    first, left = document["nodes"]
    settings = {"bits", "terms", "series", "granularity", "activations", "layout", "packing"}
    assert settings <= first.keys()
    assert first["bits"] == 4
    assert left["reason"] == "why"
    assert not settings & left.keys()


def test_a_node_that_the_plan_does_not_mention_is_reported(tmp_path: Path) -> None:
    proto = small.model(
        """g (float[1,3,8,8] x) => (float[1,4,4,4] y) {
            [one] a = Conv (x, w)
            [two] y = Conv (a, v)
        }""",
        {"w": small.weights(4, 3, 3, 3), "v": small.weights(4, 4, 3, 3)},
    )
    plan = onnxq.quantize(proto).plan
    shorter = plan.model_copy(update={"nodes": plan.nodes[:1]})
    assert onnxq.quantize(proto, plan=shorter).report.left_alone == {"two": "not in the plan"}


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"note": "another"}, True),
        ({"layout": "merged"}, True),
        ({"bits": 5}, False),
        ({"terms": 3}, False),
        ({"series": "joint"}, False),
        ({"crc32": "12345678"}, False),
        ({"granularity": "per_tensor"}, False),
        ({"granularity": "per_block", "block_size": 9}, False),
    ],
)
def test_scales_of_other_settings_are_dropped(
    tmp_path: Path, fields: dict[str, Any], kept: bool
) -> None:
    path = tmp_path / "plan.json"
    _plan(_node(terms=2)).save(path)
    content = json.loads(path.read_text())
    content["nodes"][0].update(fields)
    path.write_text(json.dumps(content))
    assert bool(Plan.load(path).scales) == kept


def test_an_edited_plan_is_done(tmp_path: Path) -> None:
    proto = small.conv_model()
    path = tmp_path / "plan.json"
    onnxq.quantize(proto, plan_out=path)
    content = json.loads(path.read_text())
    content["nodes"][0] |= {"bits": 8, "terms": 1, "activations": "none", "series": "fixed_ratio"}
    path.write_text(json.dumps(content))
    result = onnxq.quantize(proto, plan=path)
    assert result.report.kinds == {"Conv: 1 term of 8 bits, float compute (fixed_ratio)": 1}


def test_a_node_can_be_left_alone_by_hand(tmp_path: Path) -> None:
    text = """g (float[2,4] x) => (float[2,4] z) {
        [first] y = MatMul (x, w)
        [second] z = MatMul (y, v)
    }"""
    proto = small.model(text, {"w": small.weights(4, 4), "v": small.weights(4, 4, seed=1)})
    path = tmp_path / "plan.json"
    onnxq.quantize(proto, plan_out=path)
    content = json.loads(path.read_text())
    content["nodes"][1]["reason"] = "the customer said so"
    path.write_text(json.dumps(content))
    report = onnxq.quantize(proto, plan=path).report
    assert report.left_alone == {"second": "the customer said so"}
    assert report.quantized == 1


def test_plan_access() -> None:
    plan = _plan(_node("a"), _node("b", reason="no"))
    assert plan["b"].reason == "no"
    assert [node.name for node in plan.quantized] == ["a"]


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 9},
        {"terms": 0},
        {"terms": 9},
        {"block_size": 4},
        {"granularity": "per_block"},
        {"granularity": "per_block", "block_size": 1},
        {"granularity": "per_block", "block_size": 8, "activations": "dynamic"},
        {"layout": "merged", "activations": "dynamic", "terms": 2, "series": "joint"},
        {"layout": "merged", "activations": "dynamic", "terms": 2, "bits": 5, "series": "digit"},
        {"color": "red"},
    ],
)
def test_contradictions(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        _node(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "merged", "activations": "dynamic", "terms": 2, "bits": 4, "series": "digit"},
        {"layout": "merged", "activations": "dynamic", "terms": 1, "bits": 8},
        {"layout": "merged", "activations": "none", "terms": 3, "bits": 8, "series": "joint"},
        {"granularity": "per_block", "block_size": 8},
    ],
)
def test_what_the_contradictions_do_not_hit(fields: dict[str, Any]) -> None:
    assert _node(**fields).quantized


def test_scales_path() -> None:
    assert scales_path(Path("a/plan.json")) == Path("a/plan.npz")
    assert scales_path(Path("plan")) == Path("plan.npz")
    with pytest.raises(ConfigError, match="give the JSON file"):
        scales_path(Path("plan.npz"))


@pytest.mark.parametrize("name", ["plan.npz", "no/plan.json"])
def test_save_where_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"plan\.npz"):
        _plan(_node()).save(name)
    assert list(tmp_path.iterdir()) == []


def test_half_a_plan_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    _plan(_node()).save(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def full(handle: int, mode: str) -> Any:
        calls.append(mode)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return fdopen(handle, mode)

    fdopen = onnxq.files.os.fdopen
    monkeypatch.setattr(onnxq.files.os, "fdopen", full)
    with pytest.raises(ConfigError, match=r"plan\.json: cannot be written \(No space left"):
        _plan(_node(terms=3)).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
