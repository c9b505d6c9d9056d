"""Elementwise operations on tensors of middle size, without waking a thread for half of what is over before it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

__all__ = ["ALONE", "in_pieces", "rows_in_pieces"]

ALONE = 1 << 15
"""Elements up to which torch gives an elementwise operation to one thread, on a CPU."""

_WORTH_WAKING = 1 << 18
"""Elements from which another thread takes off more than its waking takes."""


def in_pieces(*several: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """Lists of tensors as they are, but on a CPU those of middle size as several views, one behind the other.

    Parameters
    ----------
    several
        Lists of equal length, whose tensors have the same shapes.

    Returns
    -------
    tuple
        A list for each. A tensor is cut if its shape is of middle size, and if it and all in its place are contiguous.
    """
    if len(set(map(len, several))) > 1:
        counts = ", ".join(str(len(tensors)) for tensors in several)
        raise ValueError(f"lists of {counts} tensors have no common places, they need equal lengths")
    cut = tuple(map(list, several))
    # From the end, so that places before stay as they are. Most lists have few or none of middle size.
    for place in range(len(several[0]) - 1, -1, -1):
        if _is_middle(several[0][place]) and all(tensors[place].is_contiguous() for tensors in several):
            for pieces in cut:
                pieces[place : place + 1] = torch.split(pieces[place].view(-1), ALONE)
    return cut


def rows_in_pieces(matrix: Tensor) -> int:
    """How many rows of a matrix an elementwise operation should take at a time: all, but on a CPU for middle sizes."""
    n, d = matrix.shape
    return max(1, ALONE // d) if _is_middle(matrix) else n


def _is_middle(tensor: Tensor) -> bool:
    if not ALONE < tensor.numel() < _WORTH_WAKING or not tensor.is_cpu or is_dynamo_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # inside them nothing is changed in place
