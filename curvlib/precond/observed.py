"""What torch puts around an optimizer's methods for those who look on, left out while nobody does.

A note for profilers takes longer than many a kernel, once the kernels have swept its code out of the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["profiled", "unobserved"]

P = ParamSpec("P")
R = TypeVar("R")


def profiled() -> bool:
    """Whether a profiler is at work."""
    return bool(torch._C._autograd._profiler_enabled())


def unobserved(step: Callable[P, R]) -> Callable[P, R]:
    """`step` as `torch.optim.Optimizer.profile_hook_step` wraps it, or itself while no profiler and no hook would see.

    Parameters
    ----------
    step
        Method of an optimizer.
    """
    observed = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        looked_at = profiled() or _hooked(cast(Any, args[0]))
        return observed(*args, **kwargs) if looked_at else step(*args, **kwargs)

    return either


def _hooked(one: Optimizer) -> bool:
    """Whether there are hooks for the steps of this optimizer, or of all."""
    return bool(
        one._optimizer_step_pre_hooks
        or one._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
