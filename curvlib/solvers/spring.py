"""Momentum inside the Woodbury solve, and its special case without momentum."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from curvlib.arrays import (
    Array,
    Vector,
    add_diagonal,
    cholesky,
    cholesky_solve,
    dot,
    namespace,
    record,
    require,
    trace,
)
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping

__all__ = ["SPRING", "MinSR", "SPRINGEstimate", "SPRINGInverse", "multiple_of_mean", "proximal_solve"]


@record
@dataclass(frozen=True, eq=False)
class SPRINGEstimate:
    """Estimate: the current rows, their kernel ``J Jᵀ / normalizer``, and the last natural gradient (None at first)."""

    factors: Factors
    kernel: Array
    previous: Vector | None


@record
@dataclass(frozen=True, eq=False)
class SPRINGInverse:
    """Inverse: the rows, the Cholesky factor of the damped kernel, the last natural gradient, mean squared row norm."""

    factors: Factors
    factor: Array
    previous: Vector | None
    square: Array


@dataclass(frozen=True)
class SPRING(Solver):
    """SPRING (Goldshlager, Abrahamsen, Lin 2024, arXiv 2401.10190): the solve stays close to the previous solution.

    Parameters
    ----------
    momentum
        μ in [0, 1): how much of the previous natural gradient is kept where the current rows do not decide.
    tolerance
        Largest relative distance between the gradient and the mean of the rows.

    Notes
    -----
    With F = JᵀJ / n, K = J Jᵀ / n and row weights r = c · 1 / n,

        p_k = μ p_{k−1} + Jᵀ (K + λI)⁻¹ (r − μ J p_{k−1} / n),

    the minimiser of ``pᵀFp / 2 − gᵀp + λ ‖p − μ p_{k−1}‖² / 2`` for g = Jᵀ r. The paper's λ is that of ``J Jᵀ``
    without the division: n times this one. Its rows are centred derivatives of log-amplitudes and its r local energies;
    here rows are gradients of each sample's loss, and r is what makes g of them. For rows of residuals and r the
    residuals themselves, see `curvlib.func`.

    So g must be a combination of the *same* rows: take them from ``Empirical()`` at every step (``refresh=1``). A
    gradient that is a multiple of the rows' mean is taken with that multiple c (a summed loss, gradient clipping);
    any other is refused. Reduced precision may need a larger `tolerance`. A gradient lost in the rounding of its rows
    is taken as it comes.
    """

    exact: ClassVar[bool] = False
    of_fresh_rows: ClassVar[bool] = True
    momentum: float = 0.99
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"the momentum inside the solve must lie in [0, 1), got {self.momentum!r}")
        if not self.tolerance > 0:
            raise ConfigurationError(f"the tolerance must be a positive number, got {self.tolerance!r}")

    def update(self, estimate: SPRINGEstimate | None, factors: Factors) -> SPRINGEstimate:
        previous = None if estimate is None else estimate.previous
        return SPRINGEstimate(factors, factors.gram() / factors.normalizer, previous)

    def factorize(self, estimate: SPRINGEstimate, damping: float) -> SPRINGInverse:
        factor = cholesky(add_diagonal(estimate.kernel, check_damping(damping)))
        return SPRINGInverse(estimate.factors, factor, estimate.previous, trace(estimate.kernel))

    def solve(self, inverse: SPRINGInverse, gradient: Gradient) -> dict[str, Array]:
        rows = inverse.factors
        weights = rows.row_weights(1 / rows.normalizer)
        if gradient is not rows:
            vector = as_vector(gradient)
            check_block(vector, rows.shapes)
            mean, name = rows.rmatvec(weights), type(self).__name__
            weights = weights * multiple_of_mean(vector, mean, inverse.square, self.tolerance, name)
        return proximal_solve(rows, inverse.factor, weights, inverse.previous, self.momentum)

    def remember(self, estimate: SPRINGEstimate, natural: Vector) -> SPRINGEstimate:
        return dataclasses.replace(estimate, previous=dict(natural)) if self.momentum else estimate


@dataclass(frozen=True)
class MinSR(SPRING):
    """MinSR (Chen and Heyl 2024, arXiv 2302.01941): the natural gradient of the current rows by push-through.

    ``Jᵀ (K + λI)⁻¹ r``, which is ``(F + λI)⁻¹ g`` for g = Jᵀ r: `SPRING` without momentum. It has no difference of
    large terms, so it stays accurate at any damping; the gradient must be that of the same rows, as for `SPRING`.

    Parameters
    ----------
    tolerance
        As for `SPRING`.
    """

    exact: ClassVar[bool] = True
    momentum: float = field(default=0.0, init=False, repr=False)


def proximal_solve(
    rows: Factors, factor: Array, weights: Array, previous: Vector | None = None, momentum: float = 0.0
) -> dict[str, Array]:
    """``(F + λI)⁻¹ (Jᵀ r + λ μ p)`` through the kernel, a block vector.

    Parameters
    ----------
    rows
        J.
    factor
        Lower Cholesky factor of ``J Jᵀ / normalizer + λI``.
    weights
        r, shape ``(rows,)``.
    previous, momentum
        p, a block vector or None for zero, and μ.
    """
    if previous is None or momentum == 0:
        return rows.rmatvec(cholesky_solve(factor, weights))
    check_block(previous, rows.shapes)
    kept = {name: momentum * array for name, array in previous.items()}
    step = rows.rmatvec(cholesky_solve(factor, weights - rows.matvec(kept) / rows.normalizer))
    return {name: kept[name] + step[name] for name in step}


def multiple_of_mean(gradient: Vector, mean: Vector, square: Array, tolerance: float, name: str) -> Array:
    """Return c ≥ 0 with gradient = c · mean.

    Parameters
    ----------
    gradient, mean
        Block vectors.
    square
        Mean squared length of the rows that `mean` is the mean of.
    tolerance
        Largest relative distance that is taken for none.
    name
        Of the solver, for the error.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    xp = namespace(square)
    size, own, both = dot(mean, mean), dot(gradient, gradient), dot(mean, gradient)
    # Below this the mean is what rounding left of rows that cancel, and has no direction to compare.
    noise = (100 * xp.finfo(square.dtype).eps) ** 2 * square
    lost = size <= noise
    # ‖g − c m‖² with c = ⟨g, m⟩ / ‖m‖², the best multiple.
    multiple = both / xp.where(lost, xp.ones_like(size), size)
    rest = {key: gradient[key] - multiple * mean[key] for key in mean}
    distance = dot(rest, rest)
    allowed = tolerance**2 * own + multiple**2 * noise
    fits = lost | ((multiple >= 0) & (distance <= allowed))
    require(fits, partial(_of_other_rows, name, distance, own), ConfigurationError)
    return xp.where(lost, xp.ones_like(multiple), multiple)


def _of_other_rows(name: str, distance: Array, own: Array) -> str:
    return (
        f"{name} needs the gradient of the rows that it solves with, but this gradient is "
        f"{float(distance / own) ** 0.5:.2g} of its length away from every multiple of their mean: use "
        "fisher=Empirical() with refresh=1 and the loss that the gradient comes from (transforms of the gradient "
        "before the step may scale it, no more); in reduced precision raise `tolerance`"
    )
