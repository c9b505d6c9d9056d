"""Write docs/support.md from the registry: ``python docs/generate_support.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from curvlib.layers import Adapter, registered

HEAD = """# Which layers are supported

<!-- Written by docs/generate_support.py from the registry; edit that, not this. -->

Every parametrised module has exact rows, or the model is refused with an error that says why. A class below, and a
subclass of it, has an adapter of its own. A module made of such layers (`torch.nn.Transformer` and its parts, your own
networks) is covered layer by layer. Any other module that holds parameters is covered by the `torch.func` fallback,
which is exact and slower; what becomes of parameters beside other layers (class tokens, positional embeddings) is yours
to say by `rest=`. `curvlib.explain(model, x)` shows it for each parameter, and
[Write your own adapter](write-an-adapter.md) how to add a layer.

"""

FOOT = """
*Form*: "closed" where rows come from formulas, "fallback" where the module runs again for every sample. *Samples*:
"first axis" where the samples have to come first in what the layer is called with, "any but last" where they may be on
any axis but the last, "as the layer says" where the adapter looks at the layer's own options. *Coupled*: "yes", or
"depends" where a mode of the module decides, if the outputs of one sample depend on the others; rows are then each
sample's share of the gradient at the layer's activations.
"""


def support_table() -> str:
    """Return the whole page."""
    groups: dict[int, tuple[Adapter, list[str]]] = {}
    for kind, adapter in registered().items():
        if kind.__module__.startswith("torch."):
            groups.setdefault(id(adapter.function), (adapter, []))[1].append(kind.__name__)
    rows = sorted((", ".join(f"`{name}`" for name in sorted(names)), adapter) for adapter, names in groups.values())
    lines = ["| torch.nn | rows | form | samples | coupled |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {names} | {_summary(adapter)} | {' | '.join(_traits(adapter))} |" for names, adapter in rows]
    return HEAD + "\n".join(lines) + "\n" + FOOT


def _summary(adapter: Adapter) -> str:
    document = inspect.getdoc(adapter.function) or adapter.name
    return document.splitlines()[0].rstrip(".").replace("|", "\\|")


def _traits(adapter: Adapter) -> tuple[str, str, str]:
    samples = "any but last" if adapter.positionwise else "as the layer says" if adapter.whole_call else "first axis"
    coupled = "depends" if callable(adapter.couples_samples) else "yes" if adapter.couples_samples else "no"
    return ("closed" if adapter.closed_form else "fallback"), samples, coupled


if __name__ == "__main__":
    Path(__file__).with_name("support.md").write_text(support_table(), encoding="utf-8")
