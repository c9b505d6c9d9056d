"""``curvlib train``: one optimizer, with checkpoints."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from curvlib.cli.checkpoint import checkpoint_exists, load_checkpoint, save_checkpoint
from curvlib.cli.contestants import CONTESTANTS, hyperparameters
from curvlib.cli.environment import describe_environment
from curvlib.cli.evaluation import Evaluation
from curvlib.cli.interruption import StopOnInterrupt
from curvlib.cli.models import MODELS
from curvlib.cli.options import add_override_options, add_task_options, count, positive, read_overrides, task_from
from curvlib.cli.outputs import prepare_folder, remove_leftovers, write_text
from curvlib.cli.trainer import RunIdentity, Trainer
from curvlib.cli.training import DivergenceError
from curvlib.errors import ConfigurationError

__all__ = ["add_parser", "run"]


@dataclass(frozen=True)
class _Budget:
    """How long to train: the first limit that is reached ends it."""

    steps: float
    seconds: float

    def spent(self, trainer: Trainer) -> bool:
        return trainer.steps >= self.steps or trainer.seconds >= self.seconds


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train with one optimizer, with checkpoints",
        description="Train a network with one optimizer; checkpoints let an interrupted run go on bit for bit.",
    )
    parser.add_argument("--optimizer", choices=CONTESTANTS, default="tengrad", help="optimizer (default: tengrad)")
    parser.add_argument("--epochs", type=count(1), metavar="N", help="epochs (default: 10 if no limit is given)")
    parser.add_argument("--steps", type=count(1), metavar="N", help="training steps")
    parser.add_argument("--seconds", type=positive, metavar="S", help="seconds of training")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--checkpoint-every", type=count(1), metavar="N", help="steps between checkpoints (default: an epoch)"
    )
    parser.add_argument(
        "--eval-every", type=count(1), metavar="N", help="steps between evaluations (default: an epoch)"
    )
    parser.add_argument(
        "--eval-samples",
        type=count(1),
        metavar="N",
        help="training and test samples in an evaluation (default: 10000; 1000 for convnet on a CPU)",
    )
    add_task_options(parser)
    add_override_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Train, or go on training.

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
    """
    console = console or Console()
    values = hyperparameters(args.optimizer, args.model, read_overrides(args, [args.optimizer])[args.optimizer])
    folder = prepare_folder(args.out)
    if checkpoint_exists(folder) and not args.resume:
        raise ConfigurationError(f"{folder} holds a checkpoint: go on from it with --resume, or give another --out")
    if args.resume:
        remove_leftovers(folder)
    state, warning = load_checkpoint(folder) if args.resume else (None, "")
    if warning:
        console.print(f"Note: {warning}", soft_wrap=True, style="yellow", markup=False)
    task = task_from(args, console)
    identity = RunIdentity(
        task.dataset.name, args.model, args.optimizer, values, args.batch_size, task.augment, args.seed
    )
    samples = MODELS[args.model].cpu_evaluation_samples if task.device.type == "cpu" else 10_000
    trainer = Trainer(task, identity, args.eval_samples or samples)
    if state is not None:
        trainer.load_state_dict(state)
    if task.dataset.note:
        console.print(f"Note: {task.dataset.note}", soft_wrap=True, style="yellow", markup=False)
    _show(
        console,
        f"{args.optimizer} on {args.model}, {task.dataset.name} ({task.dataset.source}), {task.device}: "
        f"{'from step ' + str(trainer.steps) if trainer.steps else 'from the start'}",
    )
    configuration = {
        "identity": asdict(identity),
        "data_source": task.dataset.source,
        "environment": describe_environment(task.device),
    }
    write_text(folder / "config.json", json.dumps(configuration, indent=2) + "\n")
    return _train(args, trainer, folder, console)


def _train(args: argparse.Namespace, trainer: Trainer, folder: Path, console: Console) -> int:
    budget = _budget(args, trainer)
    evaluate_every = args.eval_every or trainer.steps_per_epoch
    save_every = args.checkpoint_every or trainer.steps_per_epoch
    saved_at = trainer.steps if args.resume else -1
    with StopOnInterrupt() as stop:
        while not budget.spent(trainer) and not stop.requested:
            try:
                loss = trainer.step()
            except DivergenceError as error:
                raise DivergenceError(f"{error}. The last checkpoint in {folder} is from before") from error
            if trainer.steps % evaluate_every == 0:
                _report(trainer, loss, folder, console)
            # After the evaluation, so that a resumed run has it in its history and does not repeat it.
            if trainer.steps % save_every == 0:
                save_checkpoint(folder, trainer.state_dict())
                saved_at = trainer.steps
        if not stop.requested and (not trainer.history or trainer.history[-1].step != trainer.steps):
            _report(trainer, math.nan, folder, console)
            saved_at = -1
        if saved_at != trainer.steps:
            save_checkpoint(folder, trainer.state_dict())
    if stop.requested:
        _show(console, f"interrupted at step {trainer.steps}; go on with --resume --out {folder}")
        return 130
    if trainer.best is not None:
        shown = "test loss" if trainer.task.reconstructs else "test accuracy"
        value = trainer.best.test_loss if trainer.task.reconstructs else trainer.best.test_accuracy
        _show(console, f"best {shown} {value:.4f} at step {trainer.best.step}; files in {folder}")
    return 0


def _budget(args: argparse.Namespace, trainer: Trainer) -> _Budget:
    epochs = args.epochs
    if epochs is None and args.steps is None and args.seconds is None:
        epochs = 10
    limits = [args.steps or math.inf, (epochs or math.inf) * trainer.steps_per_epoch]
    return _Budget(min(limits), args.seconds or math.inf)


def _report(trainer: Trainer, loss: float, folder: Path, console: Console) -> None:
    point = trainer.evaluate()
    write_text(folder / "history.csv", _history(trainer.history))
    accuracy = "" if math.isnan(point.test_accuracy) else f", test accuracy {point.test_accuracy:.4f}"
    batch = "" if math.isnan(loss) else f", batch loss {loss:.4f}"
    _show(
        console,
        f"step {point.step} (epoch {point.step / trainer.steps_per_epoch:.2f}, {point.seconds:.1f} s): "
        f"train loss {point.train_loss:.4f}, test loss {point.test_loss:.4f}{accuracy}{batch}",
    )


def _history(points: Sequence[Evaluation]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in fields(Evaluation)])
    for point in points:
        writer.writerow(["" if math.isnan(value) else f"{value:.6g}" for value in astuple(point)])
    return buffer.getvalue()


def _show(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
