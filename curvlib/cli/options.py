"""Command-line options that several subcommands share, and the reading of NAME=VALUE overrides."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from curvlib.cli.contestants import CONTESTANTS
from curvlib.cli.data import DATASETS, load_dataset
from curvlib.cli.environment import choose_device
from curvlib.cli.models import MODELS
from curvlib.cli.tasks import Task, make_task
from curvlib.errors import ConfigurationError

__all__ = ["add_override_options", "add_task_options", "count", "positive", "read_overrides", "task_from"]


def positive(text: str) -> float:
    """Read a positive finite number."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(minimum: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from a minimum on."""

    def read(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value

    # argparse names the type in its own messages.
    read.__name__ = "whole number"
    return read


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose data, network, device and seed."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--data", choices=DATASETS, default="auto", help="data set (default: fashion-mnist, else digits)"
    )
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the data set's files")
    models = "; ".join(f"{name}: {spec.description}" for name, spec in MODELS.items())
    group.add_argument("--model", choices=MODELS, default="small-convnet", help=f"network. {models}")
    group.add_argument("--batch-size", type=count(1), default=128, metavar="N", help="samples a step (default: 128)")
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="shift and mirror the training images at random (default: colour images only)",
    )
    group.add_argument("--seed", type=count(0), default=0, metavar="N", help="seed of everything random (default: 0)")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    group.add_argument("--threads", type=count(1), metavar="N", help="CPU threads (default: torch's choice)")


def add_override_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that change hyperparameters."""
    group = parser.add_argument_group("hyperparameters")
    for option, example in (("lr", "sgd=0.1"), ("damping", "tengrad=0.1"), ("weight-decay", "sgd=0.001")):
        group.add_argument(
            f"--{option}",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"such as {example}; repeatable",
        )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="any hyperparameter, such as tengrad.refresh=10; repeatable",
    )


def read_overrides(args: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the hyperparameters that the command line changes, by contestant.

    Where only one contestant runs, its name may be left out: ``--lr 0.1``, ``--set refresh=10``.

    Raises
    ------
    ConfigurationError
        If an override is malformed or names a contestant that does not run.
    """
    overrides: dict[str, dict[str, str]] = {name: {} for name in names}
    for option in ("lr", "damping", "weight_decay"):
        for item in getattr(args, option):
            name, _, value = item.rpartition("=")
            _record(overrides, f"--{option.replace('_', '-')} {item}", name, option, value)
    for item in args.set:
        path, separator, value = item.partition("=")
        name, _, key = path.rpartition(".")
        _record(overrides, f"--set {item}", name, key if separator else "", value)
    return overrides


def task_from(args: argparse.Namespace, console: Console) -> Task:
    """Load the data and put it on the device, as the options say; tell the console of a download."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)

    def announce(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    return make_task(load_dataset(args.data, args.data_dir, announce), args.model, device, augment=args.augment)


def _record(overrides: dict[str, dict[str, str]], shown: str, name: str, key: str, value: str) -> None:
    if not key or not value:
        raise ConfigurationError(f"{shown} is not understood: give NAME=VALUE, or NAME.KEY=VALUE with --set")
    if not name and len(overrides) == 1:
        name = next(iter(overrides))
    if name not in overrides:
        known = "does not take part" if name in CONTESTANTS else "is no optimizer"
        raise ConfigurationError(f"{shown}: {name!r} {known}; taking part: {', '.join(overrides)}")
    overrides[name][key] = value
