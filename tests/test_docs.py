"""The documents say what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest

from onnxq import passes

ROOT = Path(__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = generator()


@pytest.mark.parametrize("name", ["passes.md", "forms.md"])
def test_generated_pages_are_up_to_date(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == GENERATOR.pages()[name], "run `python docs/generate.py`"


KINDS = [
    *(type(pass_) for pass_ in passes.PIPELINE),
    *GENERATOR.ON_DEMAND,
    *GENERATOR.PLANNING,
    *GENERATOR.EXPANSION,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_pass_states_given_and_result(kind):
    doc = kind.__doc__
    assert "Given:" in doc
    assert "Result:" in doc


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
