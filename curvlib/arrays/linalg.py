"""Linear algebra beyond the array-API standard, one implementation per library."""

from __future__ import annotations

from typing import Any

import array_api_compat

from curvlib.arrays.namespace import Array, namespace
from curvlib.errors import NotPositiveDefiniteError

_MIRROR_FROM = 512
"""Rows from which three products of half the size are faster than one of the whole."""

__all__ = ["add_diagonal", "cholesky", "cholesky_solve", "eigh", "is_finite", "self_product", "trace", "widen"]


def add_diagonal(matrix: Array, value: Array | float) -> Array:
    """Return `matrix` + `value` · identity, a new array.

    Parameters
    ----------
    matrix
        Square matrices, shape ``(..., n, n)``.
    value
        What is added to each diagonal entry; an array must broadcast against the matrices.
    """
    xp = namespace(matrix)
    device = array_api_compat.device(matrix)
    return matrix + value * xp.eye(matrix.shape[-1], dtype=matrix.dtype, device=device)


def cholesky(matrix: Array) -> Array:
    """Lower Cholesky factor of symmetric positive definite matrices, shape ``(..., n, n)``.

    Raises
    ------
    NotPositiveDefiniteError
        If a matrix is not positive definite to working precision, or not finite.
    """
    if array_api_compat.is_torch_array(matrix):
        factor, info = namespace(matrix).linalg.cholesky_ex(matrix)
        failed = bool((info != 0).any())
    else:
        library = namespace(matrix)
        try:
            factor, failed = library.linalg.cholesky(matrix), False
        except library.linalg.LinAlgError:
            factor, failed = matrix, True
    # LAPACK lets NaN through without a word. One anywhere in a row reaches the diagonal below it.
    if failed or not is_finite(namespace(factor).linalg.diagonal(factor)):
        raise NotPositiveDefiniteError(
            f"the damped curvature of shape {tuple(matrix.shape)} and dtype {matrix.dtype} is not positive definite"
        )
    return factor


def cholesky_solve(factor: Array, rhs: Array) -> Array:
    """Solve ``L Lᵀ x = rhs`` for the lower factor L.

    Parameters
    ----------
    factor
        Lower triangular, shape ``(..., n, n)``.
    rhs
        Right-hand sides, shape ``(..., n, k)`` or ``(n,)``.
    """
    if rhs.ndim == 1:
        return cholesky_solve(factor, rhs[:, None])[:, 0]
    library: Any = namespace(factor)
    if array_api_compat.is_torch_array(factor):
        return library.cholesky_solve(rhs, factor)
    # NumPy and CuPy have no triangular solve of their own in the array-API part.
    transposed = library.matrix_transpose(factor)
    return library.linalg.solve(transposed, library.linalg.solve(factor, rhs))


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending and not below zero, and eigenvectors of symmetric positive semidefinite matrices.

    Raises
    ------
    NotPositiveDefiniteError
        If a matrix is not finite or the iteration does not converge.
    """
    xp = namespace(matrix)
    message = f"no eigendecomposition of the curvature of shape {tuple(matrix.shape)} and dtype {matrix.dtype}"
    if not is_finite(matrix):
        raise NotPositiveDefiniteError(f"{message}: it is not finite")
    try:
        values, vectors = xp.linalg.eigh(matrix)
    except Exception as error:  # each library has its own type for an iteration that does not converge
        raise NotPositiveDefiniteError(f"{message}: {error}") from error
    # Rounding makes zero eigenvalues slightly negative, which damping should not have to make up for.
    return xp.where(values > 0, values, xp.zeros_like(values)), vectors


def self_product(matrix: Array) -> Array:
    """A Aᵀ for A of shape ``(n, d)``, the blocks above the diagonal mirrored instead of computed where that pays."""
    n = matrix.shape[0]
    if n < _MIRROR_FROM:
        return matrix @ matrix.T
    half, xp = n // 2, namespace(matrix)
    top, bottom = matrix[:half], matrix[half:]
    corner = bottom @ top.T
    upper = xp.concat([self_product(top), corner.T], axis=1)
    return xp.concat([upper, xp.concat([corner, self_product(bottom)], axis=1)], axis=0)


def trace(matrix: Array) -> Array:
    """Sum of the diagonals of square matrices, shape ``(...)``."""
    return namespace(matrix).linalg.trace(matrix)


def is_finite(array: Array) -> bool:
    """Whether no element is infinite or NaN. Waits for the device that holds the array."""
    xp = namespace(array)
    return bool(xp.all(xp.isfinite(array)))


def widen(array: Array) -> Array:
    """Return `array` in float64."""
    xp = namespace(array)
    return xp.astype(array, xp.float64)
