"""Run every contestant of the race on its grid and keep the results.

    python -m benchmarks.tuning.grid --out benchmarks/tuning/results [--seconds 20] [--optimizers sgd,adam]

Each point of a grid (the product of the values in `curvlib.cli.contestants`) trains for the same time, from the same
start, all points in turns of a second as in a race, so that a busy machine is equally busy for all. One CSV and one
table for each optimizer; the lowest training loss at the end wins.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
from pathlib import Path

from rich.console import Console

from curvlib.cli.contestants import CONTESTANTS, choose, hyperparameters
from curvlib.cli.environment import describe_environment
from curvlib.cli.models import MODELS
from curvlib.cli.options import add_task_options, task_from
from curvlib.cli.race import RaceRules, race


class Silent:
    """An observer that says nothing."""

    def warming_up(self, name):
        pass

    def turn_over(self, entrants, current):
        pass

    def evaluated(self, entrant):
        pass


def points(name):
    """Every combination of the grid's values, as overrides."""
    grid = CONTESTANTS[name].grid
    for values in itertools.product(*grid.values()):
        yield {key: str(value) for key, value in zip(grid, values, strict=True)}


def row(entrant, overrides):
    """What is kept of one setting."""
    return {
        **overrides,
        "steps": entrant.steps,
        "ms_per_step": f"{1e3 * entrant.seconds / max(1, entrant.steps):.2f}",
        "train_loss": f"{math.inf if entrant.diverged else entrant.curve[-1].train_loss:.4f}",
        "test_accuracy": f"{entrant.curve[-1].test_accuracy:.4f}",
        "status": entrant.status.split(":")[0],
    }


def write(folder, name, model, rows):
    """Write what is measured so far, best first in the table."""
    with (folder / f"{model}-{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ranked = sorted(rows, key=lambda row: float(row["train_loss"]))
    lines = ["| " + " | ".join(ranked[0]) + " |", "|" + " --- |" * len(ranked[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in ranked]
    (folder / f"{model}-{name}.md").write_text(f"# {name} on {model}\n\n" + "\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--optimizers", default="all")
    add_task_options(parser)
    args = parser.parse_args()
    console = Console()
    task = task_from(args, console)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = [(name, point) for name in choose(args.optimizers) for point in points(name)]
    contestants = [(name, hyperparameters(name, args.model, point)) for name, point in settings]
    samples = MODELS[args.model].cpu_evaluation_samples
    rules = RaceRules(args.seconds, evaluate_every=args.seconds, evaluation_samples=samples)
    console.print(f"{len(settings)} settings, {args.seconds:g} s each, in turns")
    entrants = []
    race(task, contestants, args.seed, rules, Silent(), entrants)
    for name in choose(args.optimizers):
        rows = [
            row(entrant, point) for entrant, (other, point) in zip(entrants, settings, strict=True) if other == name
        ]
        write(args.out, name, args.model, rows)
        console.print(name, min(rows, key=lambda one: float(one["train_loss"])))
    environment = {"seconds": args.seconds, "seed": args.seed, **describe_environment(task.device)}
    (args.out / f"{args.model}-environment.json").write_text(json.dumps(environment, indent=2) + "\n")


if __name__ == "__main__":
    main()
