"""Cholesky factorisations and solves of several blocks, in one call for matrices of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curvlib.arrays import (
    Array,
    add_diagonal,
    alike,
    cholesky,
    cholesky_solve,
    device,
    namespace,
    side_by_side,
    small_factors,
    stacked,
)
from curvlib.solvers.base import check_damping

__all__ = ["cholesky_factors", "kernel_solutions"]

_FACTORIZED_TOGETHER_UP_TO = 1 << 20
"""Elements of a stack up to which one factorisation of it beats one a matrix, each in a thread of its own."""

_SOLVED_TOGETHER_UP_TO = 128
"""Rows up to which one solve of a stack beats one a matrix, which keeps a single thread busy and copies nothing."""


def cholesky_factors(matrices: Sequence[Array], dampings: Sequence[float]) -> list[Array]:
    """Lower Cholesky factors of ``matrix + damping · identity``.

    Parameters
    ----------
    matrices
        Symmetric, of any sizes; they stay as they are.
    dampings
        λ > 0 of each.

    Raises
    ------
    ConfigurationError
        If a damping is not a positive number.
    NotPositiveDefiniteError
        If a damped matrix is not positive definite in its precision.
    """
    factors: list[Any] = [None] * len(matrices)
    checked = {damping: check_damping(damping) for damping in set(dampings)}
    for places in alike(matrices):
        own, values = [matrices[place] for place in places], [checked[dampings[place]] for place in places]
        for place, factor in zip(places, small_factors(own, values) or _factors(own, values), strict=True):
            factors[place] = factor
    return factors


def _factors(matrices: Sequence[Array], dampings: Sequence[float]) -> list[Array]:
    """Factors of matrices of one shape."""
    n, count = int(matrices[0].shape[0]), len(matrices)
    if count > 1 and _stacking_pays(count * n * n, _FACTORIZED_TOGETHER_UP_TO, device(matrices[0])):
        return list(cholesky(_damped_stack(matrices, dampings)))  # apart in one call, not one by one
    return side_by_side(_damped_factor, list(zip(matrices, dampings, strict=True)), [n] * count, matrices[0])


def _damped_factor(matrix: Array, damping: float) -> Array:
    return cholesky(add_diagonal(matrix, damping))


def _damped_stack(matrices: Sequence[Array], dampings: Sequence[float]) -> Array:
    xp = namespace(matrices[0])
    if len(set(dampings)) == 1:
        return add_diagonal(xp.stack(list(matrices)), dampings[0], copy=False)
    # Each by itself: a list of dampings would have to be copied to the device, which waits.
    return xp.stack([add_diagonal(matrix, damping) for matrix, damping in zip(matrices, dampings, strict=True)])


def kernel_solutions(factors: Sequence[Array], rhs: Sequence[Array]) -> list[Array]:
    """Solutions of the kernels' systems of several blocks, in one call for small ones of one size.

    Parameters
    ----------
    factors
        Lower Cholesky factors, each of shape ``(rows, rows)``.
    rhs
        Right-hand sides, each of shape ``(rows,)``.
    """
    solutions: list[Any] = [None] * len(factors)
    for places in alike(factors):
        n, where = int(factors[places[0]].shape[0]), device(factors[places[0]])
        own, sides = [factors[place] for place in places], [rhs[place] for place in places]
        if len(places) == 1 or not _stacking_pays(n, _SOLVED_TOGETHER_UP_TO, where):
            made = [cholesky_solve(factor, one) for factor, one in zip(own, sides, strict=True)]
        else:
            made = list(cholesky_solve(stacked(own), namespace(sides[0]).stack(sides)[:, :, None])[:, :, 0])
        for place, solution in zip(places, made, strict=True):
            solutions[place] = solution
    return solutions


def _stacking_pays(size: int, most: int, where: Any) -> bool:
    """Whether one call for all blocks is worth copying their matrices together: LAPACK takes one after the other."""
    return size <= most or str(where) != "cpu"
