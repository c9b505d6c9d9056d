"""Code in the documents runs, and so do the examples in docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import curvlib
from curvlib.layers import registry

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


def blocks(document):
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda path: path.name)
def test_python_blocks_run_one_after_the_other(document, capsys):
    names = {}
    for block in blocks(document):
        exec(compile(block, document.name, "exec"), names)


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(curvlib.__path__, "curvlib.") if "__main__" not in m.name]
)
def test_docstring_examples_are_right(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_public_names_exist_and_are_documented():
    for name in curvlib.__all__:
        assert getattr(curvlib, name).__doc__, name
