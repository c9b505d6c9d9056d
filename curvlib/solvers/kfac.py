"""Kronecker-factored curvature: JᵀJ / n ≈ A ⊗ G, inverted factor by factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, eigh, namespace, record, trace
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout, Sharing
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_choice, check_damping

__all__ = ["KFAC", "KFACCholesky", "KFACEigen", "KFACEstimate"]

KFACDamping = Literal["pi", "plain", "exact"]
KFACForm = Literal["auto", "cholesky", "eigen"]


@record
@dataclass(frozen=True, eq=False)
class KFACEstimate:
    """Estimate: averages of A, shape ``(groups, d, d)``, and of G, shape ``(groups, d_out, d_out)``."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout
    count: int


@record
@dataclass(frozen=True, eq=False)
class KFACCholesky:
    """Inverse: Cholesky factors of the damped A and G."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout


@record
@dataclass(frozen=True, eq=False)
class KFACEigen:
    """Inverse: eigenvectors of A and G, and the reciprocals of the damped eigenvalues, shape ``(groups, d_out, d)``."""

    inputs: Array
    cotangents: Array
    reciprocals: Array
    layout: KroneckerLayout


@dataclass(frozen=True)
class KFAC(Solver):
    """K-FAC (Martens & Grosse 2015, arXiv 1503.05671): the block as one Kronecker product.

    Exact for one sample with one output; otherwise the approximation that inputs and cotangents are independent.
    Grouped convolutions have a pair of factors for each group.

    Parameters
    ----------
    sharing
        "expand" or "reduce" for weights shared over positions (arXiv 2311.00636).
    decay
        Weight of the past in the average of A and G, bias-corrected; 0 keeps the current batch alone.
    damping
        "pi": ``(A + π√λ I) ⊗ (G + √λ/π I)`` with π² the ratio of the factors' mean eigenvalues (section 6.3 there);
        "plain": the same with π = 1; "exact": ``A ⊗ G + λ I`` in the eigenbasis.
    form
        How the factors are inverted: "cholesky", cheaper to make; "eigen", which has the spectrum and serves every
        damping; "auto" takes Cholesky wherever the damping is a product.
    """

    exact: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    sharing: Sharing = "expand"
    decay: float = 0.95
    damping: KFACDamping = "pi"
    form: KFACForm = "auto"

    def __post_init__(self) -> None:
        check_decay(self.decay)
        check_choice("sharing", self.sharing, get_args(Sharing))
        check_choice("damping", self.damping, get_args(KFACDamping))
        check_choice("form", self.form, get_args(KFACForm))
        if self.damping == "exact" and self.form == "cholesky":
            raise ConfigurationError(
                "A ⊗ G + λI is no Kronecker product, so damping='exact' has no Cholesky form: use form='eigen', or "
                "damping='pi'"
            )

    def update(self, estimate: KFACEstimate | None, factors: Factors) -> KFACEstimate:
        apart = factors.kronecker_rows(self.sharing)
        pair = apart.pair()
        cotangents = pair.cotangents / factors.normalizer
        if estimate is None:
            return KFACEstimate(pair.inputs, cotangents, apart.layout, 1)
        return KFACEstimate(
            averaged(estimate.inputs, estimate.count, pair.inputs, self.decay),
            averaged(estimate.cotangents, estimate.count, cotangents, self.decay),
            apart.layout,
            estimate.count + 1,
        )

    def factorize(self, estimate: KFACEstimate, damping: float) -> KFACCholesky | KFACEigen:
        damping = check_damping(damping)
        if self.damping == "exact":
            return self._rotated(estimate, 0.0, 0.0, damping)
        mean_a, mean_g = (trace(matrix) / matrix.shape[-1] for matrix in (estimate.inputs, estimate.cotangents))
        left, right = split_damping(mean_a, mean_g, damping, balanced=self.damping == "pi")
        if self.form == "eigen":
            return self._rotated(estimate, left, right, 0.0)
        return KFACCholesky(
            cholesky(add_diagonal(estimate.inputs, left)),
            cholesky(add_diagonal(estimate.cotangents, right)),
            estimate.layout,
        )

    def _rotated(self, estimate: KFACEstimate, left: Any, right: Any, whole: float) -> KFACEigen:
        """``(A + left I) ⊗ (G + right I) + whole I`` in the eigenbasis."""
        a, Q_A = eigh(estimate.inputs)
        g, Q_G = eigh(estimate.cotangents)
        damped = (g[:, :, None] + right) * (a[:, None, :] + left) + whole
        return KFACEigen(Q_A, Q_G, 1 / damped, estimate.layout)

    def gains_from_rows(self, factors: Factors, same: bool) -> bool:
        return rows_pay(factors)

    def solve(self, inverse: KFACCholesky | KFACEigen, gradient: Gradient) -> dict[str, Array]:
        if isinstance(gradient, Factors) and rows_pay(gradient):
            return _solved_by_rows(inverse, gradient)
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        matrix = inverse.layout.matrix(vector)
        transpose = namespace(matrix).matrix_transpose
        if isinstance(inverse, KFACEigen):
            return inverse.layout.vector(
                divided_in_basis(matrix, inverse.inputs, inverse.cotangents, inverse.reciprocals)
            )
        left = cholesky_solve(inverse.cotangents, matrix)
        return inverse.layout.vector(transpose(cholesky_solve(inverse.inputs, transpose(left))))


def split_damping(inputs: Array, cotangents: Array, damping: float, balanced: bool) -> tuple[Any, Any]:
    """Split λ into parts for A and G whose product is λ.

    Parameters
    ----------
    inputs, cotangents
        Mean eigenvalues of A and of G, shape ``(groups,)``.
    damping
        λ.
    balanced
        Whether by the ratio π of mean eigenvalues; evenly otherwise.

    Returns
    -------
    tuple
        π√λ and √λ/π, shape ``(groups, 1, 1)`` where balanced.
    """
    root = math.sqrt(damping)
    if not balanced:
        return root, root
    xp = namespace(inputs)
    tiny = xp.finfo(inputs.dtype).smallest_normal
    # A factor that is zero (no signal yet) must not turn π into 0 or infinity.
    left, right = (xp.where(mean > tiny, mean, xp.ones_like(mean)) for mean in (inputs, cotangents))
    pi = xp.sqrt(left / right)[:, None, None]
    return root * pi, root / pi


def rows_pay(factors: Factors) -> bool:
    """Whether a gradient of such rows is cheaper to precondition row by row than explicitly."""
    sizes = factors.outer_sizes
    if sizes is None:
        return False
    n, d_in, d_out = sizes
    return n * (d_in * d_in + d_out * d_out) < d_in * d_out * (d_in + d_out)


def paired_rows(gradient: Factors) -> tuple[Array, Array]:
    """Inputs ``[a, 1]`` and cotangents g, one of each a row; ``gᵀ [a, 1]`` is the gradient that the rows stand for."""
    apart = gradient.kronecker_rows()
    a, g = apart.augmented_inputs(), apart.cotangents
    if a.shape[1] != g.shape[1]:
        # Several columns share an input.
        n = a.shape[1]
        g = g.reshape(g.shape[0], n, -1, g.shape[2]).sum(axis=2)
    return a, g / gradient.normalizer


def _solved_by_rows(inverse: KFACCholesky | KFACEigen, gradient: Factors) -> dict[str, Array]:
    """``B⁻¹ (gᵀ a) A⁻¹ = (B⁻¹gᵀ)(A⁻¹aᵀ)ᵀ``: solves with as many right-hand sides as there are rows."""
    a, g = paired_rows(gradient)
    transpose = namespace(a).matrix_transpose
    if isinstance(inverse, KFACEigen):
        rotated = transpose(g @ inverse.cotangents) @ (a @ inverse.inputs)
        matrix = inverse.cotangents @ (rotated * inverse.reciprocals) @ transpose(inverse.inputs)
    else:
        left = cholesky_solve(inverse.cotangents, transpose(g))
        matrix = left @ transpose(cholesky_solve(inverse.inputs, transpose(a)))
    return inverse.layout.vector(matrix)


def divided_in_basis(matrix: Array, inputs: Array, cotangents: Array, reciprocals: Array) -> Array:
    """``Q_G ((Q_Gᵀ M Q_A) ∘ R) Q_Aᵀ`` for matrices M of shape ``(groups, d_out, d)``."""
    transpose = namespace(matrix).matrix_transpose
    return cotangents @ ((transpose(cotangents) @ matrix @ inputs) * reciprocals) @ transpose(inputs)
