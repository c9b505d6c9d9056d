"""Write docs/variants.md from the recipes: what each published method chooses for every part.

python docs/generate_variants.py
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from curvlib.precond import Momentum, Transform, WeightDecay, recipes

HERE = Path(__file__).parent
HEAD = """# Published variants

<!-- Written by docs/generate_variants.py from the recipes; edit those, not this. -->

Each is a recipe of `curvlib.recipes` with its defaults: a choice of parts, which
[Compose a new variant](compose-a-variant.md) shows how to make yourself. Options of solvers that are as by default are
left out, and transforms that leave the step as it is.

| recipe | Fisher | solver | damping | refresh | transforms |
| --- | --- | --- | --- | --- | --- |
"""
FOOT = """
What each is:

"""


def short(part: Any, numbers: bool = False) -> str:
    """Return how one would write a part: without the options that are as by default.

    Parameters
    ----------
    part
        A solver, a transform and the like.
    numbers
        Whether its first option is always said, without its name.
    """
    options = []
    for place, field in enumerate(fields(part)):
        value, default = getattr(part, field.name), field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if default is MISSING or (numbers and place == 0):
            options.append(repr(value))
        elif field.init and value != default:
            options.append(f"{field.name}={value!r}")
    return f"{type(part).__name__}({', '.join(options)})"


def idle(transform: Transform) -> bool:
    """Whether a transform leaves every step as it is."""
    return transform in (Momentum(0.0), WeightDecay(0.0))


def parts(name: str) -> str:
    """Return the table's line for one recipe, from an optimizer that it makes."""
    optimizer = getattr(recipes, name)(torch.nn.Linear(3, 2))
    (solver,) = set(optimizer.solvers.values())
    transforms = ", ".join(
        f"`{short(transform, numbers=True)}`" for transform in optimizer.transforms if not idle(transform)
    )
    chosen = [f"`{short(part)}`" for part in (optimizer.fisher, solver, optimizer.damping, optimizer.refresh)]
    return "| " + " | ".join([f"`{name}`", *chosen, transforms]) + " |\n"


def method(name: str) -> str:
    """Return a line that says what a recipe is."""
    first = getattr(recipes, name).__doc__.strip().splitlines()[0]
    return f"- `{name}`: {first}\n"


def text() -> str:
    """Return the whole page."""
    names = sorted(recipes.__all__)
    return HEAD + "".join(map(parts, names)) + FOOT + "".join(map(method, names))


if __name__ == "__main__":
    (HERE / "variants.md").write_text(text(), encoding="utf-8")
