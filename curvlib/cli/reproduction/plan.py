"""What is run of an experiment: its size after scaling, and each run's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from curvlib import solvers
from curvlib.cli.contestants import CONTESTANTS, Value, build_optimizer
from curvlib.cli.data import Dataset
from curvlib.cli.reproduction.experiments import Experiment
from curvlib.cli.tasks import Task, make_task
from curvlib.cli.trainer import RunIdentity
from curvlib.errors import ConfigurationError

__all__ = ["ExperimentIdentity", "Plan", "make_plan"]


@dataclass(frozen=True)
class ExperimentIdentity(RunIdentity):
    """What must be equal for a run of an experiment to be continued, besides what `RunIdentity` has.

    Parameters
    ----------
    train_samples, test_samples, width, steps, schedule, batch_norm, evaluate_every, evaluation_samples
        Of the plan.
    """

    train_samples: int
    test_samples: int
    width: float
    steps: int
    schedule: str
    batch_norm: str
    evaluate_every: int
    evaluation_samples: int


@dataclass(frozen=True)
class Plan:
    """An experiment at the size that was asked for.

    Parameters
    ----------
    experiment
        As its file has it.
    scale
        Share of the samples, epochs and (down to the experiment's narrowest) widths.
    train_samples, test_samples, batch_size, epochs
        After scaling. The batch shrinks only where it would exceed the training set.
    milestones
        Steps at which the learning rate is multiplied by the experiment's `decay`.
    width
        Factor on the widths of hidden layers.
    seeds
        Runs of each optimizer.
    optimizers
        Who takes part, in the order of the experiment.
    """

    experiment: Experiment
    scale: float
    train_samples: int
    test_samples: int
    batch_size: int
    epochs: int
    milestones: tuple[int, ...]
    width: float
    seeds: int
    optimizers: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.train_samples // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return self.epochs * self.steps_per_epoch

    @property
    def evaluate_every(self) -> int | None:
        """Steps between the evaluations in an epoch; None where scaling left less than that of an epoch."""
        steps = self.experiment.evaluate_every
        return steps if steps < self.steps_per_epoch else None

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step, a function of the step alone."""
        return float(self.experiment.decay ** sum(step >= milestone for milestone in self.milestones))

    def task(self, dataset: Dataset, device: torch.device) -> Task:
        """Put the planned part of a data set on a device: its first samples."""
        part = replace(
            dataset,
            train_images=dataset.train_images[: self.train_samples],
            train_labels=dataset.train_labels[: self.train_samples],
            test_images=dataset.test_images[: self.test_samples],
            test_labels=dataset.test_labels[: self.test_samples],
        )
        augment = self.experiment.augment
        return make_task(part, self.experiment.model, device, augment=augment or None, width=self.width)

    def hyperparameters(self, optimizer: str) -> dict[str, Value]:
        """Return an optimizer's hyperparameters: the experiment's, and the contestant's defaults for all others."""
        return {**CONTESTANTS[optimizer].defaults, **self.experiment.optimizers[optimizer]}

    def identity(self, optimizer: str, seed: int) -> ExperimentIdentity:
        """Return the identity of one run."""
        experiment = self.experiment
        return ExperimentIdentity(
            data=experiment.data,
            model=experiment.model,
            optimizer=optimizer,
            hyperparameters=self.hyperparameters(optimizer),
            batch_size=self.batch_size,
            augment=experiment.augment,
            seed=seed,
            train_samples=self.train_samples,
            test_samples=self.test_samples,
            width=self.width,
            steps=self.steps,
            schedule=f"x{experiment.decay:g} at steps {', '.join(map(str, self.milestones)) or 'none'}",
            batch_norm=experiment.batch_norm,
            evaluate_every=experiment.evaluate_every,
            evaluation_samples=experiment.evaluation_samples,
        )

    def optimizer(self, name: str, model: nn.Module, likelihood: str, seed: int) -> Optimizer:
        """Build an optimizer for a network, with what the experiment says of batch norms and low rank.

        Raises
        ------
        ConfigurationError
            If it refuses its hyperparameters.
        """
        values: dict[str, Any] = self.hyperparameters(name)
        low_rank = values.pop("low_rank", None)
        groups = []
        if name not in ("sgd", "adam", "adamw"):
            if self.experiment.batch_norm == "gradient":
                groups.append(_group(model, (nn.modules.batchnorm._BatchNorm,), solvers.Identity()))
            if low_rank is not None:
                # The authors truncate the rows of convolutions alone.
                groups.append(_group(model, (nn.Conv2d,), solvers.Woodbury(low_rank=low_rank)))
        groups = [group for group in groups if group["blocks"]]
        if groups:
            values["groups"] = groups
        return build_optimizer(name, model, likelihood, values, seed)

    def record(self) -> dict[str, object]:
        """Return the plan as plain data, for the report."""
        own = asdict(self)
        own["experiment"]["targets"] = [str(target) for target in self.experiment.targets]
        own["steps_per_epoch"], own["steps"] = self.steps_per_epoch, self.steps
        own["hyperparameters"] = {name: self.hyperparameters(name) for name in self.optimizers}
        return own


def make_plan(
    experiment: Experiment,
    dataset: Dataset,
    scale: float = 1.0,
    epochs: int | None = None,
    seeds: int | None = None,
    optimizers: Sequence[str] | None = None,
) -> Plan:
    """Return what is run of an experiment.

    Parameters
    ----------
    experiment, dataset
        The experiment, and its data.
    scale
        In (0, 1].
    epochs, seeds, optimizers
        In place of the experiment's; epochs are then not scaled.

    Raises
    ------
    ConfigurationError
        If the scale is out of range, or an optimizer does not take part in the experiment.
    """
    if not 0 < scale <= 1:
        raise ConfigurationError(f"--scale must lie in (0, 1], got {scale}")
    names = tuple(experiment.optimizers if optimizers is None else optimizers)
    strangers = [name for name in names if name not in experiment.optimizers]
    if strangers:
        raise ConfigurationError(
            f"{experiment.name} has no settings for {', '.join(strangers)}: it compares "
            f"{', '.join(experiment.optimizers)}"
        )
    whole = len(dataset.train_images)
    batch = min(experiment.batch_size, whole)
    train = max(batch, round(scale * whole))
    length = epochs or max(1, round(scale * experiment.epochs))
    per_epoch = train // batch
    return Plan(
        experiment=experiment,
        scale=scale,
        train_samples=train,
        test_samples=max(1, round(scale * len(dataset.test_images))),
        batch_size=batch,
        epochs=length,
        milestones=tuple(round(epoch * length / experiment.epochs * per_epoch) for epoch in experiment.milestones),
        width=1.0 if scale == 1 else max(scale, experiment.narrowest),
        seeds=seeds or experiment.seeds,
        optimizers=tuple(name for name in experiment.optimizers if name in names),
    )


def _group(model: nn.Module, kinds: tuple[type[nn.Module], ...], solver: solvers.Solver) -> Mapping[str, Any]:
    return {"blocks": [name for name, module in model.named_modules() if isinstance(module, kinds)], "solver": solver}
