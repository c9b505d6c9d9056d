"""Training curves as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from curvlib.cli.evaluation import Evaluation
from curvlib.cli.outputs import write_atomically
from curvlib.errors import ConfigurationError

__all__ = ["Drawn", "require_matplotlib", "write_plots"]

_LABELS = {
    "seconds": "training time in seconds",
    "step": "training steps",
    "epoch": "epochs",
    "train_loss": "training loss",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
}


class Drawn(Protocol):
    """What has a curve and the name of an optimizer; those of one name have one colour."""

    @property
    def name(self) -> str:
        """Name in the legend."""

    @property
    def curve(self) -> Sequence[Evaluation]:
        """Evaluations in their order."""


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
        raise ConfigurationError("plots need matplotlib: pip install 'curvlib[race]'") from error


def write_plots(
    folder: Path, entrants: Sequence[Drawn], title: str, reconstructs: bool, epoch_steps: int | None = None
) -> list[str]:
    """Draw the curves and return the names of the files.

    Parameters
    ----------
    folder
        Where to put them.
    entrants
        Whose curves are drawn.
    title
        Title of each plot.
    reconstructs
        Whether there is a test loss to show instead of an accuracy.
    epoch_steps
        Steps in an epoch, for curves against epochs instead of steps.
    """
    quality = "test_loss" if reconstructs else "test_accuracy"
    panels = [("train_loss", "seconds"), ("train_loss", "epoch" if epoch_steps else "step"), (quality, "seconds")]
    if epoch_steps:
        panels.append((quality, "epoch"))
    names = []
    for y, x in panels:
        name = f"{y}_{x}.png"
        write_atomically(folder / name, _draw(entrants, x, y, title, epoch_steps or 1))
        names.append(name)
    return names


def _draw(entrants: Sequence[Drawn], x: str, y: str, title: str, epoch_steps: int) -> bytes:
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
        places = [point.step / epoch_steps if x == "epoch" else _value(point, x) for point in points]
        axes.plot(places, values, color=colour, label=label, marker=".", linewidth=1.2)
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
