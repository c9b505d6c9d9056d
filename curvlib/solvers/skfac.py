"""Kronecker factors inverted in sample space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, namespace, record
from curvlib.factors import Factors, KroneckerLayout, Sharing
from curvlib.solvers.base import (
    Gradient,
    Solver,
    as_vector,
    check_block,
    check_choice,
    check_damping,
    sample_space_pays,
)
from curvlib.solvers.kfac import split_damping
from curvlib.solvers.pairs import paired_rows

__all__ = ["SKFAC", "SKFACEstimate", "SKFACInverse"]


@record
@dataclass(frozen=True, eq=False)
class SKFACEstimate:
    """Estimate: the rows whose second moments are A and G, the implicit 1 appended.

    Shapes ``(groups, rows, d)`` and ``(groups, rows, d_out)``, scaled so that A = aᵀa and G = gᵀg.
    """

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout


@record
@dataclass(frozen=True, eq=False)
class SKFACInverse:
    """Inverse: the rows, Cholesky factors of their damped kernels, and each factor's share of the damping."""

    inputs: Array
    cotangents: Array
    input_kernel: Array
    cotangent_kernel: Array
    input_damping: Array | float
    cotangent_damping: Array | float
    layout: KroneckerLayout


@dataclass(frozen=True)
class SKFAC(Solver):
    """SKFAC (Tang et al., CVPR 2021): K-FAC of the current batch, each factor inverted by the Woodbury identity.

    The same matrix as ``KFAC(decay=0)`` with the same damping, cheaper where rows are fewer than widths:
    ``(aᵀa + μI)⁻¹ = (I − aᵀ(aaᵀ + μI)⁻¹a) / μ``.

    Parameters
    ----------
    sharing
        "reduce" keeps one row a sample, "expand" one a position.
    balanced
        Whether the damping is split by π as in K-FAC, or evenly.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    sharing: Sharing = "reduce"
    balanced: bool = True

    def __post_init__(self) -> None:
        check_choice("sharing", self.sharing, get_args(Sharing))

    def update(self, estimate: SKFACEstimate | None, factors: Factors) -> SKFACEstimate:
        apart = factors.kronecker_rows(self.sharing)
        inputs = apart.augmented_inputs()
        return SKFACEstimate(inputs / inputs.shape[1] ** 0.5, apart.cotangents / factors.normalizer**0.5, apart.layout)

    def factorize(self, estimate: SKFACEstimate, damping: float) -> SKFACInverse:
        damping = check_damping(damping)
        a, g = estimate.inputs, estimate.cotangents
        mean_a, mean_g = ((rows * rows).sum(axis=(1, 2)) / rows.shape[2] for rows in (a, g))
        left, right = split_damping(mean_a, mean_g, damping, self.balanced)
        transpose = namespace(a).matrix_transpose
        return SKFACInverse(
            a,
            g,
            cholesky(add_diagonal(a @ transpose(a), left)),
            cholesky(add_diagonal(g @ transpose(g), right)),
            left,
            right,
            estimate.layout,
        )

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        return sample_space_pays(factors)

    def solve(self, inverse: SKFACInverse, gradient: Gradient) -> dict[str, Array]:
        if isinstance(gradient, Factors) and sample_space_pays(gradient):
            rows = paired_rows(gradient)
            a, g = rows.augmented_inputs(), rows.cotangents
            transpose = namespace(a).matrix_transpose
            left = _solved(inverse.cotangents, inverse.cotangent_kernel, inverse.cotangent_damping, transpose(g))
            right = _solved(inverse.inputs, inverse.input_kernel, inverse.input_damping, transpose(a))
            return inverse.layout.vector(left @ transpose(right))
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        matrix = inverse.layout.matrix(vector)
        transpose = namespace(matrix).matrix_transpose
        left = _solved(inverse.cotangents, inverse.cotangent_kernel, inverse.cotangent_damping, matrix)
        right = _solved(inverse.inputs, inverse.input_kernel, inverse.input_damping, transpose(left))
        return inverse.layout.vector(transpose(right))


def _solved(rows: Array, kernel: Array, damping: Array | float, rhs: Array) -> Array:
    """``(rowsᵀ rows + μI)⁻¹ rhs`` through the kernel's Cholesky factor."""
    transpose = namespace(rows).matrix_transpose
    return (rhs - transpose(rows) @ cholesky_solve(kernel, rows @ rhs)) / damping
