"""Gather and scatter by integers beyond the array-API standard, one implementation per library."""

from __future__ import annotations

import array_api_compat

from curvlib.arrays.namespace import Array, device, namespace

__all__ = ["equal_pairs", "index_add"]


def index_add(size: int, index: Array, values: Array) -> Array:
    """Sum of `values` by index: element k of the result is the sum of all values whose index is k.

    Parameters
    ----------
    size
        Length of the result's first axis.
    index
        Integers in ``[0, size)``, shape ``(m,)``; repeated ones add up.
    values
        Shape ``(m, *rest)``.

    Returns
    -------
    Array
        Shape ``(size, *rest)``.
    """
    xp = namespace(values)
    total = xp.zeros((size, *values.shape[1:]), dtype=values.dtype, device=device(values))
    if array_api_compat.is_torch_array(values):
        return total.index_add_(0, index, values)
    # NumPy and CuPy have an unbuffered add beside the standard.
    xp.add.at(total, index, values)
    return total


def equal_pairs(left: Array, right: Array) -> tuple[Array, Array]:
    """Positions of all pairs of equal integers in two arrays, by sorting.

    Parameters
    ----------
    left, right
        Integers, shapes ``(m,)`` and ``(k,)``.

    Returns
    -------
    tuple
        Positions in `left` and in `right`, both of shape ``(pairs,)``.
    """
    xp = namespace(left, right)
    order = xp.argsort(right)
    ordered = right[order]
    first = xp.searchsorted(ordered, left, side="left")
    counts = xp.searchsorted(ordered, left, side="right") - first
    here = _repeat(xp.arange(left.shape[0], device=device(left)), counts)
    # Number of each pair among those of its left element.
    start = xp.cumsum(counts, axis=0) - counts
    rank = xp.arange(here.shape[0], device=device(left)) - start[here]
    return here, order[first[here] + rank]


def _repeat(array: Array, counts: Array) -> Array:
    xp = namespace(array)
    return xp.repeat_interleave(array, counts) if array_api_compat.is_torch_array(array) else xp.repeat(array, counts)
