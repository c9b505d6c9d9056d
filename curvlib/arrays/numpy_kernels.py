"""Kernels beyond the array-API standard for NumPy, from NumPy and SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import linalg, sparse

from curvlib.arrays.plain_kernels import (
    add_multiples,
    add_product,
    adjoining,
    aligned_product,
    matrix_vector,
    product,
    row_products,
    scaled_rows,
    side_by_side,
    small_factors,
    sum_of_squares,
)

__all__ = [
    "FAILURES",
    "add_diagonal",
    "add_multiples",
    "add_product",
    "address",
    "adjoining",
    "aligned_product",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "eigh",
    "hadamard_gram",
    "index_add",
    "matrix_vector",
    "positions",
    "product",
    "qr",
    "row_products",
    "scaled_rows",
    "self_product",
    "side_by_side",
    "small_factors",
    "sum_of_squares",
    "triangular_solve",
]

Array = Any

FAILURES = (np.linalg.LinAlgError,)
"""What a routine raises for a matrix that it cannot decompose."""


def add_diagonal(matrix: Array, value: Array | float, copy: bool) -> Array:
    """A + value · I."""
    return matrix + value * np.eye(matrix.shape[-1], dtype=matrix.dtype)


def cholesky(matrix: Array, wait: bool) -> tuple[Array, bool]:
    """Lower factor, and whether it is one."""
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return matrix, False
    # LAPACK lets NaN through without a word; one anywhere in a row reaches the diagonal below it.
    return factor, bool(np.isfinite(np.diagonal(factor, axis1=-2, axis2=-1)).all())


def cholesky_inverse(factor: Array) -> Array:
    """Inverse of L Lᵀ, exactly symmetric."""
    inverse = triangular_solve(factor, np.eye(factor.shape[-1], dtype=factor.dtype), False)
    return np.swapaxes(inverse, -1, -2) @ inverse


def cholesky_solve(factor: Array, rhs: Array) -> Array:
    """Solution of L Lᵀ x = rhs."""
    if factor.ndim == 2 and rhs.ndim == 2:
        return linalg.cho_solve((factor, True), rhs, check_finite=False)
    return triangular_solve(factor, triangular_solve(factor, rhs, False), True)


def triangular_solve(factor: Array, rhs: Array, transposed: bool) -> Array:
    """Solution of L x = rhs, or of Lᵀ x = rhs; SciPy's routine takes one matrix at a time."""
    batch = np.broadcast_shapes(factor.shape[:-2], rhs.shape[:-2])
    factor = np.broadcast_to(factor, (*batch, *factor.shape[-2:]))
    rhs = np.broadcast_to(rhs, (*batch, *rhs.shape[-2:]))
    result = np.empty(rhs.shape, dtype=np.result_type(factor, rhs))
    trans = "T" if transposed else "N"
    for place in np.ndindex(batch):
        result[place] = linalg.solve_triangular(factor[place], rhs[place], trans, lower=True, check_finite=False)
    return result


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors."""
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def qr(matrix: Array) -> tuple[Array, Array]:
    """Q with orthonormal columns and R, reduced."""
    Q, R = np.linalg.qr(matrix)
    return Q, R


def self_product(matrix: Array) -> Array:
    """A Aᵀ; NumPy gives a product with its own transpose to BLAS's syrk."""
    return matrix @ matrix.T


def hadamard_gram(first: Array, second: Array, ones: bool) -> Array:
    """(A Aᵀ) ∘ (B Bᵀ), or (A Aᵀ + 1) ∘ (B Bᵀ)."""
    return (self_product(first) + float(ones)) * self_product(second)


def stacked(matrices: Sequence[Array]) -> Array:
    """Matrices of one shape as one array, their columns in a row as LAPACK leaves those of factors."""
    return np.stack([matrix.swapaxes(-2, -1) for matrix in matrices]).swapaxes(-2, -1)


def address(array: Array) -> Any:
    """What two views of the same memory in the same layout have in common."""
    seen = array.__array_interface__
    return seen["data"][0], seen["shape"], seen["strides"], seen["typestr"]


def index_add(size: int, index: Array, values: Array) -> Array:
    """Eᵀ V for the one-hot rows E of the indices, a sparse product."""
    rows = np.arange(len(index) + 1)
    one_hot = sparse.csr_matrix((np.ones(len(index), dtype=values.dtype), index, rows), shape=(len(index), size))
    flat = values.reshape(len(index), int(np.prod(values.shape[1:])))
    return np.asarray(one_hot.T @ flat).reshape(size, *values.shape[1:])


def positions(counts: Array) -> Array:
    """Every position as often as its count says, in order."""
    return np.repeat(np.arange(len(counts)), counts)
