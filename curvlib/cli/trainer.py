"""A training run with one optimizer whose whole state can be saved and taken up again bit for bit."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from curvlib.cli.contestants import Value, build_optimizer
from curvlib.cli.evaluation import Evaluation, evaluate
from curvlib.cli.tasks import Task
from curvlib.cli.training import random_state, seeded_random_state, set_random_state, synchronize, training_step
from curvlib.errors import ConfigurationError, DataError

__all__ = ["RunIdentity", "Trainer"]


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal for a checkpoint to be continued.

    Parameters
    ----------
    data, model, optimizer, hyperparameters, batch_size, augment, seed
        The choices on the command line.
    """

    data: str
    model: str
    optimizer: str
    hyperparameters: Mapping[str, Value]
    batch_size: int
    augment: bool
    seed: int

    def require_equal(self, saved: Mapping[str, object]) -> None:
        """Check the identity that a checkpoint holds.

        Raises
        ------
        ConfigurationError
            If it is another one; the message names what differs.
        """
        own = asdict(self)
        differing = [f"{key} was {saved.get(key)}, is {value}" for key, value in own.items() if saved.get(key) != value]
        if differing:
            raise ConfigurationError(
                f"the checkpoint belongs to another run ({'; '.join(differing)}): repeat its options, "
                "or start anew with another --out"
            )


class Trainer:
    """Trains a network step by step and keeps its history.

    Parameters
    ----------
    task
        The data, network and loss.
    identity
        Optimizer, hyperparameters, batch size and seed.
    evaluation_samples
        How many training and test samples an evaluation uses.
    build
        From the network to its optimizer; by default the contestant that the identity names.
    """

    def __init__(
        self,
        task: Task,
        identity: RunIdentity,
        evaluation_samples: int,
        build: Callable[[nn.Module], Optimizer] | None = None,
    ) -> None:
        self.task = task
        self.identity = identity
        self.model = task.model(identity.seed)
        self.optimizer = (build or self._contestant)(self.model)
        self.batches = task.batches(identity.batch_size, identity.seed)
        self.steps = 0
        self.seconds = 0.0
        self.history: list[Evaluation] = []
        self.best: Evaluation | None = None
        self._evaluation_samples = evaluation_samples
        set_random_state(seeded_random_state(identity.seed, task.device), task.device)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return self.batches.order.batches_per_epoch

    def step(self) -> float:
        """Do one step and return the loss of its batch."""
        start = time.perf_counter()
        loss = training_step(self.task, self.model, self.optimizer, self.batches.draw())
        synchronize(self.task.device)
        self.seconds += time.perf_counter() - start
        self.steps += 1
        return loss

    def evaluate(self) -> Evaluation:
        """Evaluate the network, add the point to the history, and return it."""
        point = evaluate(self.task, self.model, self.steps, self.seconds, self._evaluation_samples)
        self.history.append(point)
        if self.best is None or self._quality(point) > self._quality(self.best):
            self.best = point
        return point

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "identity": asdict(self.identity),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "random": random_state(self.task.device),
            "steps": self.steps,
            "seconds": self.seconds,
            "history": [asdict(point) for point in self.history],
            "best": None if self.best is None else asdict(self.best),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the run with this state stopped.

        Raises
        ------
        ConfigurationError
            If the state belongs to another run.
        DataError
            If it is no state of a run; everything is then as it was.
        """
        identity = state.get("identity")
        before, belongs = copy.deepcopy(self.state_dict()), False
        try:
            self.identity.require_equal(identity if isinstance(identity, Mapping) else {})
            belongs = True
            self._load(state)
        except Exception as error:
            if isinstance(error, ConfigurationError) and not belongs:
                raise
            self._load(before)
            raise DataError(
                f"the checkpoint does not hold this run's state ({type(error).__name__}: {error}): start anew with "
                "another --out, or go on with the version of curvlib that wrote it"
            ) from error

    def _load(self, state: Mapping[str, Any]) -> None:
        steps, seconds = state["steps"], state["seconds"]
        if not (isinstance(steps, int) and isinstance(seconds, float) and steps >= 0 and seconds >= 0):
            raise ValueError(f"steps are {steps!r}, seconds {seconds!r}")
        history = [Evaluation(**point) for point in state["history"]]
        best = None if state["best"] is None else Evaluation(**state["best"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.steps, self.seconds, self.history, self.best = steps, seconds, history, best
        set_random_state(state["random"], self.task.device)

    def _contestant(self, model: nn.Module) -> Optimizer:
        own = self.identity
        return build_optimizer(own.optimizer, model, self.task.likelihood, own.hyperparameters, own.seed)

    def _quality(self, point: Evaluation) -> float:
        return -point.test_loss if self.task.reconstructs else point.test_accuracy
