"""Exact inversion in sample space by the Woodbury identity, with factors and inverse reused between refreshes."""

from __future__ import annotations

from dataclasses import dataclass

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, record
from curvlib.factors import Factors
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping
from curvlib.solvers.dense import Covariance, Dense, DenseInverse

__all__ = ["Woodbury", "WoodburyEstimate", "WoodburyInverse"]


@record
@dataclass(frozen=True, eq=False)
class WoodburyEstimate:
    """Estimate: the rows themselves, and their kernel ``J Jᵀ / normalizer``, shape ``(rows, rows)``."""

    factors: Factors
    kernel: Array


@record
@dataclass(frozen=True, eq=False)
class WoodburyInverse:
    """Inverse: the rows, and the Cholesky factor of the damped kernel."""

    factors: Factors
    factor: Array
    damping: float


@dataclass(frozen=True)
class Woodbury(Solver):
    """Solves with the exact damped block through an n × n kernel, never forming it nor (where avoidable) J.

    A block with fewer parameters than rows is solved through its explicit covariance, which is smaller and as exact.

    Notes
    -----
    With F = JᵀJ / n and kernel K = J Jᵀ / n,

        (F + λI)⁻¹ g = (g − Jᵀ (K + λI)⁻¹ J g / n) / λ

    (TENGraD, arXiv 2106.03947, eq. of the Woodbury inverse). J may be older than g: rows and the factor of the kernel
    are reused until the next refresh. Where g is the mean of the same rows, g = Jᵀ1/n, the push-through identity
    gives ``Jᵀ (K + λI)⁻¹ 1 / n``, without the difference of two large terms.
    """

    def update(self, estimate: WoodburyEstimate | Covariance | None, factors: Factors) -> WoodburyEstimate | Covariance:
        if factors.size <= len(factors):
            return Dense().update(None, factors)
        kept = factors.compact()
        return WoodburyEstimate(kept, kept.gram() / factors.normalizer)

    def factorize(self, estimate: WoodburyEstimate | Covariance, damping: float) -> WoodburyInverse | DenseInverse:
        if isinstance(estimate, Covariance):
            return Dense().factorize(estimate, damping)
        damping = check_damping(damping)
        return WoodburyInverse(estimate.factors, cholesky(add_diagonal(estimate.kernel, damping)), damping)

    def solve(self, inverse: WoodburyInverse | DenseInverse, gradient: Gradient) -> dict[str, Array]:
        if isinstance(inverse, DenseInverse):
            return Dense().solve(inverse, gradient)
        rows = inverse.factors
        if gradient is rows:
            return rows.rmatvec(cholesky_solve(inverse.factor, rows.row_weights(1 / rows.normalizer)))
        vector = as_vector(gradient)
        check_block(vector, rows.shapes)
        weights = cholesky_solve(inverse.factor, rows.matvec(vector)) / rows.normalizer
        correction = rows.rmatvec(weights)
        return {name: (vector[name] - correction[name]) / inverse.damping for name in vector}
