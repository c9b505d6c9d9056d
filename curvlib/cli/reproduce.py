"""``curvlib reproduce``: the experiments of TENGraD's paper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from curvlib.cli.data import MissingDataError, load_dataset
from curvlib.cli.environment import choose_device
from curvlib.cli.options import count, positive
from curvlib.cli.outputs import prepare_folder
from curvlib.cli.plots import require_matplotlib
from curvlib.cli.reproduction.conduct import conduct
from curvlib.cli.reproduction.experiments import Experiment, experiment_names, load_experiment
from curvlib.cli.reproduction.plan import make_plan
from curvlib.errors import DataError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "reproduce",
        help="run the experiments of TENGraD's paper",
        description="Run experiments of TENGraD's paper: every optimizer with every seed, with checkpoints, and a "
        "report. Killed at any time, it goes on with --resume.",
    )
    parser.add_argument(
        "experiment",
        metavar="NAME",
        help=f"one of {', '.join(experiment_names())}; a .toml file of your own; or all",
    )
    parser.add_argument(
        "--scale", type=positive, default=1.0, metavar="S", help="share of the data, epochs and widths (default: 1)"
    )
    parser.add_argument("--optimizers", metavar="NAMES", help="comma-separated (default: all of the experiment)")
    parser.add_argument("--seeds", type=count(1), metavar="N", help="runs of each (default: as in the experiment)")
    parser.add_argument("--epochs", type=count(1), metavar="E", help="epochs, not scaled (default: the experiment's)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: runs/reproduce/NAME); "
        "with all, for one folder each"
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the data sets' files")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    parser.add_argument(
        "--no-costs", action="store_true", help="leave out the measurement of inversion time and memory"
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    parser.add_argument("--threads", type=count(1), metavar="N", help="CPU threads (default: torch's choice)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Run one experiment, or all.

    Parameters
    ----------
    args
        The parsed command line.
    console
        Where to show the progress; standard output by default.

    Returns
    -------
    int
        0, or 130 if Ctrl-C ended it early.

    Raises
    ------
    ConfigurationError
        If an experiment or an option is not understood, or the folder holds runs that are not to be resumed.
    DataError
        If a data set cannot be had; with ``all``, after everything else has been run.
    """
    console = console or Console()
    require_matplotlib()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    several = args.experiment == "all"
    experiments = [load_experiment(name) for name in (experiment_names() if several else [args.experiment])]
    missing = []
    for experiment in experiments:
        out = (args.out / experiment.name if several else args.out) if args.out else None
        try:
            complete = _conduct(args, experiment, out or Path("runs/reproduce") / experiment.name, device, console)
        except MissingDataError as error:
            if not several:
                raise
            _show(console, f"{experiment.name}: left out: {error}")
            missing.append(experiment)
            continue
        if not complete:
            return 130
    if missing:
        raise DataError(
            f"without their data {', '.join(experiment.name for experiment in missing)} were left out; see above"
        )
    return 0


def _conduct(
    args: argparse.Namespace, experiment: Experiment, folder: Path, device: torch.device, console: Console
) -> bool:
    def say(text: str) -> None:
        _show(console, text)

    prepare_folder(folder)
    dataset = load_dataset(experiment.data, args.data_dir, say)
    names = None if args.optimizers is None else [name.strip() for name in args.optimizers.split(",")]
    plan = make_plan(experiment, dataset, args.scale, args.epochs, args.seeds, names)
    say(
        f"{experiment.title}: {len(plan.optimizers)} optimizers x {plan.seeds} seeds x {plan.steps} steps "
        f"({plan.epochs} epochs of {plan.train_samples} images), {device}"
    )
    complete = conduct(plan, dataset, device, folder, say, resume=args.resume, costs=not args.no_costs)
    if complete:
        say(f"report in {folder / 'report.md'}")
    else:
        say(f"interrupted; go on with --resume --out {folder} and the other options as they were")
    return complete


def _show(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
