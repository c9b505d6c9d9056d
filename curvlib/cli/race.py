"""The race: contestants take turns of about a second until each has had the same training time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from curvlib.cli.batches import Batches
from curvlib.cli.contestants import Value, build_optimizer
from curvlib.cli.evaluation import Evaluation, evaluate
from curvlib.cli.tasks import Task
from curvlib.cli.training import (
    STOPPING_ERRORS,
    DivergenceError,
    random_state,
    seeded_random_state,
    set_random_state,
    synchronize,
    training_step,
)

__all__ = ["Entrant", "Observer", "RaceRules", "race"]

_SMOOTHING = 0.95


@dataclass(frozen=True)
class RaceRules:
    """What holds for every contestant alike.

    Parameters
    ----------
    seconds
        Training time for each contestant; evaluations do not count.
    turn
        Training time between changes of the contestant.
    evaluate_every
        Training time between evaluations.
    evaluation_samples
        How many training and test samples an evaluation uses.
    batch_size
        Samples in a mini-batch.
    warmup_steps
        Steps on throw-away copies before the race.
    """

    seconds: float
    turn: float = 1.0
    evaluate_every: float = 2.0
    evaluation_samples: int = 10_000
    batch_size: int = 128
    warmup_steps: int = 3


@dataclass
class Entrant:
    """A contestant in the race, with all that it trains and all that was measured."""

    name: str
    seed: int
    hyperparameters: Mapping[str, Value]
    model: nn.Module
    optimizer: Optimizer
    batches: Batches
    random: dict[str, Any]
    seconds: float = 0.0
    steps: int = 0
    loss: float | None = None
    status: str = "running"
    curve: list[Evaluation] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether it still takes turns."""
        return self.status == "running"

    @property
    def diverged(self) -> bool:
        """Whether its loss became infinite or not a number."""
        return self.status.startswith("diverged")


class Observer(Protocol):
    """Who is told how the race goes; nothing that it does counts as training time."""

    def warming_up(self, name: str) -> None:
        """Say that a contestant's throw-away copy runs."""

    def turn_over(self, entrants: Sequence[Entrant], current: Entrant) -> None:
        """Say that a contestant's turn is over."""

    def evaluated(self, entrant: Entrant) -> None:
        """Say that a contestant's curve has a new point."""


def enter(task: Task, name: str, values: Mapping[str, Value], seed: int, rules: RaceRules) -> Entrant:
    """Return a contestant at the start: the same parameters and batch order for the same seed."""
    model = task.model(seed)
    optimizer = build_optimizer(name, model, task.likelihood, values, seed)
    batches = task.batches(rules.batch_size, seed)
    return Entrant(name, seed, values, model, optimizer, batches, seeded_random_state(seed, task.device))


def race(
    task: Task,
    contestants: Sequence[tuple[str, Mapping[str, Value]]],
    seed: int,
    rules: RaceRules,
    observer: Observer,
    entrants: list[Entrant],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Let every contestant train for the same time, in turns.

    Parameters
    ----------
    task
        The data, network and loss.
    contestants
        Names with hyperparameters; a name may come several times, with other hyperparameters.
    seed
        The seed of the initial parameters, the batch order and the optimizers.
    rules
        Budgets and intervals.
    observer
        Who is told how it goes.
    entrants
        The list that the contestants are added to. It is the caller's, so that what was measured outlives an
        interruption.
    clock
        Seconds from a monotonic clock.
    """
    for name, values in contestants:
        observer.warming_up(name)
        _warm_up(enter(task, name, values, seed, rules), task, rules.warmup_steps)
        entrants.append(enter(task, name, values, seed, rules))
    field_ = entrants[-len(contestants) :]
    for entrant in field_:
        _evaluate(entrant, task, rules, observer)
    rounds = 0
    while running := [entrant for entrant in field_ if entrant.running]:
        # Starting with another contestant each round spreads what only the first or the last of a round meets.
        shift = rounds % len(running)
        for entrant in running[shift:] + running[:shift]:
            _take_turn(entrant, task, rules, observer, clock)
            observer.turn_over(field_, entrant)
        rounds += 1


def _warm_up(entrant: Entrant, task: Task, steps: int) -> None:
    # First calls pay for allocation, kernel selection and threads; those costs belong to nobody. A contestant that
    # fails here fails in the race as well, where it is reported.
    before = random_state(task.device)
    with contextlib.suppress(*STOPPING_ERRORS):
        for _ in range(steps):
            training_step(task, entrant.model, entrant.optimizer, entrant.batches.draw())
    set_random_state(before, task.device)


def _take_turn(entrant: Entrant, task: Task, rules: RaceRules, observer: Observer, clock: Callable[[], float]) -> None:
    end = min(entrant.seconds + rules.turn, rules.seconds)
    outside = random_state(task.device)
    set_random_state(entrant.random, task.device)
    try:
        while entrant.running and entrant.seconds < end:
            _timed_step(entrant, task, clock)
            if entrant.running and entrant.seconds >= entrant.curve[-1].seconds + rules.evaluate_every:
                _evaluate(entrant, task, rules, observer)
    finally:
        entrant.random = random_state(task.device)
        set_random_state(outside, task.device)
    if entrant.running and entrant.seconds >= rules.seconds:
        entrant.status = "finished"
    # A diverged network has nothing left to measure; one whose optimizer gave up does.
    if not entrant.running and not entrant.diverged and entrant.curve[-1].step < entrant.steps:
        _evaluate(entrant, task, rules, observer)


def _timed_step(entrant: Entrant, task: Task, clock: Callable[[], float]) -> None:
    start = clock()
    try:
        loss = training_step(task, entrant.model, entrant.optimizer, entrant.batches.draw())
    except STOPPING_ERRORS as error:
        entrant.status = _failure(error, entrant.steps)
        return
    synchronize(task.device)
    entrant.seconds += clock() - start
    entrant.steps += 1
    entrant.loss = loss if entrant.loss is None else _SMOOTHING * entrant.loss + (1 - _SMOOTHING) * loss


def _evaluate(entrant: Entrant, task: Task, rules: RaceRules, observer: Observer) -> None:
    entrant.curve.append(evaluate(task, entrant.model, entrant.steps, entrant.seconds, rules.evaluation_samples))
    observer.evaluated(entrant)


def _failure(error: BaseException, step: int) -> str:
    kind = "diverged" if isinstance(error, DivergenceError) else "stopped"
    return f"{kind} at step {step + 1}: {error}"
