"""Second moments of the mean gradient over either side of its matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from curvlib.arrays import Array, device, eigh, namespace, product, record, side_by_side
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping, check_gradient_rows

__all__ = ["Shampoo", "ShampooEstimate", "ShampooInverse", "gradient_matrix"]


@record
@dataclass(frozen=True, eq=False)
class ShampooEstimate:
    """Estimate: R over inputs, shape ``(groups, d, d)``, and L over cotangents, shape ``(groups, d_out, d_out)``."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout
    count: int


@record
@dataclass(frozen=True, eq=False)
class ShampooInverse:
    """Inverse: ``(R + λI)^−e`` and ``(L + λI)^−e``."""

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout


@dataclass(frozen=True)
class Shampoo(Solver):
    """Shampoo (Gupta, Koren, Singer 2018, arXiv 1802.09568, Algorithm 1) on the matrix [W, b] of a block.

    The statistics are those of the mean gradient that the Factors stand for, so the Factors must come from the loss
    (`Empirical`), at every step if the statistics are to be those of every step (``refresh=1``); the roots may be
    renewed less often.

    Parameters
    ----------
    decay
        Weight of the past in the averages of L and R, bias-corrected; None sums them, as in the paper.
    exponent
        e > 0. The paper's is 1/(2 · order), 1/4 for a matrix; 1/2 gives the units of a natural gradient.

    Notes
    -----
    With G the mean gradient as a matrix, L averages ``G Gᵀ`` and R ``Gᵀ G``, and

        p = (L + λI)^−e [W, b] (R + λI)^−e

    by eigendecompositions; λ is the paper's ε. For λ → ∞ p tends to ``g / λ^2e``. Convolution kernels are matrices
    here, one for each group, not tensors of order four; matrices are not split into blocks. For grafting and momentum
    add transforms.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    of_gradient: ClassVar[bool] = True
    decay: float | None = 0.95
    exponent: float = 0.25

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_decay(self.decay)
        if not 0 < self.exponent < float("inf"):
            raise ConfigurationError(f"the exponent must be a positive finite number, got {self.exponent!r}")

    def update(self, estimate: ShampooEstimate | None, factors: Factors) -> ShampooEstimate:
        matrix, layout = gradient_matrix(factors)
        transposed = namespace(matrix).matrix_transpose(matrix)
        inputs, cotangents = transposed @ matrix, matrix @ transposed
        if estimate is None:
            return ShampooEstimate(inputs, cotangents, layout, 1)
        return ShampooEstimate(
            self._merged(estimate.inputs, estimate.count, inputs),
            self._merged(estimate.cotangents, estimate.count, cotangents),
            layout,
            estimate.count + 1,
        )

    def _merged(self, old: Array, count: int, new: Array) -> Array:
        return old + new if self.decay is None else averaged(old, count, new, self.decay)

    def factorize(self, estimate: ShampooEstimate, damping: float) -> ShampooInverse:
        return self.factorize_all([estimate], [damping])[0]

    def factorize_all(self, estimates: Sequence[ShampooEstimate], dampings: Sequence[float]) -> list[ShampooInverse]:
        sides = [
            (side, check_damping(damping))
            for estimate, damping in zip(estimates, dampings, strict=True)
            for side in (estimate.inputs, estimate.cotangents)
        ]
        roots = side_by_side(self._root, sides, [side.shape[-1] for side, _ in sides], sides[0][0], effort=50)
        return [
            ShampooInverse(roots[2 * place], roots[2 * place + 1], estimate.layout)
            for place, estimate in enumerate(estimates)
        ]

    def _root(self, matrix: Array, damping: float) -> Array:
        values, vectors = eigh(matrix)
        scaled = vectors * ((values + damping) ** -self.exponent)[:, None, :]
        return scaled @ namespace(vectors).matrix_transpose(vectors)

    def solve(self, inverse: ShampooInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        half = product(inverse.cotangents, inverse.layout.matrix(vector))
        return inverse.layout.vector(product(half, inverse.inputs))


def gradient_matrix(factors: Factors) -> tuple[Array, KroneckerLayout]:
    """Mean gradient that rows stand for as matrices [W, b], shape ``(groups, d_out, d)``, and their layout.

    Raises
    ------
    ConfigurationError
        If samples have several rows, or the parameters form no matrix because rows have no Kronecker form.
    """
    check_gradient_rows(factors)
    # One row has the layout of all, without splitting all into inputs and cotangents.
    like = factors.row_weights(0.0)
    xp = namespace(like)
    layout = factors.rows(xp.zeros(1, dtype=xp.int64, device=device(like))).kronecker_rows().layout
    return layout.matrix(as_vector(factors)), layout
