"""One training step, and the random state around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvlib.cli.tasks import Task
from curvlib.errors import CurvatureError

__all__ = [
    "STOPPING_ERRORS",
    "DivergenceError",
    "random_state",
    "seeded_random_state",
    "set_random_state",
    "synchronize",
    "training_step",
]

STOPPING_ERRORS = (CurvatureError, torch.linalg.LinAlgError, torch.OutOfMemoryError)  # type: ignore[attr-defined]
"""What ends one contestant's race and nobody else's."""


class DivergenceError(CurvatureError):
    """The loss of a batch is not finite."""


def training_step(task: Task, model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    """Do one step and return the loss of its batch.

    Raises
    ------
    DivergenceError
        If the loss is not finite; the parameters then stay as they were.
    """
    inputs, targets = batch
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if not math.isfinite(losses[0]):
            raise DivergenceError(f"the training loss became {losses[0]}: lower the learning rate or raise the damping")
        return loss

    if getattr(optimizer, "needs_closure", False):
        optimizer.step(closure)  # type: ignore[arg-type]  # torch takes the loss as a tensor
    else:
        closure()
        optimizer.step()
    optimizer.zero_grad()
    return losses[0]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of torch's global generators for the CPU and the device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set torch's global generators to a state from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seeded_random_state(seed: int, device: torch.device) -> dict[str, Any]:
    """Return the state of the generators right after seeding, and leave the generators as they are."""
    before = random_state(device)
    try:
        torch.manual_seed(seed)
        return random_state(device)
    finally:
        set_random_state(before, device)
