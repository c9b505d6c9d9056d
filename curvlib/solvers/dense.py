"""The explicit block: ground truth for everything else, and the cheapest exact method for small blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from curvlib.arrays import Array, Vector, add_diagonal, cholesky, cholesky_solve, namespace, record
from curvlib.factors import Factors
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping

__all__ = ["Covariance", "Dense", "DenseInverse", "flatten", "unflatten"]


@record
@dataclass(frozen=True, eq=False)
class Covariance:
    """Estimate: the block's curvature ``JᵀJ / normalizer`` itself, shape ``(parameters, parameters)``."""

    matrix: Array
    shapes: Mapping[str, tuple[int, ...]]


@record
@dataclass(frozen=True, eq=False)
class DenseInverse:
    """Inverse: the Cholesky factor of the damped curvature."""

    factor: Array
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dense(Solver):
    """Forms the block's curvature explicitly and factorises it: P × P for P parameters, so for small blocks.

    The equivalent in NumPy is ``numpy.linalg.solve(J.T @ J / n + damping * numpy.eye(P), gradient)``.
    """

    def update(self, estimate: Covariance | None, factors: Factors) -> Covariance:
        return Covariance(factors.covariance() / factors.normalizer, factors.shapes)

    def factorize(self, estimate: Covariance, damping: float) -> DenseInverse:
        return DenseInverse(cholesky(add_diagonal(estimate.matrix, check_damping(damping))), estimate.shapes)

    def solve(self, inverse: DenseInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.shapes)
        return unflatten(cholesky_solve(inverse.factor, flatten(vector, inverse.shapes)), inverse.shapes)


def flatten(vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> Array:
    """Block vector as one array, parameters in the order of `shapes`."""
    parts = [vector[name].reshape(-1) for name in shapes]
    return parts[0] if len(parts) == 1 else namespace(*parts).concat(parts)


def unflatten(flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Block vector from one array, the inverse of `flatten`."""
    result, start = {}, 0
    for name, shape in shapes.items():
        stop = start + prod(shape)
        result[name] = flat[start:stop].reshape(tuple(shape))
        start = stop
    return result
