"""What a step refuses before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.capture import GradientRows
from curvlib.errors import CaptureError, ConfigurationError, NonFiniteError

__all__ = ["check_directions", "check_finite_gradients", "check_gradients", "check_unscaled"]


def check_unscaled(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a GradScaler that has announced itself, as it does to optimizers that said that they know of it.

    Raises
    ------
    ConfigurationError
        Saying what cannot be combined.
    """
    announced = [vars(optimizer).pop(name, None) for name in ("grad_scale", "found_inf")]
    if any(one is not None for one in announced):
        raise ConfigurationError(
            "a GradScaler scales gradients, and fused=True takes them as rows, which it cannot unscale: leave out "
            "fused=True"
        )


def check_gradients(
    groups: Sequence[Mapping[str, Any]], loss: Any, rows: Mapping[str, GradientRows], step: int
) -> None:
    """Refuse a step without gradients, with sparse ones, or with a loss that is not finite.

    Raises
    ------
    CaptureError
        If there are none, or sparse ones.
    NonFiniteError
        If the loss is not finite.
    """
    given = [p for group in groups for p in group["params"] if p.grad is not None]
    if not given and not rows:
        raise CaptureError("step() found no gradient: call loss.backward() before optimizer.step()")
    if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
        raise NonFiniteError(f"step {step}: the loss is {loss.tolist()}; parameters and state are unchanged")
    if any(p.grad.is_sparse for p in given):
        raise CaptureError("gradients must be dense: set sparse=False on the embedding")


def check_finite_gradients(groups: Sequence[Mapping[str, Any]], model: nn.Module, step: int) -> None:
    """Refuse gradients that are not finite.

    Raises
    ------
    NonFiniteError
        Naming the parameters.
    """
    given = [p for group in groups for p in group["params"] if p.grad is not None]
    bad = _not_finite([p.grad for p in given])
    if bad:
        names = {id(p): name for name, p in model.named_parameters()}
        listed = ", ".join(names.get(id(given[place]), "?") for place in bad)
        raise NonFiniteError(
            f"step {step}: the gradient is not finite in {listed}; parameters and state are "
            "unchanged. Look at the loss and the inputs, lower the learning rate, or scale the loss (GradScaler) "
            "under float16"
        )


def check_directions(
    directions: Mapping[str, Mapping[str, Tensor]], others: Sequence[Tensor], step: int, cause: Callable[[], None]
) -> None:
    """Refuse natural gradients that are not finite.

    Parameters
    ----------
    directions
        By block.
    others
        Gradients outside every block.
    step
        Number of the step.
    cause
        Raises if the gradients themselves are not finite; asked only when something is wrong.

    Raises
    ------
    NonFiniteError
        Naming the blocks.
    """
    places = [(block, tensor) for block, parts in directions.items() for tensor in parts.values()]
    bad = _not_finite([*(tensor for _, tensor in places), *others])
    if bad:
        cause()
        blocks = dict.fromkeys(places[place][0] for place in bad if place < len(places))
        raise NonFiniteError(
            f"step {step}: the natural gradient of block {', '.join(map(repr, blocks))} is not finite; "
            "parameters and state are unchanged. Look at the loss and the inputs, lower the learning rate or raise "
            "the damping"
        )


def _not_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of tensors that hold an infinity or NaN."""
    if not tensors:
        return []
    norms = torch._foreach_norm(list(tensors))
    total = torch.stack([norm.to(norms[0]) for norm in norms])
    if bool(torch.isfinite(total.sum())):
        return []
    # A sum of large norms may overflow where none of them is infinite.
    return [place for place, good in enumerate(torch.isfinite(total).tolist()) if not good]
