"""Which part may import which, and what may be used only at the boundary to model files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = {"onnxq.passes": ROOT / "passes", "onnxq.kernels_ref": ROOT / "kernels_ref"}

# A module imports its own layer and the ones before it.
LAYERS = (
    ("onnxq.kernels_ref",),
    ("onnxq.errors", "onnxq.files", "onnxq.plan", "onnxq.model"),
    ("onnxq.passes",),
    (
        *("onnxq.pipeline", "onnxq.session", "onnxq.feeds", "onnxq.comparison", "onnxq.validation"),
        "onnxq.without_data",
        *("onnxq.calibration", "onnxq.calibration_sources", "onnxq.images"),
    ),
    ("onnxq",),  # api, report, inspection, and whatever is not named here
    ("onnxq.show",),
    ("onnxq.commands",),
    ("onnxq.cli",),
)


def _modules() -> dict[str, ast.Module]:
    """The source of each module of the package, by its import name."""
    found = {}
    for package, folder in {"onnxq": ROOT / "onnxq", **HOME}.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(path.read_text(), str(path))
    return found


MODULES = _modules()


def _layer(module: str) -> int:
    named = {name: index for index, names in enumerate(LAYERS) for name in names}
    return named[module] if module in named else _layer(module.rpartition(".")[0])


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def test_the_source_is_found() -> None:
    for name in ("onnxq", "onnxq.cli", "onnxq.model.boundary", "onnxq.passes.expand"):
        assert name in MODULES
    assert len([name for name in MODULES if name.startswith("onnxq.kernels_ref")]) > 10


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name != "onnxq"))
def test_imports_point_one_way(module: str) -> None:
    own = _layer(module)
    above = [name for name in _imports(MODULES[module]) if name.split(".")[0] == "onnxq"]
    assert [name for name in above if _layer(name) > own] == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("onnxq.kernels_ref")))
def test_kernels_need_numpy_alone(module: str) -> None:
    roots = {name.split(".")[0] for name in _imports(MODULES[module])}
    assert roots <= {"onnxq", "numpy", *sys.stdlib_module_names}


OUTSIDE = sorted(name for name in MODULES if not name.startswith("onnxq.model"))


@pytest.mark.parametrize("module", OUTSIDE)
def test_model_files_are_touched_in_one_place(module: str) -> None:
    """Gs reads and writes models with losses of its own; `onnxq.model` makes up for them."""
    assert list(_misuses(MODULES[module])) == []


def _misuses(tree: ast.Module) -> Iterator[str]:
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr == "values" and id(node) not in called:  # dict.values() is a call
                yield f"line {node.lineno}: .values; use onnxq.model.values"
            if node.attr == "Constant" and id(node) in called:
                yield f"line {node.lineno}: Constant(); use onnxq.model.constant"
            if node.attr in ("import_onnx", "export_onnx"):
                yield f"line {node.lineno}: {node.attr}; use onnxq.model.load and save"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            banned = names & {"pickle", "Constant", "import_onnx", "export_onnx"}
            yield from (f"line {node.lineno}: import of {name}" for name in sorted(banned))


@pytest.mark.parametrize(
    "code",
    [
        "tensor.values",
        "tensor.values = array",
        "tensor.values.sum()",
        "gs.Constant('w', array)",
        "gs.import_onnx(proto)",
        "f = gs.export_onnx",
        "import pickle",
        "from pickle import loads",
        "from onnx_graphsurgeon import Constant",
    ],
)
def test_misuses_are_seen(code: str) -> None:
    assert len(list(_misuses(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code", ["{}.values()", "isinstance(tensor, gs.Constant)", "values(tensor)", "import onnx"]
)
def test_proper_uses_are_not(code: str) -> None:
    assert list(_misuses(ast.parse(code))) == []


def test_kernels_load_without_onnx() -> None:
    code = """
import sys
import onnxq.kernels_ref
heavy = {"onnx", "onnx_graphsurgeon", "onnxruntime", "pydantic", "typer", "rich"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,  # the installed package, not the folder of the sources
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
