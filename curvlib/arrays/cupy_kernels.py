"""Kernels beyond the array-API standard, from CuPy's own routines (CuPy ≥ 14). Not yet run on a GPU.

CuPy's routines for stacks of matrices are for many small ones: the Cholesky solve of a stack takes one right-hand side
at a time, its eigendecomposition is Jacobi's. A stack of one, which is what a layer without groups has, therefore goes
to the routine for one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy import cublas
from cupyx import errstate, scatter_add
from cupyx.scipy.linalg import solve_triangular

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
    return matrix + value * cupy.eye(matrix.shape[-1], dtype=matrix.dtype)


def cholesky(matrix: Array, wait: bool) -> tuple[Array, bool]:
    """Lower factor, and whether it is one. CuPy keeps cuSOLVER's verdict to itself, so this always waits for it."""
    one = _alone(matrix)
    try:
        # Without this CuPy does not look at the verdict at all.
        with errstate(linalg="raise"):
            factor = cupy.linalg.cholesky(one)
    except np.linalg.LinAlgError:
        return matrix, False
    diagonal = cupy.diagonal(factor, axis1=-2, axis2=-1)
    return factor.reshape(matrix.shape), bool(cupy.isfinite(diagonal).all())


def cholesky_inverse(factor: Array) -> Array:
    """Inverse of L Lᵀ, exactly symmetric."""
    inverse = triangular_solve(factor, cupy.eye(factor.shape[-1], dtype=factor.dtype), False)
    return cupy.swapaxes(inverse, -1, -2) @ inverse


def cholesky_solve(factor: Array, rhs: Array) -> Array:
    """Solution of L Lᵀ x = rhs, by two triangular solves, which take stacks and many right-hand sides at once."""
    return triangular_solve(factor, triangular_solve(factor, rhs, False), True)


def triangular_solve(factor: Array, rhs: Array, transposed: bool) -> Array:
    """Solution of L x = rhs, or of Lᵀ x = rhs."""
    batch = np.broadcast_shapes(factor.shape[:-2], rhs.shape[:-2])
    shape = (*batch, *rhs.shape[-2:])
    if int(np.prod(batch)) == 1:
        # cuBLAS reads columns first: as an upper triangle, Lᵀ, a factor that lies row by row is not copied.
        upper, only = factor.reshape(factor.shape[-2:]).T, rhs.reshape(rhs.shape[-2:])
        return solve_triangular(upper, only, trans="N" if transposed else "T", lower=False).reshape(shape)
    factor = cupy.broadcast_to(factor, (*batch, *factor.shape[-2:]))
    return solve_triangular(factor, cupy.broadcast_to(rhs, shape), trans="T" if transposed else "N", lower=True)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors, one matrix after the other."""
    n = matrix.shape[-1]
    with errstate(linalg="raise"):
        pairs = [cupy.linalg.eigh(one) for one in matrix.reshape(-1, n, n)]
    values, vectors = (cupy.stack(part) for part in zip(*pairs, strict=True))
    return values.reshape(matrix.shape[:-1]), vectors.reshape(matrix.shape)


def qr(matrix: Array) -> tuple[Array, Array]:
    """Q with orthonormal columns and R, reduced."""
    Q, R = cupy.linalg.qr(matrix)
    return Q, R


def self_product(matrix: Array) -> Array:
    """A Aᵀ by cuBLAS's syrk, which makes one triangle; the other is mirrored."""
    n = matrix.shape[0]
    matrix = cupy.ascontiguousarray(matrix)
    lower = cublas.syrk("N", matrix, out=cupy.zeros((n, n), dtype=matrix.dtype), lower=True)
    return cupy.tril(lower) + cupy.tril(lower, -1).T


def hadamard_gram(first: Array, second: Array, ones: bool) -> Array:
    """(A Aᵀ) ∘ (B Bᵀ), or (A Aᵀ + 1) ∘ (B Bᵀ)."""
    return (self_product(first) + float(ones)) * self_product(second)


def stacked(matrices: Sequence[Array]) -> Array:
    """Matrices of one shape as one array, their columns in a row as LAPACK leaves those of factors."""
    return cupy.stack([matrix.swapaxes(-2, -1) for matrix in matrices]).swapaxes(-2, -1)


def address(array: Array) -> Any:
    """What two views of the same memory in the same layout have in common."""
    seen = array.__cuda_array_interface__
    return seen["data"][0], seen["shape"], seen["strides"], seen["typestr"]


def index_add(size: int, index: Array, values: Array) -> Array:
    """Eᵀ V for the one-hot rows E of the indices, by atomic additions."""
    total = cupy.zeros((size, *values.shape[1:]), dtype=values.dtype)
    if values.dtype == cupy.int64:
        # CUDA adds 64-bit integers atomically without a sign only, which is the same addition.
        scatter_add(total.view(cupy.uint64), index, values.view(cupy.uint64))
    else:
        scatter_add(total, index, values)
    return total


def positions(counts: Array) -> Array:
    """Every position as often as its count says, in order."""
    ends = cupy.cumsum(counts)
    total = int(ends[-1]) if len(counts) else 0
    return cupy.searchsorted(ends, cupy.arange(total), side="right")


def _alone(matrix: Array) -> Array:
    """A stack of one matrix as that matrix."""
    return matrix.reshape(matrix.shape[-2:]) if matrix.ndim > 2 and int(np.prod(matrix.shape[:-2])) == 1 else matrix
