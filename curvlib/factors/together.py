"""Products of several blocks' small explicit rows in one call: handing one over takes longer than it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from curvlib.arrays import Array, device, namespace, self_product
from curvlib.factors.base import Factors
from curvlib.factors.dense import Dense
from curvlib.factors.scaled import Scaled

__all__ = ["covariances", "grams"]

_SMALL = 1 << 15
"""Elements up to which copying matrices together costs less than a call for each."""

_SHORT = 1 << 22
"""Multiply-adds up to which a product is over before a thread has woken for it."""


def grams(several: Sequence[Factors], multiples: Sequence[float] | None = None) -> list[Array]:
    """`Factors.gram` of each of several blocks.

    Parameters
    ----------
    several
        Of any kinds.
    multiples
        What each is multiplied with, 1 if None.

    Returns
    -------
    list
        New arrays of shape ``(rows, rows)``.
    """

    def matrices(rows: Dense) -> list[Array]:
        return [array.reshape(array.shape[0], -1) for array in rows.values.values()]

    return _totals(several, matrices, lambda factors: factors.gram(), multiples)


def covariances(several: Sequence[Factors]) -> list[Array]:
    """`Factors.covariance` of each of several blocks, new arrays of shape ``(parameters, parameters)``."""
    return _totals(several, lambda rows: [rows.matrix().T], lambda factors: factors.covariance())


def _totals(
    several: Sequence[Factors],
    matrices: Callable[[Dense], list[Array]],
    otherwise: Callable[[Factors], Array],
    multiples: Sequence[float] | None = None,
) -> list[Array]:
    """For each block the sum of A Aᵀ over the matrices of its explicit rows, or what other kinds have instead."""
    apart = [_unscaled(factors) for factors in several]
    explicit = [(place, one) for place, (base, _) in enumerate(apart) if type(base) is Dense for one in matrices(base)]
    totals: list[Any] = [None if type(base) is Dense else otherwise(base) for base, _ in apart]
    for (place, _), product in zip(explicit, _self_products([one for _, one in explicit]), strict=True):
        totals[place] = product if totals[place] is None else totals[place] + product
    for place, (_, scale) in enumerate(apart):
        multiple = scale**2 * (1.0 if multiples is None else multiples[place])
        if multiple != 1:
            totals[place] *= multiple
    return totals


def _unscaled(factors: Factors) -> tuple[Factors, float]:
    return (factors.base, factors.scale) if type(factors) is Scaled else (factors, 1.0)


def _self_products(matrices: Sequence[Array]) -> list[Array]:
    """A Aᵀ of each matrix, of small ones of equal shape in one call, all of them new arrays."""
    products: list[Any] = [None] * len(matrices)
    alike: dict[Any, list[int]] = {}
    for place, matrix in enumerate(matrices):
        n, d = matrix.shape
        if n * d <= _SMALL and n * n * d <= _SHORT:
            alike.setdefault((n, d, matrix.dtype, device(matrix)), []).append(place)
        else:
            products[place] = self_product(matrix)
    for places in alike.values():
        if len(places) == 1:
            products[places[0]] = self_product(matrices[places[0]])
            continue
        stack = namespace(matrices[places[0]]).stack([matrices[place] for place in places])
        for place, product in zip(places, list(stack @ stack.swapaxes(1, 2)), strict=True):
            products[place] = product
    return products
