"""Small Sphinx parts of this site: formulas as MathML (no script, no network), names and formulas of docstrings."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

_ATTRIBUTE = re.compile(r"(?<!`)`(\.\w+)`(?!`)")
"""Something like `` `.grad` ``."""


def inline(writer: Any, node: nodes.math) -> None:
    """Write a formula in a line."""
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def displayed(writer: Any, node: nodes.math_block) -> None:
    """Write a formula that stands by itself."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def by_last_name(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    """Link `` `Factors` `` to ``curvlib.factors.Factors``, and ``curvlib.compose`` to where it is documented.

    Where several objects bear the name, the one of the same room, then the one with the shortest name.
    """
    target = node.get("reftarget", "").removeprefix("curvlib.")
    if node.get("refdomain") not in ("py", "", None) or not target:
        return None
    domain = env.get_domain("py")
    found = [name for name in domain.objects if name.endswith(f".{target}") and name.startswith("curvlib.")]
    if not found:
        return None
    room = node.get("py:module") or ""
    name = min(found, key=lambda one: (not one.startswith(f"{room}."), one.count("."), one))
    entry = domain.objects[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def formulas(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show an indented formula of a docstring as it stands, where reStructuredText would see a quotation."""
    for place, line in enumerate(lines):
        lines[place] = _ATTRIBUTE.sub(r"``\1``", line)  # a role would drop the dot
    for place, line in reversed(list(enumerate(lines))):
        before = lines[place - 2] if place > 1 and not lines[place - 1].strip() else ""
        text_before = before[:1].strip() and not before.startswith((":", "..", "-", "*", ">>>")) and before[-2:] != "::"
        if line.startswith("    ") and text_before:
            lines[place:place] = ["::", ""]


class ByNumber:
    """Order of the gallery's scripts: by the number in their names, the tenth after the ninth."""

    def __init__(self, folder: str) -> None:
        pass

    def __call__(self, filename: str) -> int:
        return int(re.search(r"\d+", str(filename).rsplit("/")[-1])[0])  # each has one


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the parts."""
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    app.connect("missing-reference", by_last_name)
    app.connect("autodoc-process-docstring", formulas, priority=600)  # after napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
