"""Kronecker eigenbasis with re-estimated second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from curvlib.arrays import Array, device, eigh, namespace, qr, record, side_by_side
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors, KroneckerLayout, Sharing
from curvlib.solvers.average import averaged, check_decay
from curvlib.solvers.base import check_choice, check_damping
from curvlib.solvers.kfac import KFACEigen, KFACEstimate, averaged_factors
from curvlib.solvers.pairs import KroneckerSolver, adjoined

__all__ = ["EKFAC", "EKFACEstimate"]

EKFACBasis = Literal["eigh", "qr"]


@record
@dataclass(frozen=True, eq=False)
class EKFACEstimate:
    """Estimate: K-FAC's factors, their eigenvectors at the last change of basis, and the moments in that basis.

    Parameters
    ----------
    factors
        K-FAC's estimate.
    inputs, cotangents
        Q_A, shape ``(groups, d, d)``, and Q_G, shape ``(groups, d_out, d_out)``.
    moments
        Average of the squared entries of rotated rows, shape ``(groups, d_out, d)``.
    count
        Updates since the last change of basis.
    """

    factors: KFACEstimate
    inputs: Array
    cotangents: Array
    moments: Array
    count: int

    @property
    def layout(self) -> KroneckerLayout:
        """How the block's parameters form matrices."""
        return self.factors.layout


@dataclass(frozen=True)
class EKFAC(KroneckerSolver):
    """EKFAC (George et al. 2018, arXiv 1806.03884): the best diagonal in K-FAC's eigenbasis.

    Parameters
    ----------
    sharing, decay
        As in `KFAC`.
    basis_every
        Updates between changes of the eigenbasis; the moments are renewed at every update, and start anew with the
        basis.
    basis
        How the basis changes: "eigh", to the eigenvectors of A and G; "qr", by one step of orthogonal iteration from
        the basis before, ``Q ← QR(A Q)`` with columns in the order of ``diag(Qᵀ A Q)``, which follows the eigenvectors
        for less (as SOAP does, Vyas et al. 2024, arXiv 2409.11321, Algorithm 4). The first is always by eigh.

    Notes
    -----
    With A = Q_A S_A Q_Aᵀ, G = Q_G S_G Q_Gᵀ and rows W_i, the moments are ``mean_i (Q_Gᵀ W_i Q_A)²`` (eq. 8 there), the
    diagonal of the true block in this basis; damping is added to them.
    """

    exact: ClassVar[bool] = False
    holds_rows: ClassVar[bool] = False
    of_kronecker_rows: ClassVar[bool] = True
    sharing: Sharing = "expand"
    decay: float = 0.95
    basis_every: int = 1
    basis: EKFACBasis = "eigh"

    def __post_init__(self) -> None:
        check_decay(self.decay)
        check_choice("basis", self.basis, get_args(EKFACBasis))
        check_choice("sharing", self.sharing, get_args(Sharing))
        if self.basis_every < 1:
            raise ConfigurationError(f"basis_every must be at least 1, got {self.basis_every!r}")

    def update(self, estimate: EKFACEstimate | None, factors: Factors) -> EKFACEstimate:
        return self.update_all([estimate], [factors])[0]

    def update_all(self, estimates: Sequence[EKFACEstimate | None], factors: Sequence[Factors]) -> list[EKFACEstimate]:
        pairs = [
            averaged_factors(None if estimate is None else estimate.factors, rows, self.sharing, self.decay)
            for estimate, rows in zip(estimates, factors, strict=True)
        ]
        # A and G of all blocks whose basis is due, each with the basis to follow it from.
        sides: dict[tuple[int, str], tuple[Array, Array | None]] = {}
        for place, (estimate, pair) in enumerate(zip(estimates, pairs, strict=True)):
            if estimate is None or estimate.count >= self.basis_every:
                for side in ("inputs", "cotangents"):
                    before = None if estimate is None or self.basis == "eigh" else getattr(estimate, side)
                    sides[place, side] = getattr(pair, side), before
        widths = [matrix.shape[-1] for matrix, _ in sides.values()]
        made = side_by_side(
            _basis, list(sides.values()), widths, pairs[0].inputs, effort=50 if self.basis == "eigh" else 10
        )
        bases = dict(zip(sides, made, strict=True))
        result = []
        for place, (estimate, pair, rows) in enumerate(zip(estimates, pairs, factors, strict=True)):
            moments, count = None, 0
            if (place, "inputs") in bases:
                Q_A, Q_G = bases[place, "inputs"], bases[place, "cotangents"]
            else:
                assert estimate is not None  # else its basis was due
                Q_A, Q_G, moments, count = estimate.inputs, estimate.cotangents, estimate.moments, estimate.count
            fresh = rows.rotated_squares(Q_A, Q_G) / rows.normalizer
            result.append(EKFACEstimate(pair, Q_A, Q_G, averaged(moments, count, fresh, self.decay), count + 1))
        return result

    def factorize(self, estimate: EKFACEstimate, damping: float) -> KFACEigen:
        reciprocals = 1 / (estimate.moments + check_damping(damping))
        return KFACEigen(estimate.inputs, estimate.cotangents, reciprocals, estimate.layout)

    def factorize_all(self, estimates: Sequence[EKFACEstimate], dampings: Sequence[float]) -> list[KFACEigen]:
        made = super().factorize_all(estimates, dampings)
        return adjoined(made) if self._inherits(EKFAC, "factorize") else made


def _basis(matrix: Array, before: Array | None) -> Array:
    """Eigenvectors, or what follows them from the basis before, shape ``(groups, d, d)``."""
    return eigh(matrix)[1] if before is None else _followed(matrix, before)


def _followed(matrix: Array, basis: Array) -> Array:
    """Basis after one step of orthogonal iteration, shape ``(groups, d, d)``.

    Columns are sorted first, those of large eigenvalues before the others: in this order alone the iteration leaves an
    eigenbasis where it is when the matrix changes a little.
    """
    xp = namespace(matrix)
    image = matrix @ basis
    order = xp.argsort((basis * image).sum(axis=1), axis=1, descending=True)
    group = xp.arange(order.shape[0], device=device(matrix))[:, None]
    return qr(xp.matrix_transpose(xp.matrix_transpose(image)[group, order]))[0]
