"""Which output cotangents define the curvature: sampled labels, all columns, or the loss's own gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvlib.arrays import require
from curvlib.errors import ConfigurationError, NonFiniteError
from curvlib.fisher.likelihoods import Categorical, Likelihood
from curvlib.hyperparameters import Checked

__all__ = ["Empirical", "Exact", "Fisher", "Sampled"]


class Fisher(Checked, ABC):
    """Where the rows of the Jacobian come from, and how many observations they stand for."""

    @property
    def needs_backward(self) -> bool:
        """Whether cotangents come from the user's backward pass rather than from the outputs alone."""
        return False

    @abstractmethod
    def observations(self, outputs: Tensor) -> int:
        """Observations that the outputs of one forward pass stand for."""

    @abstractmethod
    def cotangents(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Output cotangents of every column, shape ``(columns, *outputs.shape)``.

        ``Σ_columns c cᵀ``, averaged over observations, is the Fisher information of the outputs.
        """


@dataclass(frozen=True)
class Sampled(Fisher):
    """Labels drawn from the model: an unbiased estimate of the Fisher, one column a draw.

    Parameters
    ----------
    likelihood
        What the labels are drawn from.
    samples
        Draws for each observation (TENGraD: 1).
    """

    likelihood: Likelihood = field(default_factory=Categorical)
    samples: int = 1

    def __post_init__(self) -> None:
        _check_likelihood(self, self.likelihood)
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ConfigurationError(f"Sampled needs at least one draw, as an integer, got samples={self.samples!r}")

    def observations(self, outputs: Tensor) -> int:
        return self.likelihood.observations(outputs)

    def cotangents(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        _check_outputs(self.likelihood, outputs)
        draws = [
            self.likelihood.residual(outputs, self.likelihood.sample(outputs, generator)) for _ in range(self.samples)
        ]
        return torch.stack(draws) / math.sqrt(self.samples)


@dataclass(frozen=True)
class Exact(Fisher):
    """All columns of a root of the output Fisher: the generalized Gauss–Newton matrix, without noise.

    Parameters
    ----------
    likelihood
        Gives one column for each output of a sample.
    """

    likelihood: Likelihood = field(default_factory=Categorical)

    def __post_init__(self) -> None:
        _check_likelihood(self, self.likelihood)

    def observations(self, outputs: Tensor) -> int:
        return self.likelihood.observations(outputs)

    def cotangents(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        _check_outputs(self.likelihood, outputs)
        return self.likelihood.hessian_root(outputs)


@dataclass(frozen=True)
class Empirical(Fisher):
    """The gradients of the loss itself, taken from the user's own backward pass: no extra pass, but not the Fisher.

    Parameters
    ----------
    reduction
        How the loss combines samples: "mean" over all samples of a step (each micro-batch divided by their number, as
        is usual in accumulation) or "sum".
    loss_scale
        What the loss is multiplied by before backward: a number, or a function that returns it at the time of the
        step, such as ``scaler.get_scale`` of a `torch.amp.GradScaler`.
    """

    reduction: str = "mean"
    loss_scale: float | Callable[[], float] = 1.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ConfigurationError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")

    @property
    def needs_backward(self) -> bool:
        return True

    def observations(self, outputs: Tensor) -> int:
        return int(outputs.shape[0])

    def cotangents(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        raise ConfigurationError("the empirical Fisher takes its cotangents from the loss: call loss.backward()")

    def scale(self, observations: int) -> float:
        """Return what turns a row of the backward pass into the gradient of one sample's loss."""
        factor = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigurationError(f"loss_scale must be a positive finite number, got {factor!r}")
        return (float(observations) if self.reduction == "mean" else 1.0) / factor


def _check_likelihood(fisher: Fisher, likelihood: Likelihood) -> None:
    if not isinstance(likelihood, Likelihood):
        raise ConfigurationError(
            f"{type(fisher).__name__} needs a likelihood such as Categorical(), Gaussian() or Bernoulli(), "
            f"got {likelihood!r}"
        )


def _check_outputs(likelihood: Likelihood, outputs: Tensor) -> None:
    likelihood.check(outputs)
    require(torch.isfinite(outputs).all(), _not_finite, NonFiniteError)


def _not_finite() -> str:
    return (
        "the model's outputs are not finite, so no curvature can be taken from them: look at the inputs and at the "
        "learning rate; parameters and optimizer state are unchanged"
    )
