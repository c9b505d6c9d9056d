"""Likelihoods p(y | f) of a network's outputs f: their losses, their samples, their Fisher information.

Each states once what one observation is, and with it the scale of the curvature: the mean over observations, the same
as that of its `loss`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from curvlib.errors import ConfigurationError
from curvlib.hyperparameters import Checked

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood"]


class Likelihood(Checked, ABC):
    """Distribution of the targets given a network's outputs, shape ``(n, …)``."""

    def check(self, outputs: Tensor) -> None:
        """Refuse outputs that this likelihood does not fit.

        Raises
        ------
        ConfigurationError
            With the shape or dtype given and what would be right.
        """
        if not outputs.is_floating_point():
            raise ConfigurationError(f"{self} needs floating-point outputs, got {outputs.dtype}")
        if outputs.ndim < 1 or outputs.shape[0] == 0:
            raise ConfigurationError(
                f"{self} needs outputs whose first axis holds at least one sample, got shape {tuple(outputs.shape)}"
            )

    def observations(self, outputs: Tensor) -> int:
        """Number of observations in a batch; the curvature is the mean over them. One a sample unless overridden."""
        return int(outputs.shape[0])

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood of an observation (up to a constant), a scalar."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw targets from p(y | outputs)."""

    @abstractmethod
    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every observation's negative log-likelihood with respect to outputs, the shape of outputs."""

    @abstractmethod
    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Columns S with ``S Sᵀ`` the Fisher information of each sample's outputs, shape ``(columns, *outputs)``."""


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax classification: `torch.nn.CrossEntropyLoss`. One observation is one label.

    Parameters
    ----------
    dim
        Axis of the classes: 1 as in `torch.nn.functional.cross_entropy`; -1 for outputs ``(n, positions, classes)``.
    """

    dim: int = 1

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if outputs.ndim < 2 or not -outputs.ndim <= self.dim < outputs.ndim or self.dim in (0, -outputs.ndim):
            raise ConfigurationError(
                f"{self} needs outputs of shape (n, classes, …) with classes on axis {self.dim}, got "
                f"{tuple(outputs.shape)}; for one logit a sample use Bernoulli()"
            )
        if outputs.shape[self.dim] < 2:
            raise ConfigurationError(
                f"{self} needs at least two classes, got outputs of shape {tuple(outputs.shape)}; "
                "for one logit a sample use Bernoulli()"
            )

    def observations(self, outputs: Tensor) -> int:
        return outputs.numel() // outputs.shape[self.dim]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        classes_second = outputs.movedim(self.dim, 1)
        classes = classes_second.shape[1]
        expected = (classes_second.shape[0], *classes_second.shape[2:])
        if targets.is_floating_point() or tuple(targets.shape) != expected:
            raise ConfigurationError(
                f"{self} needs integer labels of shape {expected}, got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            raise ConfigurationError(
                f"labels must lie in 0 … {classes - 1} for outputs with {classes} classes, got values from "
                f"{int(targets.min())} to {int(targets.max())}: check the labels or the width of the last layer"
            )
        return functional.cross_entropy(classes_second, targets)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        classes_last = outputs.detach().movedim(self.dim, -1)
        probabilities = classes_last.float().softmax(-1) if classes_last.itemsize < 4 else classes_last.softmax(-1)
        # As torch.multinomial does it, draw for draw (of exponential variables with the probabilities as rates, the
        # first to ring), but for the look that it takes at its input, which waits for a GPU.
        waited = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / waited).argmax(-1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        probabilities = outputs.softmax(self.dim)
        hot = torch.zeros_like(probabilities).scatter_(self.dim, targets.unsqueeze(self.dim), 1)
        return probabilities - hot

    def hessian_root(self, outputs: Tensor) -> Tensor:
        # Column k of an observation: sqrt(p_k) (e_k - p); their outer products sum to diag(p) - p pᵀ.
        p = outputs.softmax(self.dim).movedim(self.dim, -1)
        classes = p.shape[-1]
        columns = p.sqrt().unsqueeze(-1) * (torch.eye(classes, dtype=p.dtype, device=p.device) - p.unsqueeze(-2))
        return _columns_a_position(columns, self.dim)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Independent logits: `torch.nn.BCEWithLogitsLoss` summed over outputs, averaged over samples.

    One observation is a sample with all its outputs.
    """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _same_shape(self, outputs, targets)
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ConfigurationError(f"{self} needs targets between 0 and 1")
        total = functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        return total / outputs.shape[0]

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        # What is not a number is refused elsewhere, and maybe later; here it would end the process of a GPU.
        probabilities = outputs.detach().sigmoid().nan_to_num(nan=0.0)
        return torch.bernoulli(probabilities, generator=generator)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets

    def hessian_root(self, outputs: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return _diagonal_columns((p * (1 - p)).sqrt())


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression with known variance: half the squared error over the variance, summed over outputs, mean over samples.

    One observation is a sample with all its outputs. For `torch.nn.MSELoss()`, which also averages over the d outputs
    of a sample, take ``variance=d / 2``.

    Parameters
    ----------
    variance
        Variance of every output, > 0.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.variance) and self.variance > 0):
            raise ConfigurationError(f"Gaussian needs a variance > 0, got {self.variance}")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _same_shape(self, outputs, targets)
        return (outputs - targets).square().sum() / (2 * self.variance * outputs.shape[0])

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(outputs).normal_(generator=generator)
        return outputs.detach() + math.sqrt(self.variance) * noise

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.variance

    def hessian_root(self, outputs: Tensor) -> Tensor:
        return _diagonal_columns(torch.full_like(outputs, 1 / math.sqrt(self.variance)))


def _same_shape(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ConfigurationError(
            f"{likelihood} needs targets of the outputs' shape {tuple(outputs.shape)}, got {tuple(targets.shape)}"
        )


def _diagonal_columns(root: Tensor) -> Tensor:
    """One column for each output of a sample, holding the root of its variance."""
    n = root.shape[0]
    return torch.diag_embed(root.reshape(n, -1)).movedim(1, 0).reshape(-1, *root.shape)


def _columns_a_position(columns: Tensor, dim: int) -> Tensor:
    """Spread per-position columns, shape ``(n, *positions, columns, classes)``, over columns of whole samples."""
    n, classes = columns.shape[0], columns.shape[-1]
    positions = columns.shape[1:-2]
    count = math.prod(positions)
    flat = columns.reshape(n, count, classes, classes)
    spread = flat.new_zeros(count, classes, n, count, classes)
    index = torch.arange(count, device=flat.device)
    spread[index, :, :, index] = flat.permute(1, 2, 0, 3)
    return spread.reshape(count * classes, n, *positions, classes).movedim(-1, dim + 1 if dim >= 0 else dim)
