"""Curvature of one rank-one Kronecker product: the mean input and the mean cotangent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from curvlib.arrays import Array, contract, namespace, record
from curvlib.factors import Factors, KroneckerLayout
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import (
    Gradient,
    Solver,
    as_vector,
    check_block,
    check_damping,
    check_finite,
    check_gradient_rows,
)

__all__ = ["Eva", "EvaEstimate", "EvaInverse", "mean_vectors"]


@record
@dataclass(frozen=True, eq=False)
class EvaEstimate:
    """Estimate: averages of the mean input ā, shape ``(groups, d)``, and cotangent ḡ, shape ``(groups, d_out)``."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout
    count: int


@record
@dataclass(frozen=True, eq=False)
class EvaInverse:
    """Inverse: ā and ḡ, ``1 / (|ā|² |ḡ|² + λ)`` of shape ``(groups,)``, and λ."""

    inputs: Array
    cotangents: Array
    reciprocals: Array
    layout: KroneckerLayout
    damping: float


@dataclass(frozen=True)
class Eva(Solver):
    """Eva (Zhang, Shi, Li 2023, arXiv 2308.02123): K-FAC with factors of rank one, inverted in closed form.

    The statistics are those of the gradient itself, so the Factors must come from the loss (`Empirical`): cotangents of
    sampled labels have mean zero.

    Parameters
    ----------
    decay
        Weight of the past in the averages of ā and ḡ, bias-corrected. The authors weight the newest batch by 0.95.

    Notes
    -----
    For matrices M = [W, b] the curvature is ``(ā āᵀ) ⊗ (ḡ ḡᵀ)``, of rank one, so Sherman and Morrison give

        p = (M − (ḡᵀ M ā) / (|ā|² |ḡ|² + λ) · ḡ āᵀ) / λ.

    For weights shared over positions ā is the mean over positions and ḡ the sum over them, so that ``ḡ āᵀ`` has the
    scale of the gradient; the authors take the mean of both, so that with P positions their λ stands for P² λ
    here (and p is P² times longer). Grouped convolutions have vectors of their own in each group.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    of_gradient: ClassVar[bool] = True
    decay: float = 0.05

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def update(self, estimate: EvaEstimate | None, factors: Factors) -> EvaEstimate:
        inputs, cotangents, layout = mean_vectors(factors)
        if estimate is None:
            return EvaEstimate(inputs, cotangents, layout, 1)
        return EvaEstimate(
            averaged(estimate.inputs, estimate.count, inputs, self.decay),
            averaged(estimate.cotangents, estimate.count, cotangents, self.decay),
            layout,
            estimate.count + 1,
        )

    def factorize(self, estimate: EvaEstimate, damping: float) -> EvaInverse:
        damping = check_damping(damping)
        a, g = estimate.inputs, estimate.cotangents
        check_finite(mean_inputs=a, mean_cotangents=g)
        reciprocals = 1 / ((a * a).sum(axis=1) * (g * g).sum(axis=1) + damping)
        return EvaInverse(a, g, reciprocals, estimate.layout, damping)

    def solve(self, inverse: EvaInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        matrix, a, g = inverse.layout.matrix(vector), inverse.inputs, inverse.cotangents
        weights = contract("ko,koi,ki->k", g, matrix, a) * inverse.reciprocals
        correction = (weights[:, None] * g)[:, :, None] * a[:, None, :]
        return inverse.layout.vector((matrix - correction) / inverse.damping)


def mean_vectors(factors: Factors) -> tuple[Array, Array, KroneckerLayout]:
    """Mean input and cotangent of rows that are gradients of single samples.

    Returns
    -------
    tuple
        ā, shape ``(groups, d)``: mean over samples and positions, the 1 of a bias last; ḡ, shape ``(groups, d_out)``:
        summed over positions, mean over samples; and how they relate to the parameters.

    Raises
    ------
    ConfigurationError
        If samples have several rows, or rows are no products of inputs and cotangents.
    """
    check_gradient_rows(factors)
    inputs, cotangents, layout = factors.kronecker_means()
    cotangents = cotangents / factors.normalizer
    one = namespace(cotangents).ones_like(cotangents[:, :1])
    if layout.weight is None:
        return one, cotangents, layout
    if layout.bias is not None:
        inputs = namespace(inputs).concat([inputs, one], axis=1)
    return inputs, cotangents, layout
