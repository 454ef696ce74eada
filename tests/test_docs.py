"""The documents say what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest

from onnxq import passes

ROOT = Path(__file__).parents[1]


def generated() -> str:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render()


def test_passes_page_is_generated_from_the_docstrings():
    page = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert page == generated(), "run `python docs/generate.py`"


@pytest.mark.parametrize("pass_", passes.PIPELINE, ids=lambda p: type(p).__name__)
def test_every_pass_states_given_and_result(pass_):
    doc = type(pass_).__doc__
    assert "Given:" in doc
    assert "Result:" in doc


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
