"""The race's curves as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curvlib.cli.evaluation import Evaluation
from curvlib.cli.outputs import write_atomically
from curvlib.cli.race import Entrant
from curvlib.errors import ConfigurationError

__all__ = ["require_matplotlib", "write_plots"]

_LABELS = {
    "seconds": "training time in seconds",
    "step": "training steps",
    "train_loss": "training loss",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
}


def require_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises
    ------
    ConfigurationError
        If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("the race's plots need matplotlib: pip install 'curvlib[race]'") from error


def write_plots(folder: Path, entrants: Sequence[Entrant], title: str, reconstructs: bool) -> list[str]:
    """Draw the curves and return the names of the files."""
    quality = "test_loss" if reconstructs else "test_accuracy"
    names = []
    for y, x in (("train_loss", "seconds"), ("train_loss", "step"), (quality, "seconds")):
        name = f"{y}_{x}.png"
        write_atomically(folder / name, _draw(entrants, x, y, title))
        names.append(name)
    return names


def _draw(entrants: Sequence[Entrant], x: str, y: str, title: str) -> bytes:
    # A canvas of its own instead of pyplot, whose current figure and backend are global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    colours: dict[str, str] = {}
    smallest = math.inf
    for entrant in entrants:
        points = [point for point in entrant.curve if math.isfinite(_value(point, y))]
        label = None if entrant.name in colours else entrant.name
        colour = colours.setdefault(entrant.name, f"C{len(colours) % 10}")
        values = [_value(point, y) for point in points]
        smallest = min([smallest, *values])
        axes.plot([_value(point, x) for point in points], values, color=colour, label=label, marker=".", linewidth=1.2)
    if y.endswith("loss") and smallest > 0:
        axes.set_yscale("log")
    axes.set(xlabel=_LABELS[x], ylabel=_LABELS[y], title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    buffer = io.BytesIO()
    # Without the metadata the same curves give the same bytes.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _value(point: Evaluation, name: str) -> float:
    return float(getattr(point, name))
