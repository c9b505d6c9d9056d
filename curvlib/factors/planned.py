"""Rows that ask a plan for their routes, and how they are taken in parts where it limits memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from typing_extensions import Self

from curvlib.arrays import TRANSIENT, Array, altered, namespace
from curvlib.factors import cost
from curvlib.factors.base import Factors, Sharing
from curvlib.factors.kronecker import KroneckerPair
from curvlib.factors.plan import BlockPlan

__all__ = ["Planned", "blocks", "joint_pair", "slices", "total", "total_vector"]


@dataclass(frozen=True, eq=False)
class Planned(Factors):
    """Factors whose explicit rows may be much larger than what they are made of.

    Parameters
    ----------
    plan
        Chooses between routes and limits memory; None for the cost model's choices and no limit.
    """

    plan: BlockPlan | None = field(default=None, kw_only=True, repr=False, metadata=TRANSIENT)

    @property
    @abstractmethod
    def sizes(self) -> cost.Sizes:
        """The sizes that decide which route is cheapest."""

    @abstractmethod
    def of_samples(self, samples: slice) -> Self:
        """Rows of some samples."""

    def planned(self, plan: BlockPlan) -> Self:
        return altered(self, plan=plan)

    def limit(self, other: Factors | None = None) -> int | None:
        """Elements that the plan, or that of `other` where there is none, allows an array; None for no limit."""
        plan = self.plan_with(other)
        return None if plan is None else plan.limit(self.like)

    def gram_limit(self, other: Factors) -> int | None:
        """Elements that an array on the way to a cross-Gram may have: no fewer than the cross-Gram itself."""
        limit = self.limit(other)
        return None if limit is None else max(limit, len(self) * len(other))

    def sharing_plan(self, other: Factors) -> Self:
        """These rows, with the plan of `other` where they have none."""
        plan = self.plan_with(other)
        return self if plan is self.plan or plan is None else self.planned(plan)

    def plan_with(self, other: Factors | None) -> BlockPlan | None:
        """The plan, or that of `other` where there is none."""
        return other.plan if self.plan is None and isinstance(other, Planned) else self.plan

    @property
    def exceeds(self) -> bool:
        return self.exceeds_with(None)

    def exceeds_with(self, other: Factors | None) -> bool:
        """Whether explicit rows, or those of `other`, are more than the limit allows."""
        limit = self.limit(other)
        if limit is None:
            return False
        return any(one.size * len(one) > limit for one in (self, other) if isinstance(one, Planned))

    def in_parts(self, a_sample: int, limit: int | None) -> list[Self]:
        """These rows, or parts of their samples for which arrays with so many elements a sample are within a limit."""
        n = self.sizes.n
        if limit is None or n * a_sample <= limit:
            return [self]
        step = max(1, limit // max(1, a_sample))
        whole = self if self.plan is None else self.planned(self.plan.apart())
        return [whole.of_samples(slice(start, start + step)) for start in range(0, n, step)]

    def explicit_parts(self, limit: int | None) -> list[Self]:
        """These rows, or parts of their samples whose explicit rows are within a limit."""
        return self.in_parts(self.size * self.sizes.columns, limit)

    def covariance(self) -> Array:
        return total(part.dense().covariance() for part in self.explicit_parts(self.limit()))

    def diagonal(self) -> dict[str, Array]:
        return total_vector(part.dense().diagonal() for part in self.explicit_parts(self.limit()))


def blocks(left: Sequence[Factors], right: Sequence[Factors], product: Callable[..., Array]) -> Array:
    """Array whose blocks are the products of all pairs of `left` and `right`."""
    strips = []
    for one in left:
        strip = [product(one, other) for other in right]
        strips.append(strip[0] if len(strip) == 1 else namespace(*strip).concat(strip, axis=1))
    return strips[0] if len(strips) == 1 else namespace(*strips).concat(strips, axis=0)


def slices(elements: int, *axes: int) -> Iterator[tuple[slice, ...]]:
    """Parts of an array that have so many elements at most, or one, whole along the last axes if possible."""
    steps = cost.steps(elements, axes[::-1])[::-1]
    starts = [range(0, size, step) for size, step in zip(axes, steps, strict=True)]
    for place in itertools.product(*starts):
        yield tuple(slice(start, start + step) for start, step in zip(place, steps, strict=True))


def total(arrays: Iterable[Array]) -> Array:
    """Sum of arrays, one at a time; the only one is returned as it is."""
    return functools.reduce(operator.add, arrays)


def total_vector(vectors: Iterable[dict[str, Array]]) -> dict[str, Array]:
    """Sum of block vectors, as `total`."""
    return functools.reduce(lambda one, other: {name: one[name] + other[name] for name in one}, vectors)


def joint_pair(parts: Sequence[Planned], sharing: Sharing) -> KroneckerPair:
    """Kronecker factors of rows from those of parts of their samples."""
    n = sum(part.sizes.n for part in parts)

    def pair(part: Planned) -> KroneckerPair:
        one = part.kronecker(sharing)
        return dataclasses.replace(one, inputs=one.inputs * (part.sizes.n / n))

    def added(one: KroneckerPair, other: KroneckerPair) -> KroneckerPair:
        return KroneckerPair(one.inputs + other.inputs, one.cotangents + other.cotangents, one.layout)

    return functools.reduce(added, map(pair, parts))
