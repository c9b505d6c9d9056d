"""Write docs/variants.md from the recipes: what each published method chooses for every part.

python docs/generate_variants.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from curvlib.precond import recipes

HERE = Path(__file__).parent
HEAD = """# Published variants

<!-- Written by docs/generate_variants.py from the recipes; edit those, not this. -->

Each row is a recipe of `curvlib.precond.recipes` with its defaults: a choice of parts, which
[Compose a new variant](compose-a-variant.md) shows how to make yourself.

| recipe | Fisher | solver | damping | refresh | transforms | method |
| --- | --- | --- | --- | --- | --- | --- |
"""


def row(name: str) -> str:
    """Return the table's line for one recipe, from an optimizer that it makes."""
    recipe = getattr(recipes, name)
    optimizer = recipe(torch.nn.Linear(3, 2))
    (solver,) = set(optimizer.solvers.values())
    transforms = ", ".join(f"`{transform}`" for transform in optimizer.transforms)
    parts = [f"`{part}`" for part in (optimizer.fisher, solver, optimizer.damping, optimizer.refresh)]
    method = recipe.__doc__.strip().splitlines()[0].replace("|", "")
    return "| " + " | ".join([f"`{name}`", *parts, transforms, method]) + " |\n"


def text() -> str:
    """Return the whole page."""
    return HEAD + "".join(row(name) for name in sorted(recipes.__all__))


if __name__ == "__main__":
    (HERE / "variants.md").write_text(text(), encoding="utf-8")
