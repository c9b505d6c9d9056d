"""What autograd saved of a call and rows need again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fitting", "saved_results"]


def saved_results(output: Tensor, operation: str) -> tuple[Tensor, Tensor] | None:
    """Second and third result of the operation that made an output; None where they are not to be had.

    Parameters
    ----------
    output
        First result.
    operation
        How the name of its node in the autograd graph begins.
    """
    node = output.grad_fn
    if node is None or not node.name().startswith(operation):
        return None
    # Under hooks for saved tensors, such as those of checkpointing, a look would bring tensors back or compute them.
    hooked = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if hooked is None or hooked(True) is not None:
        return None
    return node._saved_result1, node._saved_result2  # type: ignore[attr-defined]  # torch names them at run time


def fitting(saved: tuple[Tensor, Tensor] | None, shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what was saved if both are of this shape and of the dtype of a tensor; None otherwise."""
    if saved is None or any(one.shape != tuple(shape) or one.dtype != like.dtype for one in saved):
        return None
    return saved
