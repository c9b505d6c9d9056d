"""Exact inversion in sample space by the Woodbury identity, with factors and inverse reused between refreshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, device, namespace, record, side_by_side
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense as DenseRows
from curvlib.factors import Factors, Scaled
from curvlib.factors.lowrank import truncated
from curvlib.solvers.base import (
    Gradient,
    Solver,
    as_vector,
    check_block,
    check_damping,
    rows_of_one_pass_pay,
    sample_space_pays,
    together_pays,
)
from curvlib.solvers.dense import Covariance, Dense, DenseInverse

__all__ = ["Woodbury", "WoodburyEstimate", "WoodburyInverse", "kernel_solutions"]


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
        kept = factors.compact()
        gram = kept.gram()
        if isinstance(kept, Scaled) and self.low_rank is not None:
            kept = kept.applied()
        if self.low_rank is not None and isinstance(kept, DenseRows):
            kept = truncated(kept, self.low_rank, gram)
        gram /= factors.normalizer
        return WoodburyEstimate(kept, gram)

    def factorize(self, estimate: WoodburyEstimate | Covariance, damping: float) -> WoodburyInverse | DenseInverse:
        if isinstance(estimate, Covariance):
            return Dense().factorize(estimate, damping)
        damping = check_damping(damping)
        return WoodburyInverse(estimate.factors, cholesky(add_diagonal(estimate.kernel, damping)), damping)

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        if type(self).factorize is not Woodbury.factorize:
            return super().factorize_all(estimates, dampings)
        # Kernels of all blocks have the size of the batch: one batched factorisation does for all that are of one kind.
        inverses: list[Any] = [None] * len(estimates)
        alike: dict[Any, list[int]] = {}
        for place, estimate in enumerate(estimates):
            if isinstance(estimate, WoodburyEstimate):
                kind = (estimate.kernel.shape[0], estimate.kernel.dtype, device(estimate.kernel))
                alike.setdefault(kind, []).append(place)
            else:
                inverses[place] = self.factorize(estimate, dampings[place])
        for (n, _, where), places in alike.items():
            if not _stacking_pays(n, where) or len(places) == 1:
                given = [(estimates[place], dampings[place]) for place in places]
                made = side_by_side(self.factorize, given, [n] * len(places), estimates[places[0]].kernel)
                for place, inverse in zip(places, made, strict=True):
                    inverses[place] = inverse
                continue
            kernels, values = [estimates[place].kernel for place in places], {dampings[place] for place in places}
            if len(values) == 1:
                stack = add_diagonal(namespace(*kernels).stack(kernels), check_damping(values.pop()), copy=False)
            else:  # each by itself: a list of dampings would have to be copied to the device, which waits
                damped = [
                    add_diagonal(kernels[number], check_damping(dampings[place])) for number, place in enumerate(places)
                ]
                stack = namespace(*damped).stack(damped)
            for place, factor in zip(places, list(cholesky(stack)), strict=True):  # apart in one call, not one by one
                inverses[place] = WoodburyInverse(estimates[place].factors, factor, float(dampings[place]))
        return inverses

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        if not self.exact or factors.size <= len(factors):
            return False
        return same or sample_space_pays(factors) or (together and rows_of_one_pass_pay(factors))

    def solve(self, inverse: WoodburyInverse | DenseInverse, gradient: Gradient) -> dict[str, Array]:
        if isinstance(inverse, DenseInverse):
            return Dense().solve(inverse, gradient)
        rhs, finish = self._posed(inverse, gradient)
        return finish(cholesky_solve(inverse.factor, rhs))

    def solve_all(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        if type(self).solve is not Woodbury.solve:
            return super().solve_all(inverses, gradients)
        results: list[Any] = [None] * len(inverses)
        alike: dict[Any, list[tuple[int, Array, _Finish]]] = {}
        for place, (inverse, gradient) in enumerate(zip(inverses, gradients, strict=True)):
            if isinstance(inverse, WoodburyInverse):
                kind = (inverse.factor.shape[0], inverse.factor.dtype, device(inverse.factor))
                alike.setdefault(kind, []).append((place, *self._posed(inverse, gradient)))
            else:
                results[place] = self.solve(inverse, gradient)
        for posed in alike.values():
            weights = kernel_solutions([inverses[place].factor for place, _, _ in posed], [rhs for _, rhs, _ in posed])
            for (place, _, finish), solution in zip(posed, weights, strict=True):
                results[place] = finish(solution)
        return results

    def _posed(self, inverse: WoodburyInverse, gradient: Gradient) -> tuple[Array, _Finish]:
        """Right-hand side of the kernel's system, and what makes the natural gradient of its solution."""
        rows, damping = inverse.factors, inverse.damping
        if gradient is rows and self.exact:
            return rows.row_weights(1 / rows.normalizer), rows.rmatvec
        if isinstance(gradient, Factors) and (sample_space_pays(gradient) or together_pays(gradient, rows)):
            # One combination of the gradient's rows and the inverse's.
            ones = gradient.row_weights(1 / gradient.normalizer)

            def combine(weights: Array) -> dict[str, Array]:
                return gradient.combined(ones / damping, rows, weights / (-rows.normalizer * damping))

            return rows.cross_gram(gradient) @ ones, combine
        vector = as_vector(gradient)
        check_block(vector, rows.shapes)

        def correct(weights: Array) -> dict[str, Array]:
            correction = rows.rmatvec(weights / rows.normalizer)
            return {name: (vector[name] - correction[name]) / damping for name in vector}

        return rows.matvec(vector), correct


_Finish = Callable[[Array], dict[str, Array]]

_STACKED_UP_TO = 64


def _stacking_pays(n: int, where: Any) -> bool:
    """Whether one call for all blocks is worth copying their matrices together: LAPACK takes one after the other."""
    return n <= _STACKED_UP_TO or str(where) != "cpu"


def kernel_solutions(factors: Sequence[Array], rhs: Sequence[Array]) -> list[Array]:
    """Solutions of the systems of blocks whose kernels are of one size and kind.

    Parameters
    ----------
    factors
        Lower Cholesky factors, each of shape ``(rows, rows)``.
    rhs
        Right-hand sides, each of shape ``(rows,)``.
    """
    if len(factors) == 1 or not _stacking_pays(factors[0].shape[0], device(factors[0])):
        return [cholesky_solve(factor, one) for factor, one in zip(factors, rhs, strict=True)]
    xp = namespace(rhs[0])
    solutions = cholesky_solve(xp.stack(list(factors)), xp.stack(list(rhs))[:, :, None])
    return list(solutions[:, :, 0])
