"""Elementwise operations on tensors of middle size, without waking a thread for half of what is over before it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.compiler import is_compiling

__all__ = ["in_pieces"]

_ALONE = 1 << 15
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
    compiled = is_compiling()
    for row in zip(*several, strict=True):
        first = row[0]
        middle = not compiled and _ALONE < first.numel() < _WORTH_WAKING and first.is_cpu
        several_views = middle and all(one.is_contiguous() for one in row)
        for pieces, one in zip(cut, row, strict=True):
            pieces += one.view(-1).split(_ALONE) if several_views else [one]
    return cut
