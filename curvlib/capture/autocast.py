"""The engine's own arithmetic keeps its precision inside `torch.autocast`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtypes of the operands inside, whatever `torch.autocast` says around.

    Parameters
    ----------
    device
        Where the computation happens.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else _AS_IT_IS


_AS_IT_IS = nullcontext()
