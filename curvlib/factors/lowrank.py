"""Rows that are combinations of fewer rows: truncated and interpolated Jacobians."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from curvlib.arrays import Array, Vector, contract, device, eigh, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors.base import Factors, joint_samples
from curvlib.factors.combine import cat
from curvlib.factors.dense import Dense, spread

__all__ = ["LowRank", "truncated"]


@dataclass(frozen=True, eq=False)
class LowRank(Factors):
    """J = U B: every row is a combination of the rows of a basis.

    Parameters
    ----------
    left
        U, shape ``(rows, rank)``.
    basis
        B, Factors of `rank` rows of the same block, of any kind. In a truncated singular value decomposition B is
        diag(S) V.
    """

    left: Array
    basis: Factors

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.left.shape[1] != len(self.basis):
            raise ConfigurationError(
                f"low-rank rows need combinations of shape (rows, {len(self.basis)}), one number for each row of the "
                f"basis; got {tuple(self.left.shape)}"
            )

    def dense(self) -> Dense:
        basis = self.basis.dense()
        values = {
            name: (self.left @ array.reshape(len(basis), -1)).reshape(len(self), *array.shape[1:])
            for name, array in basis.values.items()
        }
        return Dense(values, samples=self.samples)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.basis.shapes

    def __len__(self) -> int:
        return int(self.left.shape[0])

    @property
    def like(self) -> Array:
        return self.left

    def gram(self) -> Array:
        return self.left @ self.basis.gram() @ self.left.T

    def cross_gram(self, other: Factors) -> Array:
        if isinstance(other, LowRank):
            return self.left @ self.basis.cross_gram(other.basis) @ other.left.T
        return self.left @ self.basis.cross_gram(other)

    def matvec(self, vector: Vector) -> Array:
        return self.left @ self.basis.matvec(vector)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        return self.basis.rmatvec(weights @ self.left)

    def covariance(self) -> Array:
        rows = self.basis.dense().matrix()
        return rows.T @ (self.left.T @ self.left) @ rows

    def diagonal(self) -> dict[str, Array]:
        moments = self.left.T @ self.left
        flat = {name: rows.reshape(len(self.basis), -1) for name, rows in self.basis.dense().values.items()}
        shapes = self.shapes
        return {name: contract("rp,rp->p", rows, moments @ rows).reshape(shapes[name]) for name, rows in flat.items()}

    def rows(self, index: Array) -> LowRank:
        return LowRank(self.left[index], self.basis)

    def restricted(self, names: Collection[str]) -> LowRank:
        return dataclasses.replace(self, basis=self.basis.restricted(names))

    def scaled(self, scale: Array | float) -> LowRank:
        return dataclasses.replace(self, left=self.left * spread(scale, (len(self),), 2))

    def add(self, other: Factors) -> Factors:
        if not isinstance(other, LowRank) or self.shapes != other.shapes or len(self) != len(other):
            return super().add(other)
        left = namespace(self.left).concat([self.left, other.left], axis=1)
        return LowRank(left, cat([self.basis, other.basis]), samples=self.samples)

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[LowRank] = [self]
        for other in others:
            if not isinstance(other, LowRank):
                return super().cat(others)
            self._require_same_block(other)
            parts.append(other)
        xp = namespace(self.left)
        ranks = [len(part.basis) for part in parts]
        blocks = [
            [xp.zeros((len(part), rank), dtype=part.left.dtype, device=device(part.left)) for rank in ranks]
            for part in parts
        ]
        for place, part in enumerate(parts):
            blocks[place][place] = part.left
        left = xp.concat([xp.concat(line, axis=1) for line in blocks], axis=0)
        return LowRank(left, cat([part.basis for part in parts]), samples=joint_samples(parts))

    def portable(self) -> LowRank:
        return dataclasses.replace(self, basis=self.basis.portable())

    def renamed(self, names: Mapping[str, str]) -> LowRank:
        return dataclasses.replace(self, basis=self.basis.renamed(names))


def truncated(factors: Factors, share: float, gram: Array | None = None) -> LowRank:
    """Rows projected on the leading left singular vectors of J.

    Parameters
    ----------
    factors
        The rows J.
    share
        γ in (0, 1): the largest rank r with ``S_1 + … + S_r ≤ γ (S_1 + … + S_rank)`` is kept, and at least 1.
    gram
        J Jᵀ, where it is known already.

    Raises
    ------
    NotPositiveDefiniteError
        If the rows are not finite.

    Notes
    -----
    With J Jᵀ = U S² Uᵀ, the truncation ``U_r S_r V_r`` is ``U_r (U_rᵀ J)``: only a rows × rows matrix is decomposed,
    and nothing is divided by a singular value. In float32, singular values below about 1e-3 of the largest are
    rounding.
    """
    if not 0 < share < 1:
        raise ConfigurationError(f"the share of singular values kept must lie strictly in (0, 1), got {share!r}")
    squares, vectors = eigh(factors.gram() if gram is None else gram)
    xp = namespace(vectors)
    singular = xp.flip(xp.sqrt(squares), axis=0)
    kept = max(1, int(xp.sum(xp.cumulative_sum(singular) <= share * xp.sum(singular))))
    left = xp.flip(vectors, axis=1)[:, :kept]
    basis = {
        name: (left.T @ rows.reshape(len(factors), -1)).reshape(kept, *rows.shape[1:])
        for name, rows in factors.dense().values.items()
    }
    return LowRank(left, Dense(basis), samples=factors.normalizer)
