"""Factors made of other Factors: sums of uses, and rows one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from curvlib.arrays import Array, Vector, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors.base import Factors, joint_samples
from curvlib.factors.dense import Dense
from curvlib.factors.plan import BlockPlan

__all__ = ["Sum", "cat"]


@dataclass(frozen=True, eq=False)
class Sum(Factors):
    """Row-wise sum of several Factors over the union of their parameters.

    It serves modules with several weights, whose terms have different parameters, and tied weights, whose uses differ
    in kind or in which parameters they have.

    Parameters
    ----------
    terms
        Factors with the same rows. A parameter that a term lacks counts as zero there.

    Notes
    -----
    ``J = Σ_a J_a`` gives ``J Oᵀ = Σ_ab J_a O_bᵀ``, where only pairs of terms with a common parameter contribute, each
    by the cheapest route of its own kinds. Terms with different parameters have the sum of their Grams.
    """

    terms: tuple[Factors, ...]

    def __post_init__(self) -> None:
        flat = [inner for term in self.terms for inner in (term.terms if isinstance(term, Sum) else (term,))]
        object.__setattr__(self, "terms", tuple(flat))
        counts = [len(term) for term in self.terms]
        if len(set(counts)) != 1:
            raise ConfigurationError(
                f"a sum of factors needs the same rows in every term; the terms have {counts} rows"
            )
        stated = {term.samples for term in self.terms}
        if self.samples is None and len(stated) == 1:
            # What the terms agree on holds for their sum.
            object.__setattr__(self, "samples", stated.pop())
        shapes = self.shapes
        for term in self.terms:
            for name, shape in term.shapes.items():
                if shapes[name] != shape:
                    raise ConfigurationError(
                        f"parameter {name!r} has shape {shape} in one use, {shapes[name]} in another"
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

    @property
    def like(self) -> Array:
        return self.terms[0].like

    def gram(self) -> Array:
        total: Array = 0
        for place, term in enumerate(self.terms):
            total = total + term.gram()
            for other in self.terms[place + 1 :]:
                pair = _common_gram(term, other)
                if pair is not None:
                    total = total + pair + pair.T
        return total

    def cross_gram(self, other: Factors) -> Array:
        self._require_same_block(other)
        pairs = [_common_gram(mine, theirs) for mine in self.terms for theirs in _terms(other)]
        total: Array = 0
        for pair in pairs:
            total = total if pair is None else total + pair
        return total

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

    def diagonal(self) -> dict[str, Array]:
        shapes = self.shapes
        if sum(len(term.shapes) for term in self.terms) != len(shapes):
            return super().diagonal()
        parts = {name: value for term in self.terms for name, value in term.diagonal().items()}
        return {name: parts[name] for name in shapes}

    def rows(self, index: Array) -> Sum:
        return Sum(tuple(term.rows(index) for term in self.terms))

    def scaled(self, scale: Array | float) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.scaled(scale) for term in self.terms))

    def add(self, other: Factors) -> Sum:
        # A term of the same parameters takes the new one in, so that T calls of a cell stay one term a weight.
        terms = list(self.terms)
        for new in _terms(other):
            for place, term in enumerate(terms):
                merged = term.add(new) if term.shapes == new.shapes else new
                if merged is not new and not isinstance(merged, Sum):
                    terms[place] = merged
                    break
            else:
                terms.append(new)
        return dataclasses.replace(self, terms=tuple(terms))

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[Sum] = [self]
        mine = [term.shapes for term in self.terms]
        for other in others:
            if not isinstance(other, Sum) or [term.shapes for term in other.terms] != mine:
                return super().cat(others)
            parts.append(other)
        columns = zip(*(part.terms for part in parts), strict=True)
        return Sum(tuple(cat(column) for column in columns), samples=joint_samples(parts))

    def compact(self) -> Factors:
        compact = [term.compact() for term in self.terms]
        if all(new is old for new, old in zip(compact, self.terms, strict=True)):
            return self
        first, *others = compact
        kept: Factors = Sum((first,), samples=self.samples)
        for term in others:
            kept = kept.add(term)
        return kept

    def portable(self) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.portable() for term in self.terms))

    def restricted(self, names: Collection[str]) -> Factors:
        kept = [term.restricted(term.shapes.keys() & names) for term in self.terms if term.shapes.keys() & names]
        return Sum(tuple(kept), samples=self.samples)

    @property
    def route(self) -> str:
        return "; ".join(dict.fromkeys(term.route for term in self.terms if term.route))

    @property
    def exceeds(self) -> bool:
        return any(term.exceeds for term in self.terms)

    def planned(self, plan: BlockPlan) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.planned(plan) for term in self.terms))

    def renamed(self, names: Mapping[str, str]) -> Sum:
        return dataclasses.replace(self, terms=tuple(term.renamed(names) for term in self.terms))


def _terms(factors: Factors) -> tuple[Factors, ...]:
    return factors.terms if isinstance(factors, Sum) else (factors,)


def _common_gram(left: Factors, right: Factors) -> Array | None:
    """Cross-Gram over the parameters that both have; None if there are none."""
    common = left.shapes.keys() & right.shapes.keys()
    return left.restricted(common).cross_gram(right.restricted(common)) if common else None


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
