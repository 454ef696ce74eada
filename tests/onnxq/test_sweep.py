"""The front: sizes and errors that run against each other, plans that can be applied, a picture."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from budgeting import classifier, images, planned

from onnxq.errors import ConfigError
from onnxq.model import to_proto
from onnxq.plan import Plan
from onnxq.sweep import Sweep, picture, save_json, sweep
from onnxq.trial import Trial


def test_points_are_a_front_and_their_plans_give_them(tmp_path: Path) -> None:
    loaded, plan = planned(classifier())
    feeds = images(20)
    found = sweep(loaded, plan, feeds, folder=tmp_path / "plans", points=5, judge=feeds)
    assert 3 <= len(found.points) <= 5
    assert found.float_bytes == len(to_proto(loaded).SerializeToString())
    front = [point for point in found.points if point.on_front]
    for smaller, larger in pairwise(front):
        assert smaller.size < larger.size < found.float_bytes
        assert smaller.measured.energy.value > larger.measured.energy.value
        assert smaller.weight_bits < larger.weight_bits
    for point in found.points:
        assert point.size_ratio == point.size / found.float_bytes
        better = [
            p
            for p in found.points
            if p.size < point.size and p.measured.energy.value <= point.measured.energy.value
        ]
        assert point.on_front == (not better)
        assert point.plan is not None
        with Trial(loaded, feeds) as trial:
            assert trial(Plan.load(point.plan)) == (point.measured, point.size)


def test_it_reaches_from_the_smallest_to_the_most_exact(tmp_path: Path) -> None:
    loaded, plan = planned(classifier())
    found = sweep(loaded, plan, images(10), points=3)
    assert found.points[0].size == min(point.size for point in found.points)
    assert found.points[0].size < 0.2 * found.float_bytes
    assert found.points[-1].measured.relative_error < 1e-3
    assert all(point.plan is None for point in found.points)


def test_json_says_it_all(tmp_path: Path) -> None:
    loaded, plan = planned(classifier())
    found = sweep(loaded, plan, images(6), points=2, latency=True)
    save_json(found, tmp_path / "s.json")
    assert Sweep.model_validate_json((tmp_path / "s.json").read_bytes()) == found
    assert all(point.latency_ratio is not None for point in found.points)
    with pytest.raises(ConfigError):
        save_json(found, tmp_path / "missing" / "s.json")


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    loaded, plan = planned(classifier())
    found = sweep(loaded, plan, images(6), points=2)
    picture(found, tmp_path / "s.svg")
    assert ElementTree.parse(tmp_path / "s.svg").getroot().tag.endswith("svg")  # noqa: S314
    with pytest.raises(ConfigError, match="cannot be written"):
        picture(found, tmp_path / "missing" / "s.svg")


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = Sweep(float_bytes=1, stated="", points=())
    with pytest.raises(ConfigError, match=r"onnxq\[plot\]"):
        picture(found, tmp_path / "s.svg")


def test_too_few_points() -> None:
    with pytest.raises(ConfigError, match="--points 1"):
        sweep(*planned(classifier()), images(2), points=1)
