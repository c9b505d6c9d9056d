"""What a race comes to: one row for each contestant and seed, and the table over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from curvlib.cli.race import Entrant
from curvlib.cli.targets import Target, seconds_to

__all__ = ["Row", "Table", "failures", "result_table", "spread", "summarize", "target_table", "time_to"]

Table = tuple[list[str], list[list[str]]]
"""The column names and the rows of cells."""

_BASELINE = "sgd"


@dataclass(frozen=True)
class Row:
    """The result of one contestant with one seed.

    Parameters
    ----------
    optimizer, seed, status
        Which contestant, and how it ended.
    steps, seconds, milliseconds
        Steps done, training time, and time for a step.
    ratio
        Time for a step in units of SGD's with the same seed; NaN without SGD.
    train_loss, test_loss, test_accuracy
        At the end; NaN if the contestant diverged.
    to_targets
        Seconds to each target, None if it was not reached.
    """

    optimizer: str
    seed: int
    status: str
    steps: int
    seconds: float
    milliseconds: float
    ratio: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    to_targets: tuple[float | None, ...]


def summarize(entrants: Sequence[Entrant], targets: Sequence[Target]) -> list[Row]:
    """Return a row for each contestant that has been evaluated."""
    baselines = {entrant.seed: _milliseconds(entrant) for entrant in entrants if entrant.name == _BASELINE}
    rows = []
    for entrant in entrants:
        if not entrant.curve:
            continue
        last = entrant.curve[-1]
        final = (math.nan,) * 3 if entrant.diverged else (last.train_loss, last.test_loss, last.test_accuracy)
        milliseconds = _milliseconds(entrant)
        rows.append(
            Row(
                entrant.name,
                entrant.seed,
                "interrupted" if entrant.running else entrant.status,
                entrant.steps,
                entrant.seconds,
                milliseconds,
                milliseconds / baselines.get(entrant.seed, math.nan),
                *final,
                tuple(seconds_to(target, entrant.curve) for target in targets),
            )
        )
    return rows


def result_table(rows: Sequence[Row], reconstructs: bool) -> Table:
    """Return what each contestant came to: the mean over seeds, with the deviation if there are several."""
    quality = "test loss" if reconstructs else "test accuracy"
    cells = []
    for own in _by_optimizer(rows):
        final = [row.test_loss if reconstructs else row.test_accuracy for row in own]
        cells.append(
            [
                own[0].optimizer,
                spread([float(row.steps) for row in own], 0),
                spread([row.milliseconds for row in own], 2),
                spread([row.ratio for row in own], 2),
                spread([row.train_loss for row in own], 4),
                spread(final, 2 if reconstructs else 4),
                ", ".join(dict.fromkeys(row.status.partition(" ")[0] for row in own)),
            ]
        )
    return ["optimizer", "steps", "ms/step", "× SGD", "train loss", quality, "end"], cells


def target_table(rows: Sequence[Row], targets: Sequence[Target]) -> Table:
    """Return the seconds of training that each contestant took to each target."""
    cells = []
    for own in _by_optimizer(rows):
        times = zip(*(row.to_targets for row in own), strict=True)
        cells.append([own[0].optimizer, *(time_to(column) for column in times)])
    return ["seconds to", *map(str, targets)], cells


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each contestant that did not come to its end."""
    return [
        f"{row.optimizer} (seed {row.seed}) {row.status}"
        for row in rows
        if row.status not in ("finished", "interrupted")
    ]


def _by_optimizer(rows: Sequence[Row]) -> list[list[Row]]:
    names = dict.fromkeys(row.optimizer for row in rows)
    return [[row for row in rows if row.optimizer == name] for name in names]


def _milliseconds(entrant: Entrant) -> float:
    return entrant.seconds / entrant.steps * 1000 if entrant.steps else math.nan


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, with the standard deviation if there are several values; a dash if one is NaN."""
    if any(math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def time_to(values: Sequence[float | None]) -> str:
    """Return the mean of the times to a target over those seeds that reached it, and how many they are."""
    reached = [value for value in values if value is not None]
    if not reached:
        return "not reached"
    text = spread(reached, 1)
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)} seeds)"
