"""Exact inversion in sample space by the Woodbury identity, with factors and inverse reused between refreshes."""

from __future__ import annotations

from dataclasses import dataclass

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, namespace, record
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import Factors, Scaled, cat
from curvlib.factors.lowrank import truncated
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping
from curvlib.solvers.dense import Covariance, Dense, DenseInverse

__all__ = ["Woodbury", "WoodburyEstimate", "WoodburyInverse"]


@record
@dataclass(frozen=True, eq=False)
class WoodburyEstimate:
    """Estimate: the rows to multiply with, and the full kernel ``J Jᵀ / normalizer``, shape ``(rows, rows)``."""

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

    Parameters
    ----------
    low_rank
        γ in (0, 1): rows that would be kept explicitly between refreshes are replaced by their leading singular
        directions, those whose singular values add up to at most γ of the sum, so that every step between refreshes
        costs less memory and time. The kernel stays that of all of J. None keeps J whole: exact.

    Notes
    -----
    With F = JᵀJ / n and kernel K = J Jᵀ / n,

        (F + λI)⁻¹ g = (g − Jᵀ (K + λI)⁻¹ J g / n) / λ

    (TENGraD, arXiv 2106.03947, eq. of the Woodbury inverse). J may be older than g: rows and the factor of the kernel
    are reused until the next refresh. Where g is the mean of the same rows, g = Jᵀ1/n, the push-through identity
    gives ``Jᵀ (K + λI)⁻¹ 1 / n``, without the difference of two large terms.

    With `low_rank` the products J g and Jᵀ w alone are those of the truncated rows (the authors' option for
    convolutions whose rows are explicit; γ = 0.9 for VGG16). Blocks kept in factored form or through their covariance
    have nothing to gain from it and stay exact.
    """

    low_rank: float | None = None

    def __post_init__(self) -> None:
        if self.low_rank is not None and not 0 < self.low_rank < 1:
            raise ConfigurationError(
                f"low_rank is a share of the singular values strictly in (0, 1), or None for all; got {self.low_rank!r}"
            )

    @property
    def exact(self) -> bool:
        return self.low_rank is None

    def update(self, estimate: WoodburyEstimate | Covariance | None, factors: Factors) -> WoodburyEstimate | Covariance:
        if factors.size <= len(factors):
            return Dense().update(None, factors)
        kept = factors.compact()
        gram = kept.gram()
        if isinstance(kept, Scaled) and self.low_rank is not None:
            kept = kept.applied()
        if self.low_rank is not None and isinstance(kept, DenseRows):
            kept = truncated(kept, self.low_rank, gram)
        return WoodburyEstimate(kept, gram / factors.normalizer)

    def factorize(self, estimate: WoodburyEstimate | Covariance, damping: float) -> WoodburyInverse | DenseInverse:
        if isinstance(estimate, Covariance):
            return Dense().factorize(estimate, damping)
        damping = check_damping(damping)
        return WoodburyInverse(estimate.factors, cholesky(add_diagonal(estimate.kernel, damping)), damping)

    def gains_from_rows(self, factors: Factors, same: bool) -> bool:
        if not self.exact or factors.size <= len(factors):
            return False
        return same or _cross_pays(factors)

    def solve(self, inverse: WoodburyInverse | DenseInverse, gradient: Gradient) -> dict[str, Array]:
        if isinstance(inverse, DenseInverse):
            return Dense().solve(inverse, gradient)
        rows = inverse.factors
        if gradient is rows and self.exact:
            return rows.rmatvec(cholesky_solve(inverse.factor, rows.row_weights(1 / rows.normalizer)))
        if isinstance(gradient, Factors) and _cross_pays(gradient):
            return _combined(inverse, gradient)
        vector = as_vector(gradient)
        check_block(vector, rows.shapes)
        weights = cholesky_solve(inverse.factor, rows.matvec(vector)) / rows.normalizer
        correction = rows.rmatvec(weights)
        return {name: (vector[name] - correction[name]) / inverse.damping for name in vector}


def _combined(inverse: WoodburyInverse, gradient: Factors) -> dict[str, Array]:
    """Natural gradient as one combination of the gradient's rows and the inverse's."""
    rows, ones = inverse.factors, gradient.row_weights(1 / gradient.normalizer)
    weights = cholesky_solve(inverse.factor, rows.cross_gram(gradient) @ ones) / rows.normalizer
    both = namespace(ones).concat([ones, -weights]) / inverse.damping
    return cat((gradient, rows)).rmatvec(both)


def _cross_pays(factors: Factors) -> bool:
    """Whether J g for a gradient of such rows is cheaper as a cross-Gram than from the explicit gradient."""
    sizes = factors.outer_sizes
    if sizes is None:
        return False
    rows, d_in, d_out = sizes
    return rows * (d_in + d_out) < d_in * d_out
