"""Elementwise operations on tensors of middle size, without waking a thread for half of what is over before it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

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
    cut: tuple[list[Tensor], ...] = tuple([] for _ in several)
    for row in zip(*several, strict=True):
        several_views = _is_middle(row[0]) and all(one.is_contiguous() for one in row)
        for pieces, one in zip(cut, row, strict=True):
            pieces += one.view(-1).split(ALONE) if several_views else [one]
    return cut


def rows_in_pieces(matrix: Tensor) -> int:
    """How many rows of a matrix an elementwise operation should take at a time: all, but on a CPU for middle sizes."""
    n, d = matrix.shape
    return max(1, ALONE // d) if _is_middle(matrix) else n


def _is_middle(tensor: Tensor) -> bool:
    if not ALONE < tensor.numel() < _WORTH_WAKING or not tensor.is_cpu or is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()  # inside them nothing is changed in place
