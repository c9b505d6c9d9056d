"""The layout: rooms import only downwards, tests mirror rooms, files stay readable."""

from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "curvlib").rglob("*.py"))


def test_import_contracts_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "curvlib").iterdir() if (p / "__init__.py").exists()))
def test_every_room_has_its_tests(room):
    assert list((ROOT / "tests" / room).glob("test_*.py"))


def test_files_stay_readable():
    assert {path.name: n for path in SOURCES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400} == {}


def test_the_package_is_typed_and_versioned():
    import curvlib

    assert (ROOT / "curvlib" / "py.typed").exists()
    assert f'version = "{curvlib.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
