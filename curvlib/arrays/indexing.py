"""Products with sparse one-hot rows, beyond the array-API standard.

The rows E of a lookup have a single 1 each, at ``index``. ``E W`` is the gather ``W[index]``, ``Eᵀ V`` is `index_add`,
and ``E Fᵀ`` for other such rows F, the table of which lookups are of the same entry, is `equal_pairs`.
"""

from __future__ import annotations

from curvlib.arrays.namespace import Array, device, kernels, namespace

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
        Shape ``(size, *rest)``. On a GPU the order of additions, and with it the last digit, is not fixed.
    """
    return kernels(values).index_add(size, index, values)


def equal_pairs(left: Array, right: Array) -> tuple[Array, Array]:
    """Positions of all pairs of equal integers in two arrays, by sorting. Waits for the device, to learn their number.

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
    here = kernels(left).positions(counts)
    # Number of each pair among those of its left element.
    start = xp.cumsum(counts, axis=0) - counts
    rank = xp.arange(here.shape[0], device=device(left)) - start[here]
    return here, order[first[here] + rank]
