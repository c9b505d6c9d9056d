"""What happens to the natural gradient before it becomes a step: small parts, applied in the order given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from curvlib.errors import ConfigurationError

__all__ = ["Context", "KLClip", "Momentum", "Transform", "WeightDecay"]


@dataclass(frozen=True)
class Context:
    """What a transform may look at, one entry a parameter.

    Parameters
    ----------
    parameters
        Parameters before the step.
    gradients
        Their gradients.
    rates
        Their learning rates.
    step
        Number of the step, 0 for the first.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    rates: list[float]
    step: int


class Transform(ABC):
    """One part of the update rule, a pure rule over declared state.

    A transform owns no tensors. The buffers that it declares are created as zeros of each parameter's shape, saved in
    the optimizer's state under ``<class name>.<buffer>``, and updated in place.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of the per-parameter buffers that the transform needs."""

    @abstractmethod
    def apply(self, directions: list[Tensor], context: Context, buffers: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """Return new directions; the parameters will move by ``-lr · direction``.

        Parameters
        ----------
        directions
            One tensor a parameter. They may be changed in place and returned.
        context
            Parameters, gradients, learning rates and step.
        buffers
            For each declared name the parameters' buffers.
        """


@dataclass(frozen=True)
class KLClip(Transform):
    """Shrinks the whole step so that its predicted KL divergence stays below a bound.

    Parameters
    ----------
    bound
        κ > 0.

    Notes
    -----
    ``ν = min(1, sqrt(κ / Σ lr² ⟨direction, gradient⟩))`` over all parameters (K-FAC practice; shared by the authors of
    TENGraD with κ = 1e-2).
    """

    bound: float = 1e-2

    def __post_init__(self) -> None:
        _require(self, "bound", self.bound, self.bound > 0, "> 0")

    def apply(self, directions: list[Tensor], context: Context, buffers: Mapping[str, list[Tensor]]) -> list[Tensor]:
        products = [
            torch.sum(direction * gradient) * rate**2
            for direction, gradient, rate in zip(directions, context.gradients, context.rates, strict=True)
        ]
        wide = torch.promote_types(products[0].dtype, torch.float32)
        total = torch.stack([product.to(wide) for product in products]).sum()
        # A product that is not positive bounds nothing: κ / 0 is infinite, and the minimum is 1.
        scale = (self.bound / total.clamp_min(0)).sqrt().clamp_max(1)
        torch._foreach_mul_(directions, scale)
        return directions


@dataclass(frozen=True)
class Momentum(Transform):
    """Heavy-ball momentum without dampening: ``m ← β m + direction``.

    Parameters
    ----------
    decay
        β in [0, 1).
    nesterov
        Whether to look ahead: the step is ``direction + β m``.
    """

    decay: float = 0.9
    nesterov: bool = False
    buffers = ("momentum",)

    def __post_init__(self) -> None:
        _require(self, "decay", self.decay, 0 <= self.decay < 1, "in [0, 1)")

    def apply(self, directions: list[Tensor], context: Context, buffers: Mapping[str, list[Tensor]]) -> list[Tensor]:
        momentum = buffers["momentum"]
        torch._foreach_mul_(momentum, self.decay)
        torch._foreach_add_(momentum, directions)
        if self.nesterov:
            torch._foreach_add_(directions, momentum, alpha=self.decay)
            return directions
        return [buffer.clone() for buffer in momentum]


@dataclass(frozen=True)
class WeightDecay(Transform):
    """Adds ``rate · parameter`` to the direction.

    Where it stands in the list decides its kind: before the curvature there is no place for it, before momentum the
    decay is averaged too, after momentum (as the authors of TENGraD have it) it is not.

    Parameters
    ----------
    rate
        ≥ 0.
    """

    rate: float = 0.0

    def __post_init__(self) -> None:
        _require(self, "rate", self.rate, self.rate >= 0, "≥ 0")

    def apply(self, directions: list[Tensor], context: Context, buffers: Mapping[str, list[Tensor]]) -> list[Tensor]:
        if self.rate:
            torch._foreach_add_(directions, context.parameters, alpha=self.rate)
        return directions


def _require(transform: Transform, name: str, value: float, holds: bool, what: str) -> None:
    if not (math.isfinite(value) and holds):
        raise ConfigurationError(f"{type(transform).__name__} needs {name} {what}, got {value!r}")
