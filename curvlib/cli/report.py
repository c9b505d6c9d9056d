"""The files of a finished race: curves and summary as CSV, configuration as JSON, plots, and a report in Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from curvlib.cli.contestants import CONTESTANTS, Value
from curvlib.cli.evaluation import Evaluation
from curvlib.cli.models import MODELS
from curvlib.cli.outputs import write_text
from curvlib.cli.plots import write_plots
from curvlib.cli.race import Entrant, RaceRules
from curvlib.cli.summary import Row, Table, failures, result_table, target_table
from curvlib.cli.targets import Target
from curvlib.cli.tasks import Task

__all__ = ["csv_text", "markdown", "write_outputs"]


def write_outputs(
    folder: Path,
    task: Task,
    rules: RaceRules,
    entrants: Sequence[Entrant],
    rows: Sequence[Row],
    targets: Sequence[Target],
    contestants: Mapping[str, Mapping[str, Value]],
    configuration: Mapping[str, object],
    *,
    interrupted: bool,
) -> None:
    """Write every file of a race into its folder.

    Raises
    ------
    DataError
        If a file cannot be written.
    """
    write_text(folder / "curves.csv", _curves(entrants))
    write_text(folder / "summary.csv", _summary(rows, targets))
    write_text(folder / "config.json", json.dumps(configuration, indent=2) + "\n")
    title = f"{task.model_name} on {task.dataset.name}, batch {rules.batch_size}"
    plots = write_plots(folder, entrants, title, task.reconstructs) if rows else []
    text = _report(task, rules, rows, targets, contestants, configuration, plots, interrupted)
    write_text(folder / "report.md", text)


def _curves(entrants: Sequence[Entrant]) -> str:
    names = [field.name for field in fields(Evaluation)]
    lines = [
        [entrant.name, entrant.seed, *(_number(getattr(point, name)) for name in names)]
        for entrant in entrants
        for point in entrant.curve
    ]
    return csv_text(["optimizer", "seed", *names], lines)


def _summary(rows: Sequence[Row], targets: Sequence[Target]) -> str:
    names = [field.name for field in fields(Row) if field.name != "to_targets"]
    header = [*names, *(f"seconds_to_{target.quantity}_{target.value:g}" for target in targets)]
    lines = []
    for row in rows:
        values = asdict(row)
        times = ["" if time is None else _number(time) for time in row.to_targets]
        lines.append([*(_number(values[name]) for name in names), *times])
    return csv_text(header, lines)


def _number(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def csv_text(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """Return lines as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return buffer.getvalue()


def _report(
    task: Task,
    rules: RaceRules,
    rows: Sequence[Row],
    targets: Sequence[Target],
    contestants: Mapping[str, Mapping[str, Value]],
    configuration: Mapping[str, object],
    plots: Sequence[str],
    interrupted: bool,
) -> str:
    dataset = task.dataset
    parts = [f"# Race: {task.model_name} on {dataset.name}"]
    if interrupted:
        parts.append("**Interrupted**: the figures are those of the training time until then.")
    if dataset.note:
        parts.append(f"**Other data than usual**: {dataset.note}")
    if rows:
        parts.append(markdown(result_table(rows, task.reconstructs)))
        if targets:
            parts.append(markdown(target_table(rows, targets)))
        parts += [f"- {failure}" for failure in failures(rows)]
    else:
        parts.append("Nothing was measured.")
    parts.append(_reading(task, rules))
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    parts.append("## Data and network")
    parts.append(
        f"- Data: {dataset.name}, from {dataset.source}: {len(dataset.train_images)} training and "
        f"{len(dataset.test_images)} test images of {'x'.join(map(str, dataset.shape))}, "
        + (
            "pixels scaled to [0, 1]"
            if task.reconstructs
            else "normalised by the training set's mean and deviation of each channel"
        )
        + (", shifted by up to 4 pixels and mirrored at random.\n" if task.augment else ", not augmented.\n")
        + f"- Network: {MODELS[task.model_name].description}.\n"
        f"- Loss: {'binary cross-entropy summed over pixels' if task.reconstructs else 'cross-entropy'}, "
        "mean over samples."
    )
    parts.append("## Hyperparameters")
    parts.append(_hyperparameters(contestants))
    parts.append("## Machine")
    environment = configuration.get("environment")
    if isinstance(environment, Mapping):
        parts.append("\n".join(f"- {key}: {value}" for key, value in environment.items()))
    parts.append(
        "All settings: [config.json](config.json). Curves: [curves.csv](curves.csv). "
        "Each contestant and seed: [summary.csv](summary.csv)."
    )
    return "\n\n".join(parts) + "\n"


def _reading(task: Task, rules: RaceRules) -> str:
    train = min(rules.evaluation_samples, len(task.train_inputs))
    test = min(rules.evaluation_samples, len(task.test_inputs))
    return (
        f"Every contestant trained for {rules.seconds:g} s from the same initial parameters with the same batches of "
        f"{rules.batch_size} in the same order, in turns of {rules.turn:g} s with the others. All that its optimizer "
        f"does is in its time; {rules.warmup_steps} warm-up steps on a throw-away copy and the evaluations are not. "
        f"Losses and accuracies are those of the first {train} training and {test} test samples. They were taken every "
        f"{rules.evaluate_every:g} s of training, and the time to a target is that of the first evaluation that meets "
        "it. Learning rates are constant."
    )


def _hyperparameters(contestants: Mapping[str, Mapping[str, Value]]) -> str:
    lines = []
    for name, values in contestants.items():
        contestant = CONTESTANTS[name]
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        grid = "; ".join(f"{key} in {', '.join(map(str, tried))}" for key, tried in contestant.grid.items())
        origin = f"grid: {grid} ({contestant.grid_note})" if grid else contestant.grid_note
        lines.append(f"- **{name}** ({contestant.description}): {shown}. Defaults: {origin}.")
    lines.append(
        "\nWeight decay acts as each method's users expect: for SGD and the curvature methods it is added to the "
        "step in the usual coupled way and equal by default, AdamW decouples it, Adam has none."
    )
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """Return a table as Markdown, numbers to the right."""
    header, cells = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
