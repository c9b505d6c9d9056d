"""Adam in the eigenbasis of Shampoo's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from curvlib.arrays import Array, device, eigh, namespace, product, record, side_by_side
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping, check_finite
from curvlib.solvers.shampoo import gradient_matrix

__all__ = ["SOAP", "SOAPEstimate", "SOAPInverse"]


@record
@dataclass(frozen=True, eq=False)
class SOAPEstimate:
    """Estimate: Shampoo's statistics, the basis of the present step, and Adam's two moments.

    Parameters
    ----------
    inputs, cotangents
        Averages R of ``Gᵀ G``, shape ``(groups, d, d)``, and L of ``G Gᵀ``, shape ``(groups, d_out, d_out)``; None for
        a side that is too wide.
    input_basis, cotangent_basis
        Q_R and Q_L for the present step, from L and R before its gradient; None where a side is left as it is.
    squares
        Average of ``(Q_Lᵀ G Q_R)²``, shape ``(groups, d_out, d)``.
    past
        Average of the gradients before the last, as matrices [W, b]; None if there are none.
    last
        The last gradient.
    layout
        How the parameters form matrices.
    count
        Gradients that Adam has seen: all but the very first.
    """

    inputs: Array | None
    cotangents: Array | None
    input_basis: Array | None
    cotangent_basis: Array | None
    squares: Array
    past: Array | None
    last: Array
    layout: KroneckerLayout
    count: int


@record
@dataclass(frozen=True, eq=False)
class SOAPInverse:
    """Inverse: the basis, the reciprocals ``1 / (√v + λ)`` in it, and the average of the gradients before this one."""

    input_basis: Array | None
    cotangent_basis: Array | None
    reciprocals: Array
    past: Array | None
    layout: KroneckerLayout
    count: int


@dataclass(frozen=True)
class SOAP(Solver):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321, Algorithm 3): Adam in the eigenbasis of `Shampoo`'s statistics.

    The statistics are those of the mean gradient that the Factors stand for, so the Factors must come from the loss
    (`Empirical`) at every step (``refresh=1``): Adam's moments see a gradient when `update` does.

    Parameters
    ----------
    momentum
        β₁ in [0, 1): weight of the past in the average of gradients, which is part of the method: no transform adds it.
    decay
        β₂ in [0, 1): weight of the past in the averages of L, R and of the squares.
    basis_every
        Steps between changes of the basis.
    largest
        A side of the matrix that is wider (a vocabulary, as a rule) keeps its own basis.
    skip_first
        Whether the first step is zero, as in the authors' code, instead of Adam's.

    Notes
    -----
    With G the mean gradient as a matrix, L averages ``G Gᵀ`` and R ``Gᵀ G``. Step t works in a basis made of the
    gradients before it, never of its own, in which its gradient would be diagonal:

        v ← β₂ v + (1 − β₂) (Q_Lᵀ G Q_R)²,    m ← β₁ m + (1 − β₁) G,    p = Q_L ((Q_Lᵀ m Q_R) / (√v + λ)) Q_Rᵀ,

    with Adam's bias correction of m and v; λ is Adam's ε (after the correction of v; the authors add it before). The
    average m is kept in the parameters' own coordinates, so it follows every change of basis.

    The first gradient has no basis before it: it only starts L and R, and the first step is Adam's own, in the
    parameters' coordinates. From the second step on Q_L and Q_R are eigenvectors of L and R; they are renewed every
    `basis_every` steps by one power iteration and a QR decomposition (Algorithm 4), columns and v sorted by their
    estimated eigenvalues, v otherwise kept.

    `solve` takes the gradient that it is given as the newest in m, and the averages that `update` made for the rest, so
    it may be called any number of times. Convolution kernels are matrices here, one for each group, and a bias is a
    column of its weight's; the authors treat tensors of any order and leave vectors to Adam.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    of_gradient: ClassVar[bool] = True
    momentum: float = 0.95
    decay: float = 0.95
    basis_every: int = 10
    largest: int = 10_000
    skip_first: bool = False

    def __post_init__(self) -> None:
        check_decay(self.momentum)
        check_decay(self.decay)
        if self.basis_every < 1:
            raise ConfigurationError(f"basis_every must be at least 1, got {self.basis_every!r}")
        if self.largest < 0:
            raise ConfigurationError(f"largest is a width, at least 0, got {self.largest!r}")

    def update(self, estimate: SOAPEstimate | None, factors: Factors) -> SOAPEstimate:
        return self.update_all([estimate], [factors])[0]

    def update_all(self, estimates: Sequence[SOAPEstimate | None], factors: Sequence[Factors]) -> list[SOAPEstimate]:
        older = [estimate for estimate in estimates if estimate is not None]
        widths = [max(one.squares.shape) if one.count % self.basis_every == 0 else 0 for one in older]
        given = [(one,) for one in older]
        bases = iter(side_by_side(self._basis, given, widths, older[0].squares, effort=20) if older else [])
        result = []
        for estimate, rows in zip(estimates, factors, strict=True):
            matrix, layout = gradient_matrix(rows)
            result.append(self._updated(estimate, matrix, layout, None if estimate is None else next(bases)))
        return result

    def _updated(
        self, estimate: SOAPEstimate | None, matrix: Array, layout: KroneckerLayout, bases: _Bases | None
    ) -> SOAPEstimate:
        """Estimate after a mean gradient, in the bases of its step."""
        transposed = namespace(matrix).matrix_transpose(matrix)
        inputs = transposed @ matrix if matrix.shape[2] <= self.largest else None
        cotangents = matrix @ transposed if matrix.shape[1] <= self.largest else None
        if estimate is None or bases is None:
            return SOAPEstimate(inputs, cotangents, None, None, matrix * matrix, None, matrix, layout, 0)
        Q_R, Q_L, squares = bases
        rotated = _rotated(matrix, Q_R, Q_L)
        seen = estimate.count
        return SOAPEstimate(
            self._averaged(estimate.inputs, seen + 1, inputs),
            self._averaged(estimate.cotangents, seen + 1, cotangents),
            Q_R,
            Q_L,
            averaged(squares, seen, rotated * rotated, self.decay),
            averaged(estimate.past, seen - 1, estimate.last, self.momentum) if seen else None,
            matrix,
            layout,
            seen + 1,
        )

    def _averaged(self, old: Array | None, count: int, new: Array | None) -> Array | None:
        return None if new is None else averaged(old, count, new, self.decay)

    def _basis(self, estimate: SOAPEstimate) -> _Bases:
        """Q_R, Q_L and the squares in this basis (None before there are any) for the step after `estimate`."""
        if estimate.count == 0:
            return _eigenbasis(estimate.inputs), _eigenbasis(estimate.cotangents), None
        Q_R, Q_L, squares = estimate.input_basis, estimate.cotangent_basis, estimate.squares
        if estimate.count % self.basis_every == 0:
            transpose = namespace(squares).matrix_transpose
            Q_L, squares = _renewed(estimate.cotangents, Q_L, squares)
            Q_R, squares = _renewed(estimate.inputs, Q_R, transpose(squares))
            squares = transpose(squares)
        return Q_R, Q_L, squares

    def factorize(self, estimate: SOAPEstimate, damping: float) -> SOAPInverse:
        damping = check_damping(damping)
        check_finite(squared_gradients=estimate.squares)
        reciprocals = 1 / (namespace(estimate.squares).sqrt(estimate.squares) + damping)
        if self.skip_first and estimate.count == 0:
            reciprocals = 0 * reciprocals
        basis = estimate.input_basis, estimate.cotangent_basis
        return SOAPInverse(*basis, reciprocals, estimate.past, estimate.layout, estimate.count)

    def solve(self, inverse: SOAPInverse, gradient: Gradient) -> dict[str, Array]:
        vector = as_vector(gradient)
        check_block(vector, inverse.layout.shapes)
        mean = averaged(inverse.past, inverse.count - 1, inverse.layout.matrix(vector), self.momentum)
        Q_R, Q_L = inverse.input_basis, inverse.cotangent_basis
        scaled = _rotated(mean, Q_R, Q_L) * inverse.reciprocals
        return inverse.layout.vector(_rotated(scaled, _transposed(Q_R), _transposed(Q_L)))


_Bases = tuple[Array | None, Array | None, Array | None]


def _transposed(matrix: Array | None) -> Array | None:
    return None if matrix is None else namespace(matrix).matrix_transpose(matrix)


def _rotated(matrix: Array, Q_R: Array | None, Q_L: Array | None) -> Array:
    """``Q_Lᵀ M Q_R``; a side without a basis stays as it is."""
    left = matrix if Q_L is None else product(namespace(Q_L).matrix_transpose(Q_L), matrix)
    return left if Q_R is None else product(left, Q_R)


def _eigenbasis(matrix: Array | None) -> Array | None:
    """Eigenvectors, those of the largest eigenvalues first."""
    if matrix is None:
        return None
    return namespace(matrix).flip(eigh(matrix)[1], axis=2)


def _renewed(matrix: Array | None, basis: Array | None, squares: Array) -> tuple[Array | None, Array]:
    """Basis after one power iteration and QR, and `squares` with its middle axis sorted like the basis.

    Parameters
    ----------
    matrix, basis
        Statistics and their approximate eigenvectors, shape ``(groups, d, d)``; None leaves everything as it is.
    squares
        Shape ``(groups, d, other side)``.
    """
    if matrix is None or basis is None:
        return basis, squares
    xp = namespace(matrix)
    image = matrix @ basis
    order = xp.argsort((basis * image).sum(axis=1), axis=1, descending=True)
    group = xp.arange(order.shape[0], device=device(matrix))[:, None]
    image = xp.matrix_transpose(xp.matrix_transpose(image)[group, order])
    return xp.linalg.qr(image)[0], squares[group, order]
