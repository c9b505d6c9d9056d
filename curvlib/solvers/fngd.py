"""Natural gradients as weighted sums of single samples' gradients, with weights that are kept after the first epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, device, namespace, record, trace
from curvlib.errors import ConfigurationError, NotPositiveDefiniteError
from curvlib.factors import Factors
from curvlib.solvers.base import (
    Gradient,
    Solver,
    as_vector,
    check_block,
    check_choice,
    check_damping,
    check_finite,
)
from curvlib.solvers.spring import multiple_of_mean

__all__ = ["FNGD", "FNGDEstimate", "FNGDInverse"]

Shared = Literal["mean", "batch"]


@record
@dataclass(frozen=True, eq=False)
class FNGDEstimate:
    """Estimate: the current rows and their weights, and the weights that the first epoch leaves.

    Parameters
    ----------
    factors
        The current rows.
    weights
        ω of the current rows, shape ``(rows,)``.
    shared
        ω by position in the batch: their mean over batches, or one array for each batch of the first epoch.
    counts
        How many batches each position of the mean has seen.
    square
        Mean squared length of the rows of the last batch whose weights were computed.
    updates
        How many batches there were.
    """

    factors: Factors
    weights: Array
    shared: tuple[Array, ...]
    counts: Array
    square: Array
    updates: int


@record
@dataclass(frozen=True, eq=False)
class FNGDInverse:
    """Inverse: the current rows, their weights, and the mean squared length of rows."""

    factors: Factors
    weights: Array
    square: Array


@dataclass(frozen=True)
class FNGD(Solver):
    """FNGD (Ou, Zhu, Huang, Liu 2024, arXiv 2403.03473): weights from inverses in the first epoch, shared ever after.

    Parameters
    ----------
    damping
        λ > 0 of the weights. It belongs to the method; the damping of `factorize` has no place in it and changes
        nothing.
    first_epoch
        Number of updates in the first epoch, those that compute weights.
    shared
        What later epochs use: "mean", at each position in the batch the mean of its weights over the batches of the
        first epoch, one fixed vector; or "batch", the weights of the batch with the same number in the first epoch,
        for data that come in the same order in every epoch.
    tolerance
        Largest relative distance between the gradient and the mean of the rows.

    Notes
    -----
    With F = JᵀJ / n, K = J Jᵀ / n and g = Jᵀ1 / n, Woodbury's identity turns the natural gradient into a weighted sum
    of the samples' gradients,

        (F + λI)⁻¹ g = Jᵀ ω / n,    ω = (K + λI)⁻¹ 1,

    exact for the first epoch. Later ω is not that of the present rows: what is approximate. The abstract says that
    weights are shared across epochs; which batch's, is a choice of `shared` here. A batch that is larger than
    those of the first epoch has their mean weight where they had no position. Under shuffling a position means
    nothing, and the mean over many batches tends to one weight for all: gradient descent with a learning rate of its
    own for each block.

    As for `SPRING`, g must be a combination of the *same* rows: take them from ``Empirical()`` at every step
    (``refresh=1``). A multiple of their mean is taken with that multiple; any other gradient is refused.
    """

    exact: ClassVar[bool] = False
    of_fresh_rows: ClassVar[bool] = True
    damping: float = 0.1
    first_epoch: int = 100
    shared: Shared = "mean"
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_choice("shared", self.shared, get_args(Shared))
        if isinstance(self.first_epoch, bool) or not isinstance(self.first_epoch, int) or self.first_epoch < 1:
            raise ConfigurationError(f"the first epoch has at least one update, got {self.first_epoch!r}")
        if not self.tolerance > 0:
            raise ConfigurationError(f"the tolerance must be a positive number, got {self.tolerance!r}")

    def update(self, estimate: FNGDEstimate | None, factors: Factors) -> FNGDEstimate:
        updates = 0 if estimate is None else estimate.updates
        if estimate is not None and updates >= self.first_epoch:
            chosen = estimate.shared[updates % len(estimate.shared)]
            weights = _fitted(chosen, len(factors))
            return FNGDEstimate(factors, weights, estimate.shared, estimate.counts, estimate.square, updates + 1)
        kernel = factors.gram() / factors.normalizer
        ones = factors.row_weights(1.0)
        try:
            weights = cholesky_solve(cholesky(add_diagonal(kernel, self.damping)), ones)
        except NotPositiveDefiniteError:
            weights = float("nan") * ones  # which `factorize` refuses, where the refusal has a place
        counts = ones
        if estimate is None:
            shared: tuple[Array, ...] = (weights,)
        elif self.shared == "batch":
            shared = (*estimate.shared, weights)
        else:
            size = max(len(ones), len(estimate.counts))
            seen, counts = _padded(estimate.counts, size), _padded(estimate.counts, size) + _padded(ones, size)
            shared = ((_padded(estimate.shared[0], size) * seen + _padded(weights, size)) / counts,)
        return FNGDEstimate(factors, weights, shared, counts, trace(kernel), updates + 1)

    def factorize(self, estimate: FNGDEstimate, damping: float) -> FNGDInverse:
        check_damping(damping)
        check_finite(row_weights=estimate.weights)
        return FNGDInverse(estimate.factors, estimate.weights, estimate.square)

    def solve(self, inverse: FNGDInverse, gradient: Gradient) -> dict[str, Array]:
        rows, weights = inverse.factors, inverse.weights / inverse.factors.normalizer
        if gradient is not rows:
            vector = as_vector(gradient)
            check_block(vector, rows.shapes)
            mean = rows.rmatvec(rows.row_weights(1 / rows.normalizer))
            weights = weights * multiple_of_mean(vector, mean, inverse.square, self.tolerance, type(self).__name__)
        return rows.rmatvec(weights)


def _padded(array: Array, size: int) -> Array:
    xp = namespace(array)
    return xp.concat([array, xp.zeros((size - len(array),), dtype=array.dtype, device=device(array))])


def _fitted(weights: Array, size: int) -> Array:
    """Weights of the first `size` positions; their mean for positions that they do not have."""
    if size <= len(weights):
        return weights[:size]
    return _padded(weights - weights.mean(), size) + weights.mean()
