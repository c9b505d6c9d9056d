"""The explicit block: ground truth for everything else, and the cheapest exact method for small blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from curvlib.arrays import Array, Vector, add_diagonal, cholesky, namespace, record
from curvlib.factors import Factors
from curvlib.factors.together import covariances
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping
from curvlib.solvers.batched import cholesky_factors, kernel_solutions

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

    holds_rows: ClassVar[bool] = False

    def update(self, estimate: Covariance | None, factors: Factors) -> Covariance:
        return Covariance(factors.covariance() / factors.normalizer, factors.shapes)

    def update_all(self, estimates: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        if type(self).update is not Dense.update:
            return super().update_all(estimates, factors)
        made = zip(covariances(factors), factors, strict=True)
        return [Covariance(matrix / rows.normalizer, rows.shapes) for matrix, rows in made]

    def factorize(self, estimate: Covariance, damping: float) -> DenseInverse:
        return DenseInverse(cholesky(add_diagonal(estimate.matrix, check_damping(damping))), estimate.shapes)

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        if type(self).factorize is not Dense.factorize:
            return super().factorize_all(estimates, dampings)
        factors = cholesky_factors([estimate.matrix for estimate in estimates], dampings)
        made = zip(factors, estimates, strict=True)
        return [DenseInverse(factor, estimate.shapes) for factor, estimate in made]

    def solve(self, inverse: DenseInverse, gradient: Gradient) -> dict[str, Array]:
        return self._solved([inverse], [gradient])[0]

    def solve_all(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        if type(self).solve is not Dense.solve:
            return super().solve_all(inverses, gradients)
        return self._solved(inverses, gradients)

    def _solved(self, inverses: Sequence[DenseInverse], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        sides = []
        for inverse, gradient in zip(inverses, gradients, strict=True):
            vector = as_vector(gradient)
            check_block(vector, inverse.shapes)
            sides.append(flatten(vector, inverse.shapes))
        solutions = kernel_solutions([inverse.factor for inverse in inverses], sides)
        return [unflatten(flat, inverse.shapes) for flat, inverse in zip(solutions, inverses, strict=True)]


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
