"""Inverses that are Kronecker products, at work: on explicit gradients, on rows, and on several blocks in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from curvlib.arrays import Array, altered, device, namespace
from curvlib.factors import Factors, KroneckerLayout
from curvlib.solvers.base import Gradient, as_vector, check_block

__all__ = ["MatrixInverse", "paired_rows", "rows_pay", "solved", "solved_all"]

_SMALL = 1 << 17
"""Elements of both sides up to which copying those of several blocks together costs less than calls for each."""


class MatrixInverse(Protocol):
    """An inverse that acts on the matrices ``[W, b]`` of a block."""

    @property
    def layout(self) -> KroneckerLayout:
        """How the block's parameters form matrices."""

    def stackable(self) -> Mapping[str, Array] | None:
        """Arrays by field, groups first, that make one inverse of several blocks when concatenated; None for none."""

    def apply(self, matrix: Array) -> Array:
        """Return the natural gradient of matrices of shape ``(groups, d_out, d)``."""

    def apply_to_rows(self, inputs: Array, cotangents: Array) -> Array:
        """Natural gradient of ``cotangentsᵀ inputs``, given as rows of shape ``(groups, rows, d)`` and ``d_out``."""


@dataclass(frozen=True)
class _Posed:
    """Matrices of a block that wait for others of their shape."""

    place: int
    inverse: Any
    matrix: Array


def solved(inverse: MatrixInverse, gradient: Gradient) -> dict[str, Array]:
    """Natural gradient of one block, row by row where that is cheaper."""
    if isinstance(gradient, Factors) and rows_pay(gradient):
        return inverse.layout.vector(inverse.apply_to_rows(*paired_rows(gradient)))
    return inverse.layout.vector(inverse.apply(_matrix(inverse, gradient)))


def solved_all(inverses: Sequence[MatrixInverse], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
    """Natural gradients of several blocks, those of small blocks of one shape in one call."""
    results: list[Any] = [None] * len(inverses)
    alike: dict[Any, list[_Posed]] = {}
    for place, (inverse, gradient) in enumerate(zip(inverses, gradients, strict=True)):
        arrays = None if isinstance(gradient, Factors) and rows_pay(gradient) else inverse.stackable()
        if arrays is None:
            results[place] = solved(inverse, gradient)
            continue
        matrix = _matrix(inverse, gradient)
        width = sum(size * size for size in matrix.shape[1:])
        kind = (type(inverse), matrix.shape[1:], matrix.dtype, device(matrix))
        alike.setdefault(kind if width <= _SMALL else place, []).append(_Posed(place, inverse, matrix))
    for posed in alike.values():
        made = [posed[0].inverse.apply(posed[0].matrix)] if len(posed) == 1 else _applied_together(posed)
        for one, matrix in zip(posed, made, strict=True):
            results[one.place] = one.inverse.layout.vector(matrix)
    return results


def _applied_together(posed: Sequence[_Posed]) -> list[Array]:
    """What each inverse makes of its matrices, by one inverse of all their groups."""
    xp = namespace(posed[0].matrix)
    several = [one.inverse.stackable() for one in posed]
    joined = {name: xp.concat([arrays[name] for arrays in several], axis=0) for name in several[0]}
    whole = altered(posed[0].inverse, **joined)
    result, start, made = whole.apply(xp.concat([one.matrix for one in posed], axis=0)), 0, []
    for one in posed:
        made.append(result[start : start + one.matrix.shape[0]])
        start += int(one.matrix.shape[0])
    return made


def _matrix(inverse: MatrixInverse, gradient: Gradient) -> Array:
    vector = as_vector(gradient)
    check_block(vector, inverse.layout.shapes)
    return inverse.layout.matrix(vector)


def rows_pay(factors: Factors) -> bool:
    """Whether a gradient of such rows is cheaper to precondition row by row than explicitly."""
    sizes = factors.outer_sizes
    if sizes is None:
        return False
    n, d_in, d_out = sizes
    return n * (d_in * d_in + d_out * d_out) < d_in * d_out * (d_in + d_out)


def paired_rows(gradient: Factors) -> tuple[Array, Array]:
    """Inputs ``[a, 1]`` and cotangents g, one of each a row; ``gᵀ [a, 1]`` is the gradient that the rows stand for."""
    apart = gradient.kronecker_rows()
    a, g = apart.augmented_inputs(), apart.cotangents
    if a.shape[1] != g.shape[1]:
        # Several columns share an input.
        n = a.shape[1]
        g = g.reshape(g.shape[0], n, -1, g.shape[2]).sum(axis=2)
    return a, g / gradient.normalizer
