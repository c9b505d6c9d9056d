"""The engine's own arithmetic keeps its precision inside `torch.autocast`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["without_autocast"]


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes of the operands, whatever `torch.autocast` says around.

    Parameters
    ----------
    device
        Where the computation happens.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
