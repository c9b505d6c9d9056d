"""Factors made of other Factors: sums of uses, and rows one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvlib.arrays import Array, Vector, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors.base import Factors
from curvlib.factors.dense import Dense

__all__ = ["Sum", "cat"]


@dataclass(frozen=True, eq=False)
class Sum(Factors):
    """Row-wise sum of several Factors over the union of their parameters.

    It serves tied weights whose uses differ in kind or in which parameters they have.

    Parameters
    ----------
    terms
        Factors with the same rows. A parameter that a term lacks counts as zero there.
    """

    terms: tuple[Factors, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        counts = [len(term) for term in self.terms]
        if len(set(counts)) != 1:
            raise ConfigurationError(
                f"a sum of factors needs the same rows in every term; the terms have {counts} rows"
            )
        for term in self.terms:
            for name, shape in term.shapes.items():
                if self.shapes[name] != shape:
                    raise ConfigurationError(
                        f"parameter {name!r} has shape {shape} in one use, {self.shapes[name]} in another"
                    )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        merged: dict[str, tuple[int, ...]] = {}
        for term in self.terms:
            for name, shape in term.shapes.items():
                merged.setdefault(name, shape)
        return merged

    def __len__(self) -> int:
        return len(self.terms[0])

    def dense(self) -> Dense:
        values: dict[str, Array] = {}
        for term in self.terms:
            for name, rows in term.dense().values.items():
                values[name] = values[name] + rows if name in values else rows
        return Dense({name: values[name] for name in self.shapes}, samples=self.samples)

    def row_weights(self, value: float) -> Array:
        return self.terms[0].row_weights(value)

    def matvec(self, vector: Vector) -> Array:
        total = self.terms[0].matvec(vector)
        for term in self.terms[1:]:
            total = total + term.matvec(vector)
        return total

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        result: dict[str, Array] = {}
        for term in self.terms:
            for name, value in term.rmatvec(weights).items():
                result[name] = result[name] + value if name in result else value
        return {name: result[name] for name in self.shapes}

    def rows(self, index: Array) -> Sum:
        return Sum(tuple(term.rows(index) for term in self.terms))

    def scaled(self, scale: Array | float) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.scaled(scale) for term in self.terms))

    def add(self, other: Factors) -> Sum:
        return dataclasses.replace(self, terms=(*self.terms, other))

    def compact(self) -> Factors:
        return self.dense()

    def renamed(self, names: Mapping[str, str]) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.renamed(names) for term in self.terms))


def cat(parts: Sequence[Factors]) -> Factors:
    """Rows of all `parts` one after the other; the observations that they stand for add up.

    Raises
    ------
    ConfigurationError
        If there are no parts, or they belong to different blocks.
    """
    if not parts:
        raise ConfigurationError("cat needs at least one Factors")
    return parts[0] if len(parts) == 1 else parts[0].cat(parts[1:])


def stack_columns(columns: Sequence[Factors]) -> Factors:
    """Interleave Factors of one column each, the same samples, into sample-major rows."""
    if len(columns) == 1:
        return columns[0]
    dense = [column.dense() for column in columns]
    values = {}
    for name in dense[0].values:
        stacked = namespace(*dense[0].values.values()).stack([part.values[name] for part in dense], axis=1)
        values[name] = stacked.reshape(-1, *stacked.shape[2:])
    return Dense(values, samples=columns[0].samples)
