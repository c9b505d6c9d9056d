"""One optimizer with one seed: trained, evaluated, kept in checkpoints until it is finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvlib.cli.checkpoint import checkpoint_exists, load_checkpoint, remove_checkpoints, save_checkpoint
from curvlib.cli.interruption import StopOnInterrupt
from curvlib.cli.outputs import prepare_folder, remove_leftovers, write_text
from curvlib.cli.reproduction.plan import Plan
from curvlib.cli.tasks import Task
from curvlib.cli.trainer import Trainer
from curvlib.cli.training import STOPPING_ERRORS, DivergenceError, training_step
from curvlib.errors import DataError

__all__ = ["Record", "execute", "plain", "read_record"]

Record = dict[str, Any]
"""A finished run as plain data: identity, status, steps, seconds, the curve, a checksum of the final parameters."""

_RESULT = "run.json"


def execute(
    plan: Plan, task: Task, optimizer: str, seed: int, folder: Path, say: Callable[[str], None], stop: StopOnInterrupt
) -> Record | None:
    """Do one run, go on with it, or return the result that its folder holds.

    Parameters
    ----------
    plan, task
        The experiment and its data.
    optimizer, seed
        Which run.
    folder
        The run's own folder, for its checkpoints and its result.
    say
        Called with a line of text after each evaluation.
    stop
        Asked after each step whether to stop.

    Returns
    -------
    dict or None
        The result; None if it was stopped, with a checkpoint in the folder.

    Raises
    ------
    ConfigurationError
        If the folder holds another run.
    DataError
        If its files are damaged or cannot be written.
    """
    identity = plan.identity(optimizer, seed)
    done = read_record(folder / _RESULT)
    if done is not None:
        identity.require_equal(done.get("identity", {}))
        return done
    prepare_folder(folder)
    remove_leftovers(folder)

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return plan.optimizer(optimizer, model, task.likelihood, seed)

    _warm_up(plan, task, build)
    trainer = Trainer(task, identity, plan.experiment.evaluation_samples, build)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    if checkpoint_exists(folder):
        state, warning = load_checkpoint(folder)
        if warning:
            say(f"note: {warning}")
        trainer.load_state_dict(state)
        say(f"from step {trainer.steps}")
    else:
        trainer.evaluate()
    status = "finished"
    while trainer.steps < plan.steps:
        factor = plan.rate(trainer.steps)
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        try:
            trainer.step()
        except STOPPING_ERRORS as error:
            kind = "diverged" if isinstance(error, DivergenceError) else "stopped"
            status = f"{kind} at step {trainer.steps + 1}: {error}"
            break
        epoch_over = trainer.steps % plan.steps_per_epoch == 0
        if epoch_over or trainer.steps % (plan.evaluate_every or plan.steps) == 0:
            trainer.evaluate()
        if epoch_over:
            say(_line(trainer))
        if stop.requested or epoch_over:
            save_checkpoint(folder, trainer.state_dict())
        if stop.requested:
            return None
    record: Record = plain(
        {
            "identity": asdict(identity),
            "status": status,
            "steps": trainer.steps,
            "seconds": trainer.seconds,
            "parameters": checksum(trainer.model),
            "curve": [asdict(point) for point in trainer.history],
        }
    )
    write_text(folder / _RESULT, json.dumps(record, indent=1) + "\n")
    remove_checkpoints(folder)
    return record


def _warm_up(plan: Plan, task: Task, build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    # First calls pay for allocation, kernel selection and threads; those costs belong to nobody. Who fails here fails
    # in the run as well, where it is reported.
    model = task.model(0)
    with contextlib.suppress(*STOPPING_ERRORS):
        training_step(task, model, build(model), task.batches(plan.batch_size, 0).draw())


def checksum(model: nn.Module) -> str:
    """Return a SHA-256 of a network's parameters and buffers, equal only where they are equal bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_record(path: Path) -> Record | None:
    """Read a result; None if there is none.

    Raises
    ------
    DataError
        If the file is damaged.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove it to do this run again") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} does not hold a result: remove it to do this run again")
    return record


def plain(value: Any) -> Any:
    """Return data with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _line(trainer: Trainer) -> str:
    point = trainer.history[-1]
    accuracy = "" if math.isnan(point.test_accuracy) else f", test accuracy {point.test_accuracy:.4f}"
    epoch = trainer.steps // trainer.steps_per_epoch
    return f"epoch {epoch}, {point.seconds:.1f} s: train loss {point.train_loss:.4f}{accuracy}"
