"""Inverse Kronecker factors kept up to date by rank-one updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from curvlib.arrays import Array, add_diagonal, device, namespace, product, record
from curvlib.factors import Factors, KroneckerLayout
from curvlib.solvers.average import check_decay
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping, check_finite
from curvlib.solvers.eva import mean_vectors

__all__ = ["MKOR", "MKORState"]


@record
@dataclass(frozen=True, eq=False)
class MKORState:
    """Estimate and inverse alike: A⁻¹, shape ``(groups, d, d)``, and G⁻¹, shape ``(groups, d_out, d_out)``."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout


@dataclass(frozen=True)
class MKOR(Solver):
    """MKOR (Mozaffari et al. 2023, arXiv 2306.01685): K-FAC's inverses under rank-one updates, never factorised.

    The vectors of the updates are the mean input ā and the mean cotangent ḡ (as in `Eva`) of the gradient itself, so
    the Factors must come from the loss (`Empirical`).

    Parameters
    ----------
    decay
        γ in [0, 1): weight of the past; what it leaves goes to the identity.

    Notes
    -----
    Both inverses begin as the identity. With X either of them and v its vector, an update in the form that the
    authors' code gives it is

        Y = γ X + (1 − γ) I,    X ← Y − Y v vᵀ Y / (1 + vᵀ Y v),

    the inverse of Y⁻¹ + v vᵀ (Sherman and Morrison), so eigenvalues stay in (0, 1]. The natural gradient is
    ``G⁻¹ [W, b] A⁻¹``, rescaled to the length of the block's gradient [W, b] (the authors add the lengths of W and b).

    The identity that every update mixes in is the damping of this method, with γ for its strength: the λ of `factorize`
    has no place in it and changes nothing. The authors' guards of half precision (entries clamped to ±100, a return
    towards the identity once an entry of X exceeds a bound, which in this form none can) are left out; so is their
    omission of the very first vector.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    of_gradient: ClassVar[bool] = True
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def update(self, estimate: MKORState | None, factors: Factors) -> MKORState:
        inputs, cotangents, layout = mean_vectors(factors)
        before = (None, None) if estimate is None else (estimate.inputs, estimate.cotangents)
        return MKORState(self._updated(before[0], inputs), self._updated(before[1], cotangents), layout)

    def _updated(self, inverse: Array | None, vector: Array) -> Array:
        if inverse is None:
            xp, (groups, size) = namespace(vector), vector.shape
            zeros = xp.zeros((groups, size, size), dtype=vector.dtype, device=device(vector))
            mixed = add_diagonal(zeros, 1.0)
        else:
            mixed = add_diagonal(self.decay * inverse, 1 - self.decay)
        image = (mixed @ vector[:, :, None])[:, :, 0]
        scale = 1 / (1 + (image * vector).sum(axis=1))
        return mixed - (scale[:, None] * image)[:, :, None] * image[:, None, :]

    def factorize(self, estimate: MKORState, damping: float) -> MKORState:
        check_damping(damping)
        check_finite(inverse_inputs=estimate.inputs, inverse_cotangents=estimate.cotangents)
        return estimate

    def solve(self, inverse: MKORState, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        matrix = inverse.layout.matrix(vector)
        natural = product(product(inverse.cotangents, matrix), inverse.inputs)
        xp = namespace(matrix)
        before, after = ((array * array).sum() for array in (matrix, natural))
        # Both inverses are positive definite, so only a zero gradient has a zero image.
        ratio = xp.where(after > 0, before / xp.where(after > 0, after, xp.ones_like(after)), xp.ones_like(after))
        return inverse.layout.vector(natural * xp.sqrt(ratio))
