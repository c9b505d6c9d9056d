"""Exact inversion in sample space by the Woodbury identity, with factors and inverse reused between refreshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from curvlib.arrays import Array, Product, add_diagonal, cholesky, evaluated, record
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import Factors, Scaled
from curvlib.factors.lowrank import truncated
from curvlib.factors.together import grams
from curvlib.solvers.base import (
    Gradient,
    Solver,
    check_damping,
    rows_of_one_pass_pay,
    sample_space_pays,
)
from curvlib.solvers.batched import cholesky_factors, kernel_solutions
from curvlib.solvers.dense import Covariance, Dense, DenseInverse
from curvlib.solvers.sample_space import naturals, right_hand_side, system

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

    @property
    def keeps_rows(self) -> bool:
        return True

    def update(self, estimate: WoodburyEstimate | Covariance | None, factors: Factors) -> WoodburyEstimate | Covariance:
        if factors.size <= len(factors):
            return Dense().update(None, factors)
        return self._estimates([factors])[0]

    def update_all(self, estimates: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        if type(self).update is not Woodbury.update:
            return super().update_all(estimates, factors)
        return _apart(
            [rows.size <= len(rows) for rows in factors],
            lambda some: Dense().update_all([None] * len(some), [factors[place] for place in some]),
            lambda some: self._estimates([factors[place] for place in some]),
        )

    def _estimates(self, several: Sequence[Factors]) -> list[WoodburyEstimate]:
        """Estimates of blocks with more parameters than rows."""
        kept, shares = [factors.compact() for factors in several], [1 / factors.normalizer for factors in several]
        if self.low_rank is None:
            return [WoodburyEstimate(rows, kernel) for rows, kernel in zip(kept, grams(kept, shares), strict=True)]
        made = []
        for rows, gram, share in zip(kept, grams(kept), shares, strict=True):
            whole = rows.applied() if isinstance(rows, Scaled) else rows
            short = truncated(whole, self.low_rank, gram) if isinstance(whole, DenseRows) else whole
            made.append(WoodburyEstimate(short, gram * share))
        return made

    def factorize(self, estimate: WoodburyEstimate | Covariance, damping: float) -> WoodburyInverse | DenseInverse:
        if isinstance(estimate, Covariance):
            return Dense().factorize(estimate, damping)
        damping = check_damping(damping)
        return WoodburyInverse(estimate.factors, cholesky(add_diagonal(estimate.kernel, damping)), damping)

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        if type(self).factorize is not Woodbury.factorize:
            return super().factorize_all(estimates, dampings)

        def inverted(some: list[int]) -> list[Any]:
            # Kernels of all blocks have the size of the batch, so that most are of one size.
            factors = cholesky_factors([estimates[p].kernel for p in some], [dampings[p] for p in some])
            pairs = zip(some, factors, strict=True)
            return [WoodburyInverse(estimates[p].factors, factor, float(dampings[p])) for p, factor in pairs]

        return _apart(
            [isinstance(estimate, Covariance) for estimate in estimates],
            lambda some: Dense().factorize_all([estimates[p] for p in some], [dampings[p] for p in some]),
            inverted,
        )

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        if not self.exact or factors.size <= len(factors):
            return False
        return same or sample_space_pays(factors) or (together and rows_of_one_pass_pay(factors))

    def solve(self, inverse: WoodburyInverse | DenseInverse, gradient: Gradient) -> dict[str, Array]:
        if isinstance(inverse, DenseInverse):
            return Dense().solve(inverse, gradient)
        return evaluated(self._solved([inverse], [gradient])[0])

    def solve_all(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        if type(self).solve is not Woodbury.solve:
            return super().solve_all(inverses, gradients)
        return [evaluated(natural) for natural in self._solved_apart(inverses, gradients)]

    def solve_lazily(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array | Product]]:
        if not self._inherits(Woodbury, "solve", "solve_all", "remember"):
            return super().solve_lazily(inverses, gradients)
        return self._solved_apart(inverses, gradients)

    def _solved_apart(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[Any]:
        return _apart(
            [isinstance(inverse, DenseInverse) for inverse in inverses],
            lambda some: Dense().solve_all([inverses[p] for p in some], [gradients[p] for p in some]),
            lambda some: self._solved([inverses[p] for p in some], [gradients[p] for p in some]),
        )

    def _solved(
        self, inverses: Sequence[WoodburyInverse], gradients: Sequence[Gradient]
    ) -> list[dict[str, Array | Product]]:
        systems = [
            system(inverse.factors, inverse.damping, gradient, own=self.exact)
            for inverse, gradient in zip(inverses, gradients, strict=True)
        ]
        factors = [inverse.factor for inverse in inverses]
        return naturals(systems, kernel_solutions(factors, [right_hand_side(one) for one in systems]))


def _apart(
    small: Sequence[bool], explicit: Callable[[list[int]], list[Any]], kernels: Callable[[list[int]], list[Any]]
) -> list[Any]:
    """Results of all blocks, those of small ones through their covariances, from the places of either kind."""
    results: list[Any] = [None] * len(small)
    for made, kind in ((explicit, True), (kernels, False)):
        places = [place for place, one in enumerate(small) if one is kind]
        for place, result in zip(places, made(places) if places else [], strict=True):
            results[place] = result
    return results
