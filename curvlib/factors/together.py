"""Products of several blocks' small explicit rows in one call: handing one over takes longer than it lasts."""

from __future__ import annotations

from collections.abc import Sequence
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
    totals: list[Any] = [None] * len(several)
    matrices, places = [], []
    for place, factors in enumerate(several):
        base, _ = _unscaled(factors)
        if type(base) is Dense:
            matrices += [array.reshape(array.shape[0], -1) for array in base.values.values()]
            places += [place] * len(base.values)
        else:
            totals[place] = base.gram()
    for place, product in zip(places, _self_products(matrices), strict=True):
        totals[place] = product if totals[place] is None else totals[place] + product
    for place, factors in enumerate(several):
        _, scale = _unscaled(factors)
        multiple = scale**2 * (1.0 if multiples is None else multiples[place])
        if multiple != 1:
            totals[place] *= multiple
    return totals


def covariances(several: Sequence[Factors]) -> list[Array]:
    """`Factors.covariance` of each of several blocks, new arrays of shape ``(parameters, parameters)``."""
    totals: list[Any] = [None] * len(several)
    matrices, places = [], []
    for place, factors in enumerate(several):
        base, _ = _unscaled(factors)
        if type(base) is Dense:
            matrices.append(base.matrix().T)
            places.append(place)
        else:
            totals[place] = factors.covariance()
    for place, product in zip(places, _self_products(matrices), strict=True):
        _, scale = _unscaled(several[place])
        totals[place] = product if scale == 1 else product * scale**2
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
