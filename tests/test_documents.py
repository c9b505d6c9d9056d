"""Code in the documents runs, examples in docstrings are right, links lead somewhere, public names are documented."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import curvlib
from curvlib.layers import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
NOT_RUN = "(shown, not run here)"
"""What the caption of a block of another library's code says."""

FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^\.\. (?:autoclass|autofunction|autoexception|data):: (\S+)", flags=re.MULTILINE)


def text(document):
    return document.read_text(encoding="utf-8")


def name_of(document):
    return str(document.relative_to(ROOT))


def blocks(document):
    return [code for kind, code in FENCE.findall(text(document)) if kind == "python"]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Nothing that a page registers or sets outlives it."""
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=name_of)
def test_python_blocks_run_one_after_the_other(document, capsys):
    names = {}
    for block in blocks(document):
        exec(compile(block, name_of(document), "exec"), names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_python_is_shown_that_does_not_run(document):
    """Unless it is another library's, and says so."""
    for kind, code in FENCE.findall(text(document)):
        if kind == "{code-block}":
            assert re.search(r"^:caption: .*" + re.escape(NOT_RUN) + "$", code, flags=re.MULTILINE), code
        else:
            assert kind in ("python", "text", "sh", "{toctree}", "{eval-rst}", "{math}"), kind


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(curvlib.__path__, "curvlib.") if "__main__" not in m.name]
)
def test_docstring_examples_are_right(name):
    if name == "curvlib.arrays.cupy_kernels":
        pytest.importorskip("cupy")
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_between_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", FENCE.sub("", text(document))):
        assert (document.parent / target).exists(), target


def test_every_page_has_a_place_in_the_site():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        for kind, body in FENCE.findall(text(page)):
            if kind == "{toctree}":
                entries = [line for line in body.splitlines() if line and not line.startswith(":")]
                listed.update(match for entry in entries for match in page.parent.glob(f"{entry}.md"))
    assert {page.resolve() for page in PAGES} == {page.resolve() for page in listed}


# -- the API reference ------------------------------------------------------------------------------------------------

ROOMS = [*(n for n in curvlib.__all__ if inspect.ismodule(getattr(curvlib, n)) and n != "recipes"), "capture", "errors"]
API = "\n".join(text(page) for page in sorted((DOCS / "api").glob("*.md")))


def found(qualified):
    """What a documented name stands for."""
    room, _, name = qualified.rpartition(".")
    return getattr(importlib.import_module(room), name)


def test_every_public_name_is_in_the_api_reference():
    documented = DIRECTIVE.findall(API)
    things = {id(found(name)) for name in documented if inspect.isroutine(found(name)) or inspect.isclass(found(name))}
    missing = [
        f"curvlib.{room}.{name}"
        for room in [*ROOMS, "precond.recipes"]
        for name in importlib.import_module(f"curvlib.{room}").__all__
        if f"curvlib.{room}.{name}" not in documented
        and id(getattr(importlib.import_module(f"curvlib.{room}"), name)) not in things
    ]
    assert missing == []


def test_the_api_reference_has_nothing_else():
    names = DIRECTIVE.findall(API)
    assert len(names) == len(set(names))
    private = [
        name
        for name in names
        if name.rpartition(".")[2] not in importlib.import_module(name.rpartition(".")[0]).__all__
    ]
    assert private == []


def test_top_level_names_are_listed_with_their_purpose():
    listed = set(re.findall(r"`curvlib\.(\w+)`", text(DOCS / "api" / "index.md")))
    assert listed == {name for name in curvlib.__all__ if not inspect.ismodule(getattr(curvlib, name))} | {"recipes"}


def test_public_names_exist_and_are_documented():
    for name in curvlib.__all__:
        assert getattr(curvlib, name).__doc__, name


# -- the exercise -----------------------------------------------------------------------------------------------------


def test_the_exercise_is_tengrad_with_reduced_kfac_on_convolutions_in_under_twenty_lines():
    """The solution differs from the recipe in the solver of convolutions alone."""
    page = DOCS / "compose-a-variant.md"
    exercise = text(page).partition("## Exercise")[2]
    (solution,) = [code for kind, code in FENCE.findall(exercise) if kind == "python"]
    composing = solution[: solution.index("curvlib.Categorical().loss")]
    assert len(composing.splitlines()) < 20
    names = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    model, optimizer = names["model"], names["optimizer"]
    optimizer.detach()
    kinds = {name: type(model.get_submodule(name)) for name in optimizer.solvers}
    for name, solver in optimizer.solvers.items():
        expected = curvlib.solvers.KFAC("reduce", decay=0.0) if kinds[name] is torch.nn.Conv2d else curvlib.Woodbury()
        assert solver == expected
    assert {torch.nn.Conv2d, torch.nn.Linear} == set(kinds.values())
    recipe = curvlib.TENGraD(model)
    for part in ("fisher", "damping", "refresh", "transforms"):
        assert getattr(optimizer, part) == getattr(recipe, part)
    assert optimizer.param_groups[0]["lr"] == recipe.param_groups[0]["lr"]
    recipe.detach()
