"""Kernels that need no more than the operators of arrays: NumPy's and CuPy's, whose libraries share work out well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "add_multiples",
    "add_product",
    "adjoining",
    "aligned_product",
    "matrix_vector",
    "product",
    "row_products",
    "scaled_rows",
    "side_by_side",
    "small_factors",
    "sum_of_squares",
]

Array = Any


def add_multiples(arrays: Sequence[Array], others: Sequence[Array], multiple: float) -> list[Array]:
    """A + multiple · B for each, in the memory of A."""
    for array, other in zip(arrays, others, strict=True):
        array += multiple * other
    return list(arrays)


def add_product(total: Array, first: Array, second: Array, decay: float) -> None:
    """``total ← decay · total + A B``."""
    total *= decay
    total += first @ second


def adjoining(matrices: Sequence[Array]) -> list[tuple[list[int], Array]]:
    """None: nothing puts arrays of this library side by side."""
    return []


def aligned_product(first: Array, second: Array) -> Array:
    """A B, wherever it lies."""
    return first @ second


def matrix_vector(matrix: Array, vector: Array) -> Array:
    """A v; BLAS's gemv shares it out itself."""
    return matrix @ vector


def product(first: Array, second: Array) -> Array:
    """A B of matrices, or of stacks of them."""
    return first @ second


def scaled_rows(matrix: Array, weights: Array) -> Array:
    """Each row of A times its weight."""
    return matrix * weights[:, None]


def side_by_side(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    widths: Sequence[int],
    like: Array,
    effort: float,
) -> list[Any]:
    """``function(*one)`` for each of the arguments, one after the other."""
    return [function(*one) for one in arguments]


def small_factors(matrices: Sequence[Array], dampings: Sequence[float]) -> list[Array] | None:
    """None: there is no better routine for small matrices."""
    return None


def row_products(first: Array, second: Array) -> Array:
    """Σ over the last axis of A ∘ B, in the memory of A."""
    first *= second
    return first.sum(axis=-1)


def sum_of_squares(array: Array) -> Array:
    """Σ over the first axis of x², in the memory of the array."""
    array *= array
    return array.sum(axis=0)
