"""A solve in sample space: a right-hand side for the damped kernel, and a natural gradient of its solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from curvlib.arrays import Array, Product, Vector
from curvlib.factors import Factors
from curvlib.factors.scaled import unscaled
from curvlib.factors.together import rmatvecs
from curvlib.solvers.base import Gradient, as_vector, check_block, corrected, sample_space_pays, together_pays

__all__ = ["Combined", "Explicit", "Mean", "System", "naturals", "right_hand_side", "system"]


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of the kernel's own rows J = c · B: ``(K + λI) w = c / n`` and ``Bᵀ w``."""

    rows: Factors  # B
    share: float  # c / n


@dataclass(frozen=True, eq=False)
class Explicit:
    """A gradient g that is written out: ``(K + λI) w = J g`` and ``(g − Jᵀ w / n) / λ``.

    For J = c · B the number c is put off: ``(K + λI) w = B g`` and ``g / λ + m Bᵀ w`` with m = −c² / (n λ).
    """

    rows: Factors  # B
    vector: Vector
    damping: float
    multiple: float  # m


@dataclass(frozen=True, eq=False)
class Combined:
    """A gradient that is the mean of other rows G: as `Explicit`, by one combination of G and J."""

    rows: Factors
    gradient: Factors
    damping: float


System: TypeAlias = Mean | Explicit | Combined
"""What is solved for one block; J are the rows of its inverse, K = J Jᵀ / n."""


def system(rows: Factors, damping: float, gradient: Gradient, own: bool) -> System:
    """What is solved for a gradient of any kind, the cheapest way.

    Parameters
    ----------
    rows, damping
        J and λ of the inverse.
    gradient
        Of the block.
    own
        Whether the kernel is of these rows exactly.

    Raises
    ------
    ConfigurationError
        If the gradient is of another block.
    """
    base, scale = unscaled(rows)
    if gradient is rows and own:
        return Mean(base, scale / rows.normalizer)
    if isinstance(gradient, Factors) and (sample_space_pays(gradient) or together_pays(gradient, rows)):
        return Combined(rows, gradient, damping)
    vector = as_vector(gradient)
    check_block(vector, rows.shapes)
    return Explicit(base, vector, damping, -(scale**2) / (rows.normalizer * damping))


def right_hand_side(one: System) -> Array:
    """Right-hand side of a block's kernel, shape ``(rows,)``."""
    if isinstance(one, Explicit):
        return one.rows.matvec(one.vector)
    if isinstance(one, Mean):
        return one.rows.row_weights(one.share)
    return one.rows.cross_gram(one.gradient) @ one.gradient.row_weights(1 / one.gradient.normalizer)


def naturals(systems: Sequence[System], solutions: Sequence[Array]) -> list[dict[str, Array | Product]]:
    """Natural gradient of each block, from the solution w of its kernel; parts of it may be products."""
    weighted = [(one, w) for one, w in zip(systems, solutions, strict=True) if not isinstance(one, Combined)]
    multiples = [one.multiple if isinstance(one, Explicit) else 1.0 for one, _ in weighted]
    sums = iter(rmatvecs([one.rows for one, _ in weighted], [w for _, w in weighted], multiples))
    results: list[dict[str, Array | Product]] = []
    explicit: dict[float, list[tuple[int, Vector]]] = {}
    for place, (one, w) in enumerate(zip(systems, solutions, strict=True)):
        if isinstance(one, Combined):
            ones = one.gradient.row_weights(1 / (one.gradient.normalizer * one.damping))
            others = w / (-one.rows.normalizer * one.damping)
            results.append(one.gradient.combined_lazily(ones, one.rows, others))
            continue
        results.append(next(sums))
        if isinstance(one, Explicit):
            explicit.setdefault(one.damping, []).append((place, one.vector))
    for damping, some in explicit.items():
        places = [place for place, _ in some]
        made = _added([results[place] for place in places], [vector for _, vector in some], damping)
        for place, natural in zip(places, made, strict=True):
            results[place] = natural
    return results


def _added(
    corrections: Sequence[Mapping[str, Array | Product]], vectors: Sequence[Vector], damping: float
) -> list[dict[str, Array | Product]]:
    """`corrected`, but what is a product takes its part of the gradient along instead."""
    arrays = [
        {name: value for name, value in correction.items() if not isinstance(value, Product)}
        for correction in corrections
    ]
    return [
        {
            name: replace(value, addend=vector[name], multiple=1 / damping)
            if isinstance(value, Product)
            else made[name]
            for name, value in correction.items()
        }
        for correction, vector, made in zip(corrections, vectors, corrected(vectors, arrays, damping), strict=True)
    ]
