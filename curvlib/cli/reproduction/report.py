"""The report of an experiment: Markdown, CSV, JSON and plots, all from the same plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from curvlib.cli.evaluation import Evaluation
from curvlib.cli.outputs import write_text
from curvlib.cli.plots import write_plots
from curvlib.cli.report import csv_text, markdown
from curvlib.cli.reproduction.results import Outcome, curve, outcomes
from curvlib.cli.summary import Table, spread, time_to

__all__ = ["cost_table", "headline", "outcome_table", "report_text", "target_tables", "write_report"]

Results = Mapping[str, Any]


@dataclass(frozen=True)
class _Drawn:
    name: str
    curve: list[Evaluation]


def write_report(folder: Path, results: Results) -> None:
    """Write every file of an experiment's report.

    Raises
    ------
    DataError
        If a file cannot be written.
    """
    per_epoch = results["plan"]["steps_per_epoch"]
    drawn = [_Drawn(run["identity"]["optimizer"], curve(run)) for run in results["runs"]]
    plots = write_plots(folder, drawn, results["title"], results["reconstructs"], per_epoch) if drawn else []
    write_text(folder / "results.json", _json(results))
    write_text(folder / "curves.csv", _curves(results))
    write_text(folder / "summary.csv", _summary(results))
    write_text(folder / "report.md", report_text(results, plots))


def report_text(results: Results, plots: Sequence[str] = ()) -> str:
    """Return the report as Markdown."""
    parts = [f"# {results['title']}", headline(results), markdown(outcome_table(results))]
    parts += [f"- {run['identity']['optimizer']} (seed {run['identity']['seed']}) {run['status']}"
              for run in results["runs"] if run["status"] != "finished"]  # fmt: skip
    if results["targets"]:
        parts.append("## Time to target")
        parts += [markdown(table) for table in target_tables(results)]
    parts += ["## Inversion and memory", _COST, markdown(cost_table(results))]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots]
    parts += ["## Hyperparameters", markdown(_hyperparameters(results))]
    parts.append("Choices that neither the paper nor its authors' code states:")
    choices = results["plan"]["experiment"]["choices"]
    parts.append("\n".join(f"- `{key}`: {reason}" for key, reason in choices.items()))
    parts.append("## Machine")
    parts.append("\n".join(f"- {key}: {value}" for key, value in results["environment"].items()))
    return "\n\n".join(parts) + "\n"


_COST = (
    "Milliseconds to invert all blocks, from rows of one batch that are there already: *update* takes them into Gram "
    "matrices, averaged Kronecker factors or (EKFAC) eigenbases that follow, *factorise* makes the damped inverse (for "
    "a quasi-Newton method, its BFGS update), *solve* the natural gradient. Medians, measured apart from the runs. "
    "Memory is the peak of three training steps."
)


def headline(results: Results) -> str:
    """Return a sentence on what was run at what size."""
    plan, data = results["plan"], results["data"]
    whole = plan["scale"] == 1 and plan["epochs"] == plan["experiment"]["epochs"]
    size = "At full size" if whole else f"**At reduced size** (scale {plan['scale']:g})"
    width = "" if plan["width"] == 1 else f", hidden layers {plan['width']:g} times as wide"
    unfinished = "" if results["complete"] else " **Interrupted: some runs are missing.**"
    return (
        f"{size}: {plan['train_samples']} training and {plan['test_samples']} test images of {data['name']} "
        f"({data['source']}), batches of {plan['batch_size']}, {plan['epochs']} epochs of {plan['steps_per_epoch']} "
        f"steps{width}; {results['network']}; {results['parameters']} parameters. Mean ± standard deviation over "
        f"{plan['seeds']} seeds. Losses and accuracies are those of the first "
        f"{plan['experiment']['evaluation_samples']} samples at most, in evaluation mode.{unfinished}"
    )


def outcome_table(results: Results) -> Table:
    """Return what each optimizer came to."""
    reconstructs = results["reconstructs"]
    quality, digits = ("test loss", 2) if reconstructs else ("test accuracy", 4)
    baselines = {run.seed: run.milliseconds for run in outcomes(results) if run.optimizer == "sgd"}

    def ratio(run: Outcome) -> float | None:
        base = baselines.get(run.seed)
        return run.milliseconds / base if run.milliseconds is not None and base else None

    def epoch(run: Outcome) -> float | None:
        return run.seconds / run.epochs if run.epochs else None

    columns: list[tuple[str, Callable[[Outcome], float | None], int]] = [
        ("ms/step", lambda run: run.milliseconds, 2),
        ("× SGD", ratio, 2),
        ("s/epoch", epoch, 2),
        ("final train loss", lambda run: run.train_loss, 4),
        (f"final {quality}", lambda run: run.test_loss if reconstructs else run.test_accuracy, digits),
        (f"best {quality}", lambda run: run.best, digits),
    ]
    if not reconstructs:
        columns.insert(4, ("final test loss", lambda run: run.test_loss, 4))
    cells = []
    for name, own in _by_optimizer(results).items():
        numbers = [spread([_nan(read(run)) for run in own], places) for _, read, places in columns]
        cells.append([name, *numbers, ", ".join(dict.fromkeys(run.status.partition(" ")[0] for run in own))])
    return ["optimizer", *(title for title, _, _ in columns), "end"], cells


def target_tables(results: Results) -> tuple[Table, Table]:
    """Return the seconds, and the epochs, that each optimizer took to each target."""
    labels = [target["label"] for target in results["targets"]]
    tables = []
    for place, what in enumerate(("seconds to", "epochs to")):
        cells = []
        for name, own in _by_optimizer(results).items():
            reached = zip(*(run.to_targets for run in own), strict=True)
            cells.append([name, *(time_to([None if at is None else at[place] for at in times]) for times in reached)])
        tables.append(([what, *labels], cells))
    return tables[0], tables[1]


def cost_table(results: Results) -> Table:
    """Return the time to invert all blocks and the peak of memory, of each optimizer."""
    base = results["costs"].get("sgd", {}).get("memory")
    cells = []
    for name, cost in results["costs"].items():
        parts, memory = cost["inversion"] or {}, cost["memory"]
        times: list[Any] = [parts.get(part) for part in ("update", "factorize", "solve")]
        sums = [None, None] if None in times else [times[1] + times[2], sum(times)]
        above = None if memory is None or base is None else memory - base
        shown = [_number(time, 2) for time in (*times, *sums)]
        cells.append([name, str(parts.get("blocks", "-")), *shown, _number(memory, 0), _number(above, 0)])
    titles = ["update", "factorise", "solve", "factorise + solve", "all three"]
    return ["optimizer", "blocks", *titles, "peak MB", "MB above SGD"], cells


def _hyperparameters(results: Results) -> Table:
    chosen = results["plan"]["hyperparameters"]
    cells = [[name, ", ".join(f"{key} {value}" for key, value in own.items())] for name, own in chosen.items()]
    return ["optimizer", "hyperparameters"], cells


def _by_optimizer(results: Results) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for run in outcomes(results):
        groups.setdefault(run.optimizer, []).append(run)
    return {name: groups[name] for name in results["plan"]["optimizers"] if name in groups}


def _curves(results: Results) -> str:
    names = [field.name for field in fields(Evaluation)]
    per_epoch = results["plan"]["steps_per_epoch"]
    lines = [
        [run["identity"]["optimizer"], run["identity"]["seed"], f"{point['step'] / per_epoch:.6g}",
         *(_cell(point[name]) for name in names)]
        for run in results["runs"] for point in run["curve"]
    ]  # fmt: skip
    return csv_text(["optimizer", "seed", "epoch", *names], lines)


def _summary(results: Results) -> str:
    names = [field.name for field in fields(Outcome) if field.name != "to_targets"]
    labels = [target["label"] for target in results["targets"]]
    header = [*names, *(f"{unit} to {label}" for label in labels for unit in ("seconds", "epochs"))]
    lines = [
        [*(_cell(getattr(run, name)) for name in names), *(_cell(number) for number in _flat(run))]
        for run in outcomes(results)
    ]
    return csv_text(header, lines)


def _flat(run: Outcome) -> list[float | None]:
    """Seconds and epochs to the first target, to the second, and so on."""
    return [number for reached in run.to_targets for number in (reached or (None, None))]


def _json(results: Results) -> str:
    # One line a point of a curve: a change of the data is then readable as a difference of files.
    text = json.dumps({**results, "runs": []}, indent=1, ensure_ascii=False)
    runs = []
    for run in results["runs"]:
        points = ",\n   ".join(json.dumps(point) for point in run["curve"])
        whole = json.dumps({**run, "curve": []}, ensure_ascii=False)
        runs.append("  " + whole.replace('"curve": []', f'"curve": [\n   {points}\n  ]'))
    return text.replace('"runs": []', '"runs": [\n' + ",\n".join(runs) + "\n ]") + "\n"


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
