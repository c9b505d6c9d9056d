"""Diagonal curvature, and none at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from curvlib.arrays import Array, record
from curvlib.factors import Factors
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping, check_finite

__all__ = ["Diagonal", "DiagonalEstimate", "DiagonalInverse", "Identity"]


@record
@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """Estimate: average of the diagonal of JᵀJ / n, a block vector."""

    diagonal: Mapping[str, Array]
    count: int


@record
@dataclass(frozen=True, eq=False)
class DiagonalInverse:
    """Inverse: reciprocals of the damped diagonal, a block vector."""

    reciprocals: Mapping[str, Array]


@dataclass(frozen=True)
class Diagonal(Solver):
    """The diagonal of the block's curvature.

    Parameters
    ----------
    decay
        Weight of the past in the average, bias-corrected; 0 keeps the current batch alone.
    power
        The damped diagonal is raised to −power: 1 is Newton-like, 1/2 as in Adam.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    decay: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def update(self, estimate: DiagonalEstimate | None, factors: Factors) -> DiagonalEstimate:
        fresh = {name: value / factors.normalizer for name, value in factors.diagonal().items()}
        if estimate is None:
            return DiagonalEstimate(fresh, 1)
        old = estimate.diagonal
        merged = {name: averaged(old[name], estimate.count, fresh[name], self.decay) for name in fresh}
        return DiagonalEstimate(merged, estimate.count + 1)

    def factorize(self, estimate: DiagonalEstimate, damping: float) -> DiagonalInverse:
        damping = check_damping(damping)
        for value in estimate.diagonal.values():
            check_finite(squares=value)
        return DiagonalInverse({name: (value + damping) ** -self.power for name, value in estimate.diagonal.items()})

    def solve(self, inverse: DiagonalInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, {name: tuple(value.shape) for name, value in inverse.reciprocals.items()})
        return {name: vector[name] * inverse.reciprocals[name] for name in inverse.reciprocals}


@dataclass(frozen=True)
class Identity(Solver):
    """No curvature: the gradient passes through unchanged, whatever the damping."""

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False

    def update(self, estimate: Any, factors: Factors) -> int:
        return 0

    def factorize(self, estimate: Any, damping: float) -> int:
        check_damping(damping)
        return 0

    def solve(self, inverse: Any, gradient: Gradient) -> dict[str, Array]:
        return dict(as_vector(gradient))
