"""What a step refuses before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.arrays import Deferred, Product
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
    held = vars(optimizer)
    scale, found = held.pop("grad_scale", None), held.pop("found_inf", None)
    if scale is not None or found is not None:
        raise ConfigurationError(
            "a GradScaler scales gradients, and fused=True takes them as rows, which it cannot unscale: leave out "
            "fused=True"
        )


def check_gradients(
    groups: Sequence[Mapping[str, Any]],
    loss: Any,
    rows: Mapping[str, GradientRows],
    step: int,
    later: Deferred | None = None,
) -> None:
    """Refuse a step without gradients, with sparse ones, or with a loss that is not finite.

    Parameters
    ----------
    groups
        Parameter groups.
    loss
        What a closure returned, if anything.
    rows
        Gradients as rows.
    step
        Number of the step.
    later
        Takes the check of the loss, where it is put off.

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
    if isinstance(loss, Tensor):
        elsewhere = loss.device != groups[0]["params"][0].device  # a loss on the CPU may as well be looked at
        good = torch.isfinite(loss).all()
        _require(good, partial(_bad_loss, loss.detach(), step), None if elsewhere else later)
    if any(p.grad.is_sparse for p in given):
        raise CaptureError("gradients must be dense: set sparse=False on the embedding")


def check_finite_gradients(
    groups: Sequence[Mapping[str, Any]], model: nn.Module, step: int, later: Deferred | None = None
) -> None:
    """Refuse gradients that are not finite.

    Parameters
    ----------
    groups
        Parameter groups.
    model
        Knows the names of parameters.
    step
        Number of the step.
    later
        Takes the check, where it is put off.

    Raises
    ------
    NonFiniteError
        Naming the parameters.
    """
    given = [p for group in groups for p in group["params"] if p.grad is not None]
    if given:
        norms = _norms([p.grad for p in given])
        # Gradients may be gone when this is looked at; their norms are not.
        _require(_all_finite(norms, later), partial(_bad_gradients, norms, given, model, step), later)


def _bad_gradients(norms: Tensor, given: Sequence[Tensor], model: nn.Module, step: int) -> str:
    names = {id(p): name for name, p in model.named_parameters()}
    listed = ", ".join(names.get(id(given[place]), "?") for place in _not_finite(norms))
    return (
        f"step {step}: the gradient is not finite in {listed}; parameters and state are "
        "unchanged. Look at the loss and the inputs, lower the learning rate, or scale the loss (GradScaler) "
        "under float16"
    )


def check_directions(
    directions: Mapping[str, Mapping[str, Tensor | Product]],
    others: Sequence[Tensor],
    step: int,
    cause: Callable[[], None],
    later: Deferred | None = None,
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
        Raises if the gradients themselves are not finite; asked only when something is wrong, and not where checks are
        put off.
    later
        Takes the check, where it is put off.

    Raises
    ------
    NonFiniteError
        Naming the blocks.
    """
    places = [(block, one) for block, parts in directions.items() for one in parts.values()]
    given = [*(one for _, one in places), *others]
    if not given:
        return
    norms = _norms(given)
    message = partial(_bad_directions, norms, [block for block, _ in places], step)
    good = _all_finite(norms, later)
    if good is False:
        cause()
    _require(good, message, later)


def _bad_directions(norms: Tensor, blocks: Sequence[str], step: int) -> str:
    named = dict.fromkeys(blocks[place] for place in _not_finite(norms) if place < len(blocks))
    return (
        f"step {step}: the natural gradient of block {', '.join(map(repr, named))} is not finite; "
        "parameters and state are unchanged. Look at the loss and the inputs, lower the learning rate or raise "
        "the damping"
    )


def _bad_loss(loss: Tensor, step: int) -> str:
    return f"step {step}: the loss is {loss.tolist()}; parameters and state are unchanged"


def _require(holds: Tensor | bool, message: Callable[[], str], later: Deferred | None) -> None:
    if later is not None:
        later.add(holds, message, NonFiniteError)
    elif not bool(holds):
        raise NonFiniteError(message())


def _norms(several: Sequence[Tensor | Product]) -> Tensor:
    """Norms; for products bounds, from the norms of their matrices: finite only where the product is."""
    norms = iter(torch._foreach_norm([tensor for one in several for tensor in _parts(one)]))
    bounds = [_bound(one, norms) for one in several]
    return torch.stack([bound.to(bounds[0]) for bound in bounds])


def _parts(one: Tensor | Product) -> list[Tensor]:
    if isinstance(one, Tensor):
        return [one]
    return [_gathered(one.left), _gathered(one.right), *([] if one.addend is None else [one.addend])]


def _bound(one: Tensor | Product, norms: Iterator[Tensor]) -> Tensor:
    """Bound of a norm, from those of `_parts` which come next."""
    bound = next(norms)
    if isinstance(one, Product):
        bound = bound * next(norms)
        if one.addend is not None:
            bound = bound + abs(one.multiple) * next(norms)
    return bound


def _gathered(matrix: Tensor) -> Tensor:
    """A matrix, or the norms of its rows if they lie with gaps in between, over which torch is slow to sum."""
    if matrix.is_contiguous() or matrix.mT.is_contiguous():
        return matrix
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms


def _all_finite(norms: Tensor, later: Deferred | None) -> Tensor | bool:
    """Whether all are: on the device where that is put off, at once otherwise."""
    if later is not None:
        return torch.isfinite(norms).all()
    # A sum of large norms may overflow where none of them is infinite.
    return bool(torch.isfinite(norms.sum())) or not _not_finite(norms)


def _not_finite(norms: Tensor) -> list[int]:
    """Positions of norms that are infinite or NaN."""
    return [place for place, good in enumerate(torch.isfinite(norms).tolist()) if not good]
