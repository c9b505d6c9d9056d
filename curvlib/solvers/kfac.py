"""Kronecker-factored curvature: JᵀJ / n ≈ A ⊗ G, inverted factor by factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from curvlib.arrays import (
    Array,
    add_diagonal,
    aligned_product,
    cholesky,
    cholesky_inverse,
    cholesky_solve,
    eigh,
    namespace,
    record,
    side_by_side,
    trace,
)
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout, KroneckerRows, Sharing
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import check_choice, check_damping
from curvlib.solvers.pairs import Halves, KroneckerSolver, adjoined

__all__ = ["KFAC", "KFACEigen", "KFACEstimate", "KFACInverse", "averaged_factors", "split_damping"]

KFACDamping = Literal["pi", "plain", "exact"]
KFACForm = Literal["auto", "cholesky", "inverse", "eigen"]

_WIDER = 6
"""How many times wider than the other side of the block a factor may be for its explicit inverse to pay.

An inverse saves its making within about 0.8 steps for each time (measured with LAPACK, widths 64 to 1000), and is made
once for several steps, as a rule.
"""


_NARROW = 256
"""Width of factors whose inverse is made in the time of few solves, whatever the other side (measured as above)."""


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
class KFACInverse:
    """Inverse: that of the damped A and of the damped G, each explicit or as a Cholesky factor.

    Parameters
    ----------
    inputs, cotangents
        Shape ``(groups, d, d)`` and ``(groups, d_out, d_out)``.
    layout
        How the block's parameters form matrices.
    explicit
        Whether each of the two is the inverse itself.
    """

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout
    explicit: tuple[bool, bool]

    def stackable(self) -> Mapping[str, Array] | None:
        return {"inputs": self.inputs, "cotangents": self.cotangents} if all(self.explicit) else None

    def apply(self, matrix: Array) -> Halves | Array:
        if self.explicit[0]:
            return self._on_cotangents(matrix), self.inputs
        if self.explicit[1]:
            return self.cotangents, self._solved_inputs(matrix)
        return self._solved_inputs(self._on_cotangents(matrix))

    def apply_to_rows(self, rows: KroneckerRows) -> Halves:
        # B⁻¹ (gᵀ a) A⁻¹ = (B⁻¹gᵀ)(A⁻¹aᵀ)ᵀ: solves with as many right-hand sides as there are rows.
        cotangents = namespace(rows.cotangents).matrix_transpose(rows.cotangents)
        explicit = self.explicit[0]
        inputs = rows.project_inputs(self.inputs) if explicit else self._solved_inputs(rows.augmented_inputs())
        return self._on_cotangents(cotangents), inputs

    def _solved_inputs(self, matrix: Array) -> Array:
        """``M A⁻¹`` for M of shape ``(groups, k, d)``, by the Cholesky factor of A."""
        transpose = namespace(matrix).matrix_transpose
        return transpose(cholesky_solve(self.inputs, transpose(matrix)))

    def _on_cotangents(self, matrix: Array) -> Array:
        """``G⁻¹ M``, for M of shape ``(groups, d_out, k)``."""
        if self.explicit[1]:
            return aligned_product(self.cotangents, matrix)
        return cholesky_solve(self.cotangents, matrix)


@record
@dataclass(frozen=True, eq=False)
class KFACEigen:
    """Inverse: eigenvectors of A and G, and the reciprocals of the damped eigenvalues, shape ``(groups, d_out, d)``."""

    inputs: Array
    cotangents: Array
    reciprocals: Array
    layout: KroneckerLayout

    def stackable(self) -> Mapping[str, Array] | None:
        return {"inputs": self.inputs, "cotangents": self.cotangents, "reciprocals": self.reciprocals}

    def apply(self, matrix: Array) -> Halves:
        # Q_G ((Q_Gᵀ M Q_A) ∘ R) Q_Aᵀ
        transposed = namespace(matrix).matrix_transpose(self.cotangents)
        return self._back(aligned_product(aligned_product(transposed, matrix), self.inputs))

    def apply_to_rows(self, rows: KroneckerRows) -> Halves:
        cotangents = aligned_product(rows.cotangents, self.cotangents)
        transposed = namespace(cotangents).matrix_transpose(cotangents)
        return self._back(aligned_product(transposed, rows.project_inputs(self.inputs)))

    def _back(self, rotated: Array) -> Halves:
        """Out of the eigenbasis, after the division by damped eigenvalues there."""
        rotated *= self.reciprocals
        return aligned_product(self.cotangents, rotated), namespace(rotated).matrix_transpose(self.inputs)


@dataclass(frozen=True)
class KFAC(KroneckerSolver):
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
        How the factors are inverted: "cholesky", cheapest to make; "inverse", from Cholesky factors, cheaper to apply;
        "eigen", which has the spectrum and serves every damping. "auto" takes the eigenbasis where the damping is no
        product, Cholesky for a wide factor of a block whose other side is much narrower, and inverses elsewhere.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
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
        if self.damping == "exact" and self.form in ("cholesky", "inverse"):
            raise ConfigurationError(
                "A ⊗ G + λI is no Kronecker product, so damping='exact' has no Cholesky form and no inverse of that "
                "kind: use form='eigen', or damping='pi'"
            )

    def update(self, estimate: KFACEstimate | None, factors: Factors) -> KFACEstimate:
        return averaged_factors(estimate, factors, self.sharing, self.decay)

    def factorize(self, estimate: KFACEstimate, damping: float) -> KFACInverse | KFACEigen:
        return self.factorize_all([estimate], [damping])[0]

    def factorize_all(
        self, estimates: Sequence[KFACEstimate], dampings: Sequence[float]
    ) -> list[KFACInverse | KFACEigen]:
        dampings = [check_damping(damping) for damping in dampings]
        added = [self._split(estimate, damping) for estimate, damping in zip(estimates, dampings, strict=True)]
        sides = [
            (matrix, value, self._explicit(matrix.shape[-1], other.shape[-1]))
            for estimate, (left, right) in zip(estimates, added, strict=True)
            for matrix, value, other in (
                (estimate.inputs, left, estimate.cotangents),
                (estimate.cotangents, right, estimate.inputs),
            )
        ]
        widths = [matrix.shape[-1] for matrix, _, _ in sides]
        if self.form == "eigen" or self.damping == "exact":
            bases = side_by_side(eigh, [(matrix,) for matrix, _, _ in sides], widths, sides[0][0], effort=50)
            whole = [damping if self.damping == "exact" else 0.0 for damping in dampings]
            return adjoined(
                [
                    _eigen(estimate, bases[2 * place], bases[2 * place + 1], *added[place], whole[place])
                    for place, estimate in enumerate(estimates)
                ]
            )
        made = side_by_side(_inverted, sides, widths, sides[0][0], effort=3)
        return adjoined(
            [
                KFACInverse(made[place], made[place + 1], estimate.layout, (sides[place][2], sides[place + 1][2]))
                for place, estimate in zip(range(0, len(made), 2), estimates, strict=True)
            ]
        )

    def _split(self, estimate: KFACEstimate, damping: float) -> tuple[Any, Any]:
        """What is added to A and to G."""
        if self.damping == "exact":
            return 0.0, 0.0
        mean_a, mean_g = (trace(matrix) / matrix.shape[-1] for matrix in (estimate.inputs, estimate.cotangents))
        return split_damping(mean_a, mean_g, damping, balanced=self.damping == "pi")

    def _explicit(self, width: int, other: int) -> bool:
        return self.form == "inverse" or (self.form == "auto" and width <= max(_NARROW, _WIDER * other))


def averaged_factors(estimate: KFACEstimate | None, factors: Factors, sharing: Sharing, decay: float) -> KFACEstimate:
    """Averages of A and G with those of new rows; as of `KFAC.update`, whose hyperparameters they are."""
    pair = factors.kronecker(sharing)
    cotangents = pair.cotangents / factors.normalizer
    if estimate is None:
        return KFACEstimate(pair.inputs, cotangents, pair.layout, 1)
    return KFACEstimate(
        averaged(estimate.inputs, estimate.count, pair.inputs, decay),
        averaged(estimate.cotangents, estimate.count, cotangents, decay),
        pair.layout,
        estimate.count + 1,
    )


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


def _inverted(matrix: Array, added: Any, explicit: bool) -> Array:
    """Cholesky factor of a damped factor, or the inverse itself."""
    factor = cholesky(add_diagonal(matrix, added))
    return cholesky_inverse(factor) if explicit else factor


def _eigen(
    estimate: KFACEstimate,
    inputs: tuple[Array, Array],
    cotangents: tuple[Array, Array],
    left: Any,
    right: Any,
    whole: float,
) -> KFACEigen:
    """``(A + left I) ⊗ (G + right I) + whole I`` from the eigenvalues and eigenvectors of A and G."""
    (a, Q_A), (g, Q_G) = inputs, cotangents
    damped = (g[:, :, None] + right) * (a[:, None, :] + left) + whole
    return KFACEigen(Q_A, Q_G, 1 / damped, estimate.layout)
