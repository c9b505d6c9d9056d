"""``curvlib race``: one network, several optimizers, the same training time for each."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from curvlib.cli.contestants import CONTESTANTS, RACED, Value, choose, hyperparameters
from curvlib.cli.environment import describe_environment
from curvlib.cli.models import MODELS
from curvlib.cli.options import add_override_options, add_task_options, count, positive, read_overrides, task_from
from curvlib.cli.outputs import prepare_folder
from curvlib.cli.plots import require_matplotlib
from curvlib.cli.progress import RaceProgress
from curvlib.cli.race import Entrant, RaceRules, race
from curvlib.cli.report import write_outputs
from curvlib.cli.summary import Row, failures, result_table, summarize, target_table
from curvlib.cli.targets import Target, default_targets, parse_targets
from curvlib.cli.tasks import Task

__all__ = ["add_parser", "run"]

_EVALUATIONS = 10


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "race",
        help="train one network with several optimizers for equal time",
        description="Train one network with several optimizers for equal training time and report on it.",
    )
    known = "; ".join(f"{name}: {contestant.description}" for name, contestant in CONTESTANTS.items())
    parser.add_argument(
        "--optimizers", default=RACED, metavar="NAMES", help=f"comma-separated, or all (default: {RACED}). {known}"
    )
    parser.add_argument(
        "--seconds", type=positive, default=35.0, metavar="S", help="training time for each optimizer (default: 35)"
    )
    parser.add_argument("--seeds", type=count(1), default=1, metavar="N", help="race N times with consecutive seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), metavar="DIR", help="folder for the results")
    parser.add_argument("--targets", metavar="LIST", help="such as loss=0.3,accuracy=0.9 (default: by data set)")
    parser.add_argument("--turn", type=positive, default=1.0, metavar="S", help="seconds between changes (default: 1)")
    parser.add_argument(
        "--eval-every",
        type=positive,
        metavar="S",
        help="training time between evaluations (default: a tenth of it all)",
    )
    parser.add_argument(
        "--eval-samples",
        type=count(1),
        metavar="N",
        help="training and test samples in an evaluation (default: 10000, on a CPU fewer for slow networks)",
    )
    add_task_options(parser)
    add_override_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Run the race and write its report.

    Parameters
    ----------
    args
        The parsed command line.
    console
        Where to show the progress and the result; standard output by default.

    Returns
    -------
    int
        0, or 130 if Ctrl-C ended it early.
    """
    console = console or Console()
    names = choose(args.optimizers)
    overrides = read_overrides(args, names)
    contestants = {name: hyperparameters(name, args.model, overrides[name]) for name in names}
    targets = None if args.targets is None else parse_targets(args.targets)
    require_matplotlib()
    folder = prepare_folder(args.out)
    task = task_from(args, console)
    rules = _rules(args, task)
    if targets is None:
        targets = default_targets(task.dataset.name, task.reconstructs)
    _introduce(console, task, rules, contestants)
    entrants: list[Entrant] = []
    interrupted = False
    try:
        with RaceProgress(console, rules.seconds) as progress:
            for seed in range(args.seed, args.seed + args.seeds):
                race(task, list(contestants.items()), seed, rules, progress, entrants)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[bold]interrupted[/bold]: keeping what was measured")
    rows = summarize(entrants, targets)
    configuration = _configuration(args, task, rules, contestants, targets, interrupted)
    write_outputs(folder, task, rules, entrants, rows, targets, contestants, configuration, interrupted=interrupted)
    if rows:
        _show_results(console, rows, targets, task.reconstructs)
    if task.dataset.note:
        console.print(f"Note: {task.dataset.note}", soft_wrap=True, markup=False)
    console.print(f"Report: {folder / 'report.md'}", soft_wrap=True, highlight=False, markup=False)
    return 130 if interrupted else 0


def _rules(args: argparse.Namespace, task: Task) -> RaceRules:
    samples = MODELS[args.model].cpu_evaluation_samples if task.device.type == "cpu" else 10_000
    return RaceRules(
        seconds=args.seconds,
        turn=args.turn,
        evaluate_every=args.eval_every or args.seconds / _EVALUATIONS,
        evaluation_samples=args.eval_samples or samples,
        batch_size=args.batch_size,
    )


def _introduce(console: Console, task: Task, rules: RaceRules, contestants: Mapping[str, Mapping[str, Value]]) -> None:
    dataset = task.dataset
    console.print(
        f"{task.model_name} on {dataset.name} ({dataset.source}), {task.device}: {', '.join(contestants)}, "
        f"{rules.seconds:g} s each",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if dataset.note:
        console.print(f"Note: {dataset.note}", soft_wrap=True, style="yellow", markup=False)


def _show_results(console: Console, rows: list[Row], targets: list[Target], reconstructs: bool) -> None:
    tables = [result_table(rows, reconstructs)]
    if targets:
        tables.append(target_table(rows, targets))
    for header, cells in tables:
        table = Table(header[0], *(Column(name, justify="right") for name in header[1:]))
        for line in cells:
            table.add_row(*line)
        console.print(table)
    for failure in failures(rows):
        console.print(failure, soft_wrap=True, highlight=False, markup=False)


def _configuration(
    args: argparse.Namespace,
    task: Task,
    rules: RaceRules,
    contestants: Mapping[str, Mapping[str, Value]],
    targets: list[Target],
    interrupted: bool,
) -> dict[str, object]:
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("run", "command")
    }
    return {
        "options": options,
        "seeds": list(range(args.seed, args.seed + args.seeds)),
        "data": {"name": task.dataset.name, "source": task.dataset.source, "note": task.dataset.note},
        "model": task.model_name,
        "rules": asdict(rules),
        "hyperparameters": {name: dict(values) for name, values in contestants.items()},
        "targets": [str(target) for target in targets],
        "interrupted": interrupted,
        "environment": describe_environment(task.device),
    }
