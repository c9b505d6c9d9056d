"""Transforms at work: the buffers that they declare belong to the optimizer's state."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import as_array
from curvlib.precond.transforms import Context, Direction, Transform

__all__ = ["transformed"]


def transformed(
    transforms: Sequence[Transform],
    state: MutableMapping[Tensor, Any],
    directions: Sequence[Direction],
    context: Context,
    before: bool,
) -> list[Tensor]:
    """Directions after the transforms that act before the curvature, or after those that act behind it.

    Parameters
    ----------
    transforms
        All of them, in the user's order.
    state
        Parameter to its buffers; missing ones are created.
    directions, context
        As in `Transform.apply`.
    before
        Whether it is the turn of those that change the gradient.
    """
    for index, transform in enumerate(transforms):
        if transform.on_gradient == before and directions:
            same = sum(type(other) is type(transform) for other in transforms[:index])
            prefix = type(transform).__name__ + (str(same + 1) if same else "")
            buffers = {name: _buffers(state, f"{prefix}.{name}", context.parameters) for name in transform.buffers}
            given: list[Any] = [one if transform.takes_products else as_array(one) for one in directions]
            directions = transform.apply(given, context, buffers)
    return [as_array(one) for one in directions]


def _buffers(state: MutableMapping[Tensor, Any], key: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    own = [state[p] for p in parameters]
    for p, held in zip(parameters, own, strict=True):
        if key not in held:
            held[key] = torch.zeros_like(p)
    return [held[key] for held in own]
