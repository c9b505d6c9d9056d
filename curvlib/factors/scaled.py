"""Rows times one number, applied to small results instead of to the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from curvlib.arrays import Array, Product, Vector, altered
from curvlib.factors.base import Factors, Sharing, joint_samples
from curvlib.factors.dense import Dense
from curvlib.factors.kronecker import KroneckerLayout, KroneckerPair, KroneckerRows
from curvlib.factors.plan import BlockPlan

__all__ = ["Scaled", "unscaled"]


@dataclass(frozen=True, eq=False)
class Scaled(Factors):
    """J = scale · B.

    The Gram of B times a number is cheaper than the Gram of rows that were all multiplied first: the rows of a
    convolution are larger than the batch.

    Parameters
    ----------
    base
        B, Factors of any kind. What it stands for as observations does not count here.
    scale
        The number.
    """

    base: Factors
    scale: float

    def applied(self) -> Factors:
        """Return the same rows as Factors of another kind, the number multiplied out."""
        # A number for each row, which Factors do not put off as they do a single one.
        rows = self.base.scaled(self.base.row_weights(self.scale))
        return rows.with_samples(self.normalizer)

    def dense(self) -> Dense:
        return dataclasses.replace(self.base.dense().weighted(self.scale), samples=self.samples)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.base.shapes

    def __len__(self) -> int:
        return len(self.base)

    @property
    def outer_sizes(self) -> tuple[int, int, int] | None:
        return self.base.outer_sizes

    @property
    def like(self) -> Array:
        return self.base.like

    def gram(self) -> Array:
        gram = self.base.gram()
        gram *= self.scale**2
        return gram

    def cross_gram(self, other: Factors) -> Array:
        if isinstance(other, Scaled):
            return self.base.cross_gram(other.base) * (self.scale * other.scale)
        return self.base.cross_gram(other) * self.scale

    def matvec(self, vector: Vector) -> Array:
        return self.base.matvec(vector) * self.scale

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        return self.base.rmatvec(weights * self.scale)

    def combined(self, weights: Array, other: Factors, other_weights: Array) -> dict[str, Array]:
        return self.base.combined(weights * self.scale, other, other_weights)

    def combined_lazily(self, weights: Array, other: Factors, other_weights: Array) -> dict[str, Array | Product]:
        return self.base.combined_lazily(weights * self.scale, other, other_weights)

    def same_inputs(self, other: Factors) -> bool:
        return self.base.same_inputs(other)

    def remembering(self) -> Scaled:
        return altered(self, base=self.base.remembering())

    def covariance(self) -> Array:
        return self.base.covariance() * self.scale**2

    def diagonal(self) -> dict[str, Array]:
        return {name: value * self.scale**2 for name, value in self.base.diagonal().items()}

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        apart = self.base.kronecker_rows(sharing)
        return dataclasses.replace(apart, cotangents=apart.cotangents * self.scale)

    def kronecker_means(self) -> tuple[Array, Array, KroneckerLayout]:
        inputs, cotangents, layout = self.base.kronecker_means()
        return inputs, cotangents * self.scale, layout

    def kronecker(self, sharing: Sharing = "expand") -> KroneckerPair:
        pair = self.base.kronecker(sharing)
        return dataclasses.replace(pair, cotangents=pair.cotangents * self.scale**2)

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        return self.base.rotated_squares(inputs, cotangents) * self.scale**2

    def rows(self, index: Array) -> Scaled:
        return Scaled(self.base.rows(index), self.scale)

    def restricted(self, names: Collection[str]) -> Scaled:
        return dataclasses.replace(self, base=self.base.restricted(names))

    def scaled(self, scale: Array | float) -> Factors:
        if isinstance(scale, float | int):
            return dataclasses.replace(self, scale=self.scale * scale)
        return self.base.scaled(scale * self.scale).with_samples(self.normalizer)

    def add(self, other: Factors) -> Factors:
        if isinstance(other, Scaled) and other.scale == self.scale:
            return dataclasses.replace(self, base=self.base.add(other.base))
        return self.applied().add(other.applied() if isinstance(other, Scaled) else other)

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[Scaled] = [self]
        for other in others:
            if not isinstance(other, Scaled) or other.scale != self.scale:
                return self.applied().cat([one.applied() if isinstance(one, Scaled) else one for one in others])
            parts.append(other)
        base = self.base.cat([part.base for part in parts[1:]])
        return Scaled(base, self.scale, samples=joint_samples(parts))

    def compact(self) -> Factors:
        base = self.base.compact()
        return self if base is self.base else altered(self, base=base)

    def portable(self) -> Scaled:
        return dataclasses.replace(self, base=self.base.portable())

    @property
    def route(self) -> str:
        return self.base.route

    @property
    def exceeds(self) -> bool:
        return self.base.exceeds

    def planned(self, plan: BlockPlan) -> Scaled:
        return altered(self, base=self.base.planned(plan))

    def renamed(self, names: Mapping[str, str]) -> Scaled:
        return dataclasses.replace(self, base=self.base.renamed(names))


def unscaled(factors: Factors) -> tuple[Factors, float]:
    """B and the number of J = number · B."""
    return (factors.base, factors.scale) if type(factors) is Scaled else (factors, 1.0)
