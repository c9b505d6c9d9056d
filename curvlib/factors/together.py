"""Products of several blocks' small explicit rows in one call: handing one over takes longer than it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from curvlib.arrays import Array, Product, adjoining, alike, matrix_vector, namespace, self_product
from curvlib.factors.base import Factors
from curvlib.factors.dense import Dense
from curvlib.factors.scaled import unscaled

__all__ = ["covariances", "grams", "rmatvecs"]

_SMALL = 1 << 15
"""Elements up to which copying matrices together costs less than a call for each."""

_SHORT = 1 << 22
"""Multiply-adds up to which a product is over before a thread has woken for it."""

_LONG = 1 << 26
"""Multiply-adds up to which a product is better made by one thread, and another by the other, than by all at once."""


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


def rmatvecs(
    several: Sequence[Factors], weights: Sequence[Array], multiples: Sequence[float] | None = None
) -> list[dict[str, Array | Product]]:
    """`Factors.rmatvec_lazily` of each of several blocks with its weights, and times its multiple, 1 if None."""
    apart = [unscaled(factors) for factors in several]
    numbers = [scale * one for (_, scale), one in zip(apart, multiples or [1.0] * len(apart), strict=True)]
    scaled = [w if number == 1 else w * number for w, number in zip(weights, numbers, strict=True)]
    sums = [{} if type(base) is Dense else base.rmatvec_lazily(w) for (base, _), w in zip(apart, scaled, strict=True)]
    explicit = [
        (place, name, array)
        for place, (base, _) in enumerate(apart)
        if type(base) is Dense
        for name, array in base.values.items()
    ]
    matrices = [array if array.ndim == 2 else array.reshape(array.shape[0], -1) for _, _, array in explicit]
    totals = _weighted_sums(matrices, [scaled[place] for place, _, _ in explicit])
    for (place, name, array), total in zip(explicit, totals, strict=True):
        sums[place][name] = total if array.ndim == 2 else total.reshape(array.shape[1:])
    return sums


def _totals(
    several: Sequence[Factors],
    matrices: Callable[[Dense], list[Array]],
    otherwise: Callable[[Factors], Array],
    multiples: Sequence[float] | None = None,
) -> list[Array]:
    """For each block the sum of A Aᵀ over the matrices of its explicit rows, or what other kinds have instead."""
    apart = [unscaled(factors) for factors in several]
    explicit = [(place, one) for place, (base, _) in enumerate(apart) if type(base) is Dense for one in matrices(base)]
    totals: list[Any] = [None if type(base) is Dense else otherwise(base) for base, _ in apart]
    for (place, _), product in zip(explicit, _self_products([one for _, one in explicit]), strict=True):
        totals[place] = product if totals[place] is None else totals[place] + product
    for place, (_, scale) in enumerate(apart):
        multiple = scale**2 * (1.0 if multiples is None else multiples[place])
        if multiple != 1:
            totals[place] *= multiple
    return totals


def _self_products(matrices: Sequence[Array]) -> list[Array]:
    """A Aᵀ of each matrix, of those of equal shape in one call where that pays, all of them new arrays."""
    products: list[Any] = [None] * len(matrices)
    for places in alike(matrices):
        own, (n, d) = [matrices[place] for place in places], matrices[places[0]].shape
        if len(places) == 1:
            continue
        if n * d <= _SMALL and n * n * d <= _SHORT:
            stacks = [(list(range(len(own))), namespace(own[0]).stack(own))]
        else:
            stacks = adjoining(own) if n * n * d <= _LONG else []
        for some, stack in stacks:
            for inner, product in zip(some, list(stack @ stack.swapaxes(1, 2)), strict=True):
                products[places[inner]] = product
    return [self_product(one) if made is None else made for one, made in zip(matrices, products, strict=True)]


def _weighted_sums(matrices: Sequence[Array], weights: Sequence[Array]) -> list[Array]:
    """Aᵀ w of each matrix, of those of equal shape that lie side by side in one call."""
    sums: list[Any] = [None] * len(matrices)
    for places in alike(matrices):
        for some, stack in adjoining([matrices[place] for place in places]):
            rows = namespace(stack).stack([weights[places[inner]] for inner in some])[:, None, :]
            for inner, total in zip(some, list((rows @ stack)[:, 0]), strict=True):
                sums[places[inner]] = total
    return [
        matrix_vector(matrix.T, one) if made is None else made
        for matrix, one, made in zip(matrices, weights, sums, strict=True)
    ]
