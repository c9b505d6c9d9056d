"""What happens to a gradient before the curvature and after it: small parts, applied in the order given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from curvlib.arrays import Product, as_array, in_pieces
from curvlib.errors import ConfigurationError
from curvlib.hyperparameters import Checked

__all__ = [
    "Context",
    "Direction",
    "GradientClip",
    "Graft",
    "KLClip",
    "Momentum",
    "NormConstraint",
    "Transform",
    "TrustRatio",
    "WeightDecay",
    "check_order",
]

Buffers = Mapping[str, list[Tensor]]

Direction: TypeAlias = Tensor | Product
"""What a parameter moves along, or what that is the product of."""


@dataclass(frozen=True)
class Context:
    """What a transform may look at, one entry a parameter.

    Parameters
    ----------
    parameters
        Parameters before the step.
    given
        Their gradients, or a function that makes them: `gradients` calls it when a transform first asks.
    rates
        Their learning rates.
    step
        Number of the step, 0 for the first.
    blocks
        Names of the blocks that they belong to; "" outside every block.
    groups
        Their parameter groups; none where no optimizer has them.
    """

    parameters: list[Tensor]
    given: list[Tensor] | Callable[[], list[Tensor]]
    rates: list[float]
    step: int
    blocks: tuple[str, ...] = ()
    groups: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Gradients of the parameters."""
        return self.given() if callable(self.given) else self.given

    def option(self, name: str, default: float) -> list[float]:
        """Option of each parameter's group; `default` where a group has none, or None."""
        given = [group.get(name) for group in self.groups] or [None] * len(self.parameters)
        return [default if value is None else float(value) for value in given]

    def by_block(self) -> list[list[int]]:
        """Positions of the parameters of each block; a parameter outside every block is by itself."""
        groups: dict[object, list[int]] = {}
        names = self.blocks or ("",) * len(self.parameters)
        for place, name in enumerate(names):
            groups.setdefault(name or place, []).append(place)
        return list(groups.values())


class Transform(Checked, ABC):
    """One part of the update rule, a pure rule over declared state.

    A transform owns no tensors. The buffers that it declares are created as zeros of each parameter's shape, saved in
    the optimizer's state under ``<class name>.<buffer>``, and updated in place.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of the per-parameter buffers that the transform needs."""

    on_gradient: bool = False
    """Whether it changes the gradient before the curvature instead of the natural gradient after it."""

    needs_gradient: ClassVar[bool] = False
    """Whether it looks at `Context.gradients`."""

    takes_products: ClassVar[bool] = False
    """Whether directions may also be products of matrices (`curvlib.arrays.Product`); each class says so for itself."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Not inherited: an `apply` that overrides one that takes them need not.
        cls.takes_products = vars(cls).get("takes_products", False)

    @abstractmethod
    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        """Return new directions; the parameters will move by ``-lr · direction``.

        Parameters
        ----------
        directions
            One tensor a parameter. They belong to someone else, a gradient or a buffer: never change them in place.
        context
            Parameters, gradients, learning rates and step.
        buffers
            For each declared name the parameters' buffers.
        """


def check_order(transforms: Sequence[Transform]) -> None:
    """Refuse an order that cannot be followed.

    Raises
    ------
    ConfigurationError
        If something that changes the gradient comes after something that changes the natural gradient.
    """
    after = None
    for transform in transforms:
        if not transform.on_gradient:
            after = transform
        elif after is not None:
            raise ConfigurationError(
                f"{transform} changes the gradient before the curvature, so it cannot come after {after}, which "
                "changes the natural gradient: put it first"
            )


@dataclass(frozen=True)
class GradientClip(Transform):
    """Scales the whole gradient down to a bound on its norm, before the curvature.

    Parameters
    ----------
    norm
        Greatest Euclidean norm over all parameters, > 0.
    """

    norm: float
    on_gradient = True
    needs_gradient = True

    def __post_init__(self) -> None:
        _require(self, "norm", self.norm, self.norm > 0, "> 0")

    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        total = _norm(directions)
        return list(torch._foreach_mul(directions, (self.norm / total).clamp_max(1)))


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
    needs_gradient = True

    def __post_init__(self) -> None:
        _require(self, "bound", self.bound, self.bound > 0, "> 0")

    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        products = [
            torch.sum(direction * gradient) * rate**2
            for direction, gradient, rate in zip(directions, context.gradients, context.rates, strict=True)
        ]
        wide = torch.promote_types(products[0].dtype, torch.float32)
        total = torch.stack([product.to(wide) for product in products]).sum()
        # A product that is not positive bounds nothing: κ / 0 is infinite, and the minimum is 1.
        scale = (self.bound / total.clamp_min(0)).sqrt().clamp_max(1)
        return list(torch._foreach_mul(directions, scale))


@dataclass(frozen=True)
class NormConstraint(Transform):
    """Scales the whole step down to a bound on its Euclidean norm, learning rates included.

    Parameters
    ----------
    norm
        Greatest norm of the change of all parameters, > 0.
    """

    norm: float

    def __post_init__(self) -> None:
        _require(self, "norm", self.norm, self.norm > 0, "> 0")

    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        total = _norm(list(torch._foreach_mul(directions, context.rates)))
        return list(torch._foreach_mul(directions, (self.norm / total).clamp_max(1)))


@dataclass(frozen=True)
class Graft(Transform):
    """Gives every block's direction the length of another method's (Agarwal et al. 2020, arXiv 2002.11803).

    Parameters
    ----------
    method
        "sgd": the length of the gradient. "adam": that of Adam's update.
    decays
        Adam's β₁ and β₂.
    eps
        Adam's ε.
    """

    method: Literal["sgd", "adam"] = "sgd"
    decays: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    buffers = ("first", "second")
    needs_gradient = True

    def __post_init__(self) -> None:
        if self.method not in ("sgd", "adam"):
            raise ConfigurationError(f"Graft needs the method 'sgd' or 'adam', got {self.method!r}")

    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        lengths = context.gradients if self.method == "sgd" else self._adam(context, buffers)
        result = list(directions)
        for places in context.by_block():
            own = [directions[place] for place in places]
            ratio = _norm([lengths[place] for place in places]) / _norm(own)
            # A direction of length zero stays where it is.
            factor = torch.where(torch.isfinite(ratio), ratio, torch.zeros_like(ratio))
            for place, scaled in zip(places, torch._foreach_mul(own, factor), strict=True):
                result[place] = scaled
        return result

    def _adam(self, context: Context, buffers: Buffers) -> list[Tensor]:
        (beta1, beta2), first, second = self.decays, buffers["first"], buffers["second"]
        torch._foreach_lerp_(first, context.gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, context.gradients, context.gradients, 1 - beta2)
        correct1, correct2 = 1 - beta1 ** (context.step + 1), 1 - beta2 ** (context.step + 1)
        scales = torch._foreach_sqrt(torch._foreach_div(second, correct2))
        torch._foreach_add_(scales, self.eps)
        return list(torch._foreach_div(torch._foreach_div(first, correct1), scales))


@dataclass(frozen=True)
class TrustRatio(Transform):
    """Scales every block's direction to a share of the block's own length (LARS, arXiv 1708.03888).

    Parameters
    ----------
    share
        Length of the direction over that of the parameters, > 0. Blocks whose parameters are all zero stay unscaled.
    """

    share: float = 1e-3

    def __post_init__(self) -> None:
        _require(self, "share", self.share, self.share > 0, "> 0")

    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        result = list(directions)
        for places in context.by_block():
            own = [directions[place] for place in places]
            size = _norm([context.parameters[place] for place in places])
            ratio = self.share * size / _norm(own)
            factor = torch.where((size > 0) & torch.isfinite(ratio), ratio, torch.ones_like(ratio))
            for place, scaled in zip(places, torch._foreach_mul(own, factor), strict=True):
                result[place] = scaled
        return result


@dataclass(frozen=True)
class Momentum(Transform):
    """Heavy-ball momentum without dampening: ``m ← β m + direction``.

    Parameters
    ----------
    decay
        β in [0, 1). ``momentum`` in a parameter group is that group's, and what schedulers cycle.
    nesterov
        Whether to look ahead: the step is ``direction + β m``.
    """

    decay: float = 0.9
    nesterov: bool = False
    buffers = ("momentum",)
    takes_products = True

    def __post_init__(self) -> None:
        _require(self, "decay", self.decay, 0 <= self.decay < 1, "in [0, 1)")

    def apply(self, directions: Sequence[Direction], context: Context, buffers: Buffers) -> list[Tensor]:
        momentum, decays = buffers["momentum"], context.option("momentum", self.decay)
        if self.nesterov:
            whole = [as_array(one) for one in directions]
            _decayed_sum(momentum, whole, decays)
            return _foreach_sum(whole, momentum, decays)
        _decayed_sum(momentum, directions, decays)
        return momentum


@dataclass(frozen=True)
class WeightDecay(Transform):
    """Adds ``rate · parameter``, to the direction or to the gradient.

    Added to the direction, its place decides its kind: before momentum the decay is averaged too, after momentum (as
    the authors of TENGraD have it) it is not, which with a learning rate of its own is decoupled decay.

    Parameters
    ----------
    rate
        ≥ 0. ``weight_decay`` in a parameter group is that group's.
    coupled
        Whether it is part of the gradient, and so preconditioned with it.
    """

    rate: float = 0.0
    coupled: bool = False

    def __post_init__(self) -> None:
        _require(self, "rate", self.rate, self.rate >= 0, "≥ 0")
        object.__setattr__(self, "on_gradient", self.coupled)

    def apply(self, directions: list[Tensor], context: Context, buffers: Buffers) -> list[Tensor]:
        rates = context.option("weight_decay", self.rate)
        return _foreach_sum(directions, context.parameters, rates) if any(rates) else directions


def _decayed_sum(totals: list[Tensor], addends: Sequence[Direction], decays: list[float]) -> None:
    """``total ← decay · total + addend``, on a CPU in one pass over memory; a product in the pass that makes it."""
    rest: list[tuple[Tensor, Tensor, float]] = []
    for total, addend, decay in zip(totals, addends, decays, strict=True):
        # In a row, as totals lie that were loaded: elsewhere it is another kernel that makes the product.
        if isinstance(addend, Product) and total.dtype == addend.dtype and total.is_contiguous():
            addend.add_to(total, decay)
        else:
            rest.append((total, as_array(addend), decay))
    totals, decays = [total for total, _, _ in rest], [decay for _, _, decay in rest]
    others = [other for _, other, _ in rest]
    if len(set(decays)) > 1 or is_dynamo_compiling() or not _plain(totals, others):
        torch._foreach_mul_(totals, decays)
        torch._foreach_add_(totals, others)
        return
    # In a row, as totals lie that were loaded: elsewhere the product is rounded before it is added.
    for total, other in zip(*in_pieces(totals, [one.contiguous() for one in others]), strict=True):
        torch.add(other, total, alpha=decays[0], out=total)


def _plain(*several: list[Tensor]) -> bool:
    """Whether tensors are on a CPU, and nobody follows what becomes of them."""
    for tensors in several:
        for tensor in tensors:
            if not tensor.is_cpu or tensor.requires_grad:
                return False
    return True


def _foreach_sum(left: list[Tensor], right: list[Tensor], factors: list[float]) -> list[Tensor]:
    """``left + factor · right``, one factor a tensor."""
    if len(set(factors)) == 1:
        return list(torch._foreach_add(left, right, alpha=factors[0]))
    return list(torch._foreach_add(left, torch._foreach_mul(right, factors)))


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    return total


def _require(transform: Transform, name: str, value: float, holds: bool, what: str) -> None:
    if not (math.isfinite(value) and holds):
        raise ConfigurationError(f"{type(transform).__name__} needs {name} {what}, got {value!r}")
