"""Fewer rows in place of all: sampled by importance, or interpolated from the largest."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from curvlib.arrays import (
    Array,
    add_diagonal,
    cholesky,
    cholesky_solve,
    device,
    eigh,
    namespace,
    record,
    require_finite,
)
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, SharedOuter
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_choice, check_damping, corrected

__all__ = ["KID", "KIS", "KIDEstimate", "KISEstimate", "RowInverse"]

RowSharing = Literal["exact", "reduce"]


@record
@dataclass(frozen=True, eq=False)
class KISEstimate:
    """Estimate: r rows R, scaled so that F ≈ RᵀR, their kernel R Rᵀ, and how many updates there were."""

    rows: Factors
    kernel: Array
    count: int


@record
@dataclass(frozen=True, eq=False)
class KIDEstimate:
    """Estimate: the r rows kept, scaled by 1/√n, their positions, and the kernel J Jᵀ / n of all rows."""

    rows: Factors
    chosen: Array
    kernel: Array


@record
@dataclass(frozen=True, eq=False)
class RowInverse:
    """Inverse: rows R and a matrix Z, shape ``(r, r)``, with ``(F + λI)⁻¹ ≈ (I − Rᵀ Z R) / λ``."""

    rows: Factors
    middle: Array
    damping: float

    def solve(self, gradient: Gradient) -> dict[str, Array]:
        """Return the natural gradient, a block vector."""
        vector = as_vector(gradient)
        check_block(vector, self.rows.shapes)
        weights = self.middle @ self.rows.matvec(vector) / -self.damping
        return corrected([vector], [self.rows.rmatvec(weights)], self.damping)[0]


@dataclass(frozen=True)
class KIS(Solver):
    """HyLo's Khatri–Rao importance sampling (Mu, Soori, Can, Gürbüzbalaban, Mehri Dehnavi, SC22): some rows for all.

    Parameters
    ----------
    ratio
        Share of the rows that is kept, in (0, 1].
    sharing
        "exact" rows; or "reduce": mean input and summed cotangent of a sample's positions, one outer product a row.
        (The authors average both, which divides this curvature by the squared number of positions.)
    unbiased
        Whether rows are weighted so that the curvature is right on average. The authors' are not: each counts N / r,
        and since large rows are likelier, the curvature comes out too large.
    seed
        Chooses, with the number of updates so far, which rows are drawn.

    Notes
    -----
    r of N rows are drawn without replacement with chances proportional to ``‖J_i‖²``, which is ``‖a_i‖² ‖g_i‖²`` for
    an outer product: the r largest of ``log ‖J_i‖² + Gumbel noise``. The Fisher ``JᵀJ / n`` becomes ``Σ w_i J_iᵀ J_i``
    over the rows drawn, with w = N / (n r), or, unbiased, ``w_i = 1 / (n q_i)``, where
    ``q_i = 1 − exp(−‖J_i‖² exp(−κ))`` is the chance to exceed the largest key κ that was not drawn (Kool, van
    Hoof, Welling 2019, arXiv 1903.06059).

    The draw belongs to the rows as they come: a repeated or permuted batch gives other rows.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    ratio: float = 0.1
    sharing: RowSharing = "exact"
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.ratio, self.sharing)

    @property
    def of_kronecker_rows(self) -> bool:
        return self.sharing == "reduce"

    def update(self, estimate: KISEstimate | None, factors: Factors) -> KISEstimate:
        count = 0 if estimate is None else estimate.count
        rows = _shared(factors, self.sharing)
        gram = rows.gram()
        xp = namespace(gram)
        squares = xp.linalg.diagonal(gram)
        # Rows of zeros come last; an offset keeps the logarithm finite.
        keys = xp.log(squares + xp.finfo(gram.dtype).smallest_normal) + _gumbel(gram, f"{self.seed}/{count}")
        order = xp.argsort(keys, descending=True, stable=True)
        r, total = _rank(self.ratio, len(rows)), len(rows)
        chosen = order[:r]
        weights = xp.ones_like(keys[:r]) * (total / (factors.normalizer * r))
        if self.unbiased:
            chance = xp.ones_like(weights)
            if r < total:
                exceeds = -xp.expm1(-squares[chosen] * xp.exp(-keys[order[r]]))
                chance = xp.where(exceeds > 0, exceeds, chance)  # a row of zeros has no chance, and no effect
            weights = 1 / (factors.normalizer * chance)
        roots = xp.sqrt(weights)
        kernel = gram[chosen, :][:, chosen] * roots[:, None] * roots[None, :]
        return KISEstimate(rows.rows(chosen).scaled(roots).compact(), kernel, count + 1)

    def factorize(self, estimate: KISEstimate, damping: float) -> RowInverse:
        factor = cholesky(add_diagonal(estimate.kernel, check_damping(damping)))
        identity = add_diagonal(namespace(factor).zeros_like(factor), 1.0)
        return RowInverse(estimate.rows, cholesky_solve(factor, identity), damping)

    def solve(self, inverse: RowInverse, gradient: Gradient) -> dict[str, Array]:
        return inverse.solve(gradient)


@dataclass(frozen=True)
class KID(Solver):
    """HyLo's Khatri–Rao interpolative decomposition (Mu et al., SC22): all rows as combinations of the largest.

    Parameters
    ----------
    ratio
        Share of the rows that is kept, in (0, 1].
    sharing
        As for `KIS`.

    Notes
    -----
    Let S be the r rows of largest norm, ``K = J Jᵀ / n``, and ``P = K_S⁺ K`` the least-squares coefficients, shape
    ``(r, N)``, of ``K ≈ K_S P`` for the columns K_S: in the order of norms P = [I, T] with ``T = R₁₁⁻¹ R₁₂`` of an
    unpivoted QR of K, where no rows repeat. With ``J ≈ Pᵀ J_S`` and the residual E of K,

        (F + λI)⁻¹ ≈ (I − J_Sᵀ Z J_S / n) / λ,    Z = (M⁻¹ + K_SS)⁻¹,    M = P (E + λI)⁻¹ Pᵀ,

    which is how Woodbury inverts ``E + λI + Pᵀ K_SS P``. Two differences to public code. It divides K_SS by the
    number of rows kept and K and E by nothing; here all are divided by the same n, so that one λ serves them.
    Its residual ``K − K_S P = (I − Π) K``, Π the projection on the columns K_S, is not symmetric; here it is
    ``(I − Π) K (I − Π)``, so that the curvature is symmetric and every direction one of descent.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    ratio: float = 0.1
    sharing: RowSharing = "exact"

    def __post_init__(self) -> None:
        _check(self.ratio, self.sharing)

    @property
    def of_kronecker_rows(self) -> bool:
        return self.sharing == "reduce"

    def update(self, estimate: KIDEstimate | None, factors: Factors) -> KIDEstimate:
        rows = _shared(factors, self.sharing)
        kernel = rows.gram() / factors.normalizer
        xp = namespace(kernel)
        order = xp.argsort(xp.linalg.diagonal(kernel), descending=True, stable=True)
        chosen = order[: _rank(self.ratio, len(rows))]
        return KIDEstimate(rows.rows(chosen).scaled(factors.normalizer**-0.5).compact(), chosen, kernel)

    def factorize(self, estimate: KIDEstimate, damping: float) -> RowInverse:
        damping, kernel = check_damping(damping), estimate.kernel
        require_finite("entries of the kernel", kernel)
        xp = namespace(kernel)
        columns = kernel[:, estimate.chosen]
        # Rows that repeat leave singular values that are rounding alone.
        inverse = xp.linalg.pinv(columns, rtol=xp.finfo(kernel.dtype).eps ** 0.75)
        rest = add_diagonal(-(columns @ inverse), 1.0)
        residual = cholesky(add_diagonal(rest @ kernel @ rest.T, damping))
        coefficients = inverse @ kernel
        # Z = C (I + Cᵀ K_SS C)⁻¹ Cᵀ for M = C Cᵀ, which may be singular.
        values, vectors = eigh(coefficients @ cholesky_solve(residual, coefficients.T))
        root = vectors * xp.sqrt(values)
        middle = cholesky(add_diagonal(root.T @ columns[estimate.chosen, :] @ root, 1.0))
        return RowInverse(estimate.rows, root @ cholesky_solve(middle, root.T), damping)

    def solve(self, inverse: RowInverse, gradient: Gradient) -> dict[str, Array]:
        return inverse.solve(gradient)


def _check(ratio: float, sharing: str) -> None:
    if not 0 < ratio <= 1:
        raise ConfigurationError(f"the share of rows that is kept must lie in (0, 1], got {ratio!r}")
    check_choice("sharing", sharing, get_args(RowSharing))


def _rank(ratio: float, rows: int) -> int:
    return max(1, round(ratio * rows))


def _shared(factors: Factors, sharing: RowSharing) -> Factors:
    """Rows as they are, or one outer product of mean input and summed cotangent for each."""
    if sharing == "exact":
        return factors
    apart = factors.kronecker_rows("reduce")
    xp = namespace(apart.inputs)
    inputs, cotangents = (xp.permute_dims(rows, (1, 0, 2)) for rows in (apart.inputs, apart.cotangents))
    columns = inputs.shape[0] // cotangents.shape[0]
    if columns > 1:
        # The columns of a lookup are in what its layout calls inputs, times the root of their number.
        inputs, cotangents = inputs / columns**0.5, xp.repeat(cotangents, columns, axis=0)
    return SharedOuter(
        inputs[:, None],
        cotangents.reshape(inputs.shape[0], -1, 1, *cotangents.shape[1:]),
        apart.layout.weight_shape,
        apart.layout.weight,
        apart.layout.bias,
        samples=factors.normalizer,
    )


def _gumbel(like: Array, seed: str) -> Array:
    """Independent Gumbel variables, one a row of `like`: the same in every array library."""
    source = random.Random(seed)
    values = [-math.log(-math.log(max(source.random(), 1e-300))) for _ in range(like.shape[0])]
    return namespace(like).asarray(values, dtype=like.dtype, device=device(like))
