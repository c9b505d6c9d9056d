"""Who does the work: when NumPy and SciPy may stand in for torch, and whether a compiler is looking on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

__all__ = ["is_compiling", "on_host"]

_DTYPES = (torch.float32, torch.float64)


def on_host(*arrays: Tensor) -> bool:
    """Whether routines of NumPy and SciPy may stand in for torch's: for plain numbers that nobody follows."""
    if is_dynamo_compiling():
        return False
    for array in arrays:
        if type(array) is not Tensor or array.device.type != "cpu" or array.dtype not in _DTYPES or array.requires_grad:
            return False
    # Who watches torch's operations, to count them say, would miss this one; inside torch.func there is no memory.
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())
