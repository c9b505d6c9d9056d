"""Linear algebra beyond the array-API standard: what each library's kernels offer, with one meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from curvlib.arrays.checks import is_compiling, require, waiting
from curvlib.arrays.namespace import Array, device, kernels, namespace
from curvlib.errors import NotPositiveDefiniteError

__all__ = [
    "add_diagonal",
    "add_multiples",
    "add_product",
    "adjoining",
    "aligned_product",
    "alike",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "eigh",
    "hadamard_gram",
    "is_finite",
    "matrix_vector",
    "product",
    "qr",
    "require_finite",
    "row_products",
    "scaled_rows",
    "self_product",
    "side_by_side",
    "small_factors",
    "stacked",
    "sum_of_squares",
    "trace",
    "triangular_solve",
    "widen",
]

Result = TypeVar("Result")


def add_diagonal(matrix: Array, value: Array | float, copy: bool = True) -> Array:
    """Return `matrix` + `value` · identity.

    Parameters
    ----------
    matrix
        Square matrices, shape ``(..., n, n)``.
    value
        What is added to each diagonal entry; an array must broadcast against the matrices.
    copy
        Whether `matrix` must stay as it is.
    """
    return kernels(matrix).add_diagonal(matrix, value, copy)


def cholesky(matrix: Array) -> Array:
    """Lower Cholesky factor of symmetric positive definite matrices, shape ``(..., n, n)``.

    Raises
    ------
    NotPositiveDefiniteError
        If a matrix is not positive definite to working precision, or not finite. Inside `deferred` the error waits, and
        the factor may be nonsense.
    """
    factor, good = kernels(matrix).cholesky(matrix, waiting())
    if good is not True:
        require(good, partial(_not_positive_definite, tuple(matrix.shape), matrix.dtype))
    return factor


def small_factors(matrices: Sequence[Array], dampings: Sequence[float]) -> list[Array] | None:
    """Lower Cholesky factors of ``matrix + damping · identity`` for symmetric matrices of one shape, ``(n, n)``.

    None where the library has no better routine for so small ones, or where one of them fails: `cholesky` says why.
    """
    return kernels(matrices[0]).small_factors(matrices, dampings)  # type: ignore[no-any-return]  # found at run time


def _not_positive_definite(shape: tuple[int, ...], dtype: Any) -> str:
    return f"the damped curvature of shape {shape} and dtype {dtype} is not positive definite"


def cholesky_inverse(factor: Array) -> Array:
    """Inverse of L Lᵀ for lower factors L of shape ``(..., n, n)``; a product with it is faster than a solve."""
    return kernels(factor).cholesky_inverse(factor)


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
        return kernels(factor).cholesky_solve(factor, rhs[:, None])[:, 0]
    return kernels(factor).cholesky_solve(factor, rhs)


def triangular_solve(factor: Array, rhs: Array, transposed: bool = False) -> Array:
    """Solve ``L x = rhs``, or ``Lᵀ x = rhs``, for a lower triangular L.

    Parameters
    ----------
    factor
        Lower triangular, shape ``(..., n, n)``; what lies above the diagonal is not looked at.
    rhs
        Right-hand sides, shape ``(..., n, k)`` or ``(n,)``.
    transposed
        Whether Lᵀ takes the place of L.
    """
    if rhs.ndim == 1:
        return kernels(factor).triangular_solve(factor, rhs[:, None], transposed)[:, 0]
    return kernels(factor).triangular_solve(factor, rhs, transposed)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending and not below zero, and eigenvectors of symmetric positive semidefinite matrices.

    Raises
    ------
    NotPositiveDefiniteError
        If a matrix is not finite or the iteration does not converge, not even in float64.
    """
    xp = namespace(matrix)
    if is_compiling():
        return _eigenpairs_unread(matrix)
    # No routine bears what is not finite, so this cannot wait.
    if not is_finite(matrix):
        raise NotPositiveDefiniteError(f"{_no_basis(matrix)}: it is not finite")
    found = _eigenpairs(matrix)
    if found is None:
        # In single precision divide and conquer may fail on a factor of low rank, however harmless it is.
        wide = _eigenpairs(widen(matrix))
        if wide is None:
            raise NotPositiveDefiniteError(f"{_no_basis(matrix)}: it did not converge, not in float64 either")
        found = xp.astype(wide[0], matrix.dtype), xp.astype(wide[1], matrix.dtype)
    return _not_negative(found[0]), found[1]


def _not_negative(values: Array) -> Array:
    """Eigenvalues without what rounding makes of zeros, which damping should not have to make up for."""
    xp = namespace(values)
    return xp.where(values > 0, values, xp.zeros_like(values))


def _eigenpairs_unread(matrix: Array) -> tuple[Array, Array]:
    """`eigh` in a graph that a compiler makes, where no number can be looked at: NaN for a matrix not finite."""
    xp = namespace(matrix)
    finite = xp.all(xp.isfinite(matrix))
    values, vectors = kernels(matrix).eigh(xp.where(finite, matrix, xp.zeros_like(matrix)))
    return _not_negative(values), xp.where(finite, vectors, xp.full_like(vectors, xp.nan))


def _eigenpairs(matrix: Array) -> tuple[Array, Array] | None:
    """Eigenvalues and eigenvectors; None where the routine fails, which LAPACK may do without a word."""
    library = kernels(matrix)
    try:
        values, vectors = library.eigh(matrix)
    except library.FAILURES:
        return None
    return (values, vectors) if is_finite(vectors) else None


def _no_basis(matrix: Array) -> str:
    return f"no eigendecomposition of the curvature of shape {tuple(matrix.shape)} and dtype {matrix.dtype}"


def qr(matrix: Array) -> tuple[Array, Array]:
    """Reduced QR decomposition of matrices of shape ``(..., m, n)``: Q with orthonormal columns, R upper triangular."""
    return kernels(matrix).qr(matrix)  # type: ignore[no-any-return]  # the kernels are found at run time


def self_product(matrix: Array) -> Array:
    """A Aᵀ for A of shape ``(n, d)``, each pair of its rows multiplied once where the library can do that faster."""
    return kernels(matrix).self_product(matrix)


def hadamard_gram(first: Array, second: Array, ones: bool) -> Array:
    """(A Aᵀ) ∘ (B Bᵀ) for A and B with as many rows, a new array; with `ones` as if A had a column of ones besides."""
    return kernels(first).hadamard_gram(first, second, ones)


def add_multiples(arrays: Sequence[Array], others: Sequence[Array], multiple: float) -> list[Array]:
    """``array + multiple · other`` for each, in one pass and in the array's memory where its elements lie in a row.

    The same bits however the arguments are laid out.
    """
    if not arrays:
        return []
    return kernels(arrays[0]).add_multiples(arrays, others, multiple)  # type: ignore[no-any-return]  # found at run time


def scaled_rows(matrix: Array, weights: Array) -> Array:
    """Each row of a matrix of shape ``(n, d)`` times its weight, shape ``(n,)``."""
    return kernels(matrix).scaled_rows(matrix, weights)


def product(first: Array, second: Array) -> Array:
    """A B for matrices, shapes ``(…, m, k)`` and ``(…, k, n)``, shared out to cores better than `@` does small ones."""
    return kernels(first).product(first, second)


def aligned_product(first: Array, second: Array) -> Array:
    """`product`, whose result may lie with gaps between its rows: for what is multiplied again, and not kept."""
    return kernels(first).aligned_product(first, second)


def add_product(total: Array, first: Array, second: Array, decay: float) -> None:
    """``total ← decay · total + A B`` in place, in one pass; the total's elements lie in a row."""
    kernels(total).add_product(total, first, second, decay)


def matrix_vector(matrix: Array, vector: Array) -> Array:
    """A v for A of shape ``(n, d)``, on all cores where the matrix is so large that it comes from memory."""
    return kernels(matrix).matrix_vector(matrix, vector)


def stacked(matrices: Sequence[Array]) -> Array:
    """Matrices of one shape as one array, laid out as they are; not to be changed, for it may be where they lie."""
    return kernels(matrices[0]).stacked(matrices)


def alike(matrices: Sequence[Array]) -> list[list[int]]:
    """Places of the matrices of each shape, dtype and device."""
    places: dict[Any, list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault((matrix.shape, matrix.dtype, device(matrix)), []).append(place)
    return list(places.values())


def adjoining(matrices: Sequence[Array]) -> list[tuple[list[int], Array]]:
    """Stacks that several matrices of one shape are the parts of as they lie, where one call for a stack gains.

    Returns
    -------
    list
        Of each stack the places of its matrices, and itself, shape ``(matrices, n, d)``, not to be changed: of all
        matrices, one alone too, or of none.
    """
    return kernels(matrices[0]).adjoining(matrices)  # type: ignore[no-any-return]  # the kernels are found at run time


def side_by_side(
    function: Callable[..., Result],
    arguments: Sequence[tuple[Any, ...]],
    widths: Sequence[int],
    like: Array,
    effort: float = 1.0,
) -> list[Result]:
    """Decompose several matrices at once, where the library's routine keeps but one core busy.

    Parameters
    ----------
    function
        Decomposes one matrix, with `eigh`, `qr`, `cholesky` and the like. Calls may run in different threads.
    arguments
        Of each call.
    widths
        Of the matrix of each call, which its time grows with.
    like
        An array of the library and device at work.
    effort
        Time of a call against that of a Cholesky factorisation of the same width: about 3 for an inverse, 10 for QR, 50
        for eigenvectors. Little work is done one call after the other.

    Returns
    -------
    list
        What the calls returned, in order. The first error that one raised is raised.
    """
    results: list[Result] = kernels(like).side_by_side(function, arguments, widths, like, effort)
    return results


def trace(matrix: Array) -> Array:
    """Sum of the diagonals of square matrices, shape ``(...)``."""
    return namespace(matrix).linalg.trace(matrix)


def is_finite(array: Array) -> bool:
    """Whether no element is infinite or NaN. Waits for the device that holds the array."""
    xp = namespace(array)
    return bool(xp.all(xp.isfinite(array)))


def require_finite(what: str, array: Array) -> None:
    """Refuse an array with an element that is infinite or NaN; inside `deferred` the refusal waits.

    Raises
    ------
    NotPositiveDefiniteError
        Saying that `what` is not finite, of which shape and dtype.
    """
    xp = namespace(array)
    require(xp.all(xp.isfinite(array)), partial(_not_finite, what, tuple(array.shape), array.dtype))


def _not_finite(what: str, shape: tuple[int, ...], dtype: Any) -> str:
    return f"the {what} of shape {shape} and dtype {dtype} are not finite"


def widen(array: Array) -> Array:
    """Return `array` in float64."""
    xp = namespace(array)
    return xp.astype(array, xp.float64)


def row_products(first: Array, second: Array) -> Array:
    """Σ over the last axis of A ∘ B, two arrays of one shape; A may be overwritten."""
    return kernels(first).row_products(first, second)


def sum_of_squares(array: Array) -> Array:
    """Σ over the first axis of x²; the array may be overwritten."""
    return kernels(array).sum_of_squares(array)
