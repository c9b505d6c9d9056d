"""Inverses that are Kronecker products, at work: on explicit gradients, on rows, and on several blocks in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from curvlib.arrays import Array, Product, altered, device, evaluated, lazily, matrix_vector, namespace, stacked
from curvlib.factors import Factors, KroneckerLayout
from curvlib.factors.kronecker import KroneckerRows
from curvlib.factors.scaled import unscaled
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block

__all__ = ["Halves", "KroneckerSolver", "MatrixInverse", "adjoined", "paired_rows", "rows_pay"]

_SMALL = 1 << 17
"""Elements of both sides up to which copying those of several blocks together costs less than calls for each."""

Halves: TypeAlias = tuple[Array, Array]
"""Two stacks of matrices whose products are meant, shapes ``(groups, d_out, k)`` and ``(groups, k, d)``."""


class MatrixInverse(Protocol):
    """An inverse that acts on the matrices ``[W, b]`` of a block."""

    @property
    def layout(self) -> KroneckerLayout:
        """How the block's parameters form matrices."""

    def stackable(self) -> Mapping[str, Array] | None:
        """Arrays by field, groups first, that make one inverse of several blocks when concatenated; None for none."""

    def apply(self, matrix: Array) -> Halves | Array:
        """Return the natural gradient of matrices of shape ``(groups, d_out, d)``."""

    def apply_to_rows(self, rows: KroneckerRows) -> Halves:
        """Return the natural gradient of ``cotangentsᵀ [inputs, 1]``."""


class KroneckerSolver(Solver):
    """A solver whose `factorize` makes inverses of this kind."""

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        return rows_pay(factors)

    def solve(self, inverse: MatrixInverse, gradient: Gradient) -> dict[str, Array]:
        return evaluated(_solved([inverse], [gradient])[0])

    def solve_all(self, inverses: Sequence[MatrixInverse], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        if not self._inherits(KroneckerSolver, "solve"):
            return super().solve_all(inverses, gradients)
        return [evaluated(natural) for natural in _solved(inverses, gradients)]

    def solve_lazily(
        self, inverses: Sequence[MatrixInverse], gradients: Sequence[Gradient]
    ) -> list[dict[str, Array | Product]]:
        if not self._inherits(KroneckerSolver, "solve", "solve_all", "remember"):
            return super().solve_lazily(inverses, gradients)
        return _solved(inverses, gradients)


@dataclass(frozen=True)
class _Posed:
    """Matrices of a block that wait for others of their shape."""

    place: int
    inverse: Any
    matrix: Array


def adjoined(inverses: Sequence[Any]) -> list[Any]:
    """Inverses as they are; those that can be applied together as parts of one, so that nobody has to copy them."""
    results = list(inverses)
    alike: dict[Any, list[int]] = {}
    for place, inverse in enumerate(inverses):
        arrays = inverse.stackable()
        if arrays is not None and _together(inverse.layout.shape):
            one = next(iter(arrays.values()))
            kind = (type(inverse), *(array.shape for array in arrays.values()), one.dtype, device(one))
            alike.setdefault(kind, []).append(place)
    for places in alike.values():
        if len(places) > 1:
            several = [inverses[place].stackable() for place in places]
            xp = namespace(*several[0].values())
            wholes = {name: xp.stack([arrays[name] for arrays in several]) for name in several[0]}
            for index, place in enumerate(places):
                results[place] = altered(inverses[place], **{name: whole[index] for name, whole in wholes.items()})
    return results


def _together(shape: Sequence[int]) -> bool:
    """Whether matrices of this shape, ``(groups, d_out, d)``, are worth a call with others."""
    return sum(size * size for size in shape[1:]) <= _SMALL


def _solved(inverses: Sequence[MatrixInverse], gradients: Sequence[Gradient]) -> list[dict[str, Array | Product]]:
    """Natural gradients of several blocks: row by row where that is cheaper, small ones of one shape in one call."""
    results: list[Any] = [None] * len(inverses)
    alike: dict[Any, list[_Posed]] = {}
    for place, (inverse, gradient) in enumerate(zip(inverses, gradients, strict=True)):
        if isinstance(gradient, Factors) and rows_pay(gradient):
            results[place] = _vector(inverse.layout, inverse.apply_to_rows(paired_rows(gradient)))
            continue
        matrix = _matrix(inverse, gradient)
        together = _together(matrix.shape) and inverse.stackable() is not None
        kind = (type(inverse), matrix.shape[1:], matrix.dtype, device(matrix))
        alike.setdefault(kind if together else place, []).append(_Posed(place, inverse, matrix))
    for posed in alike.values():
        made = [posed[0].inverse.apply(posed[0].matrix)] if len(posed) == 1 else _applied_together(posed)
        for one, natural in zip(posed, made, strict=True):
            results[one.place] = _vector(one.inverse.layout, natural)
    return results


def _applied_together(posed: Sequence[_Posed]) -> list[Array]:
    """What each inverse makes of its matrices, by one inverse of all their groups."""
    xp = namespace(posed[0].matrix)
    several = [one.inverse.stackable() for one in posed]
    joined = {name: _joined([arrays[name] for arrays in several]) for name in several[0]}
    left, right = altered(posed[0].inverse, **joined).apply(xp.concat([one.matrix for one in posed], axis=0))
    result, start, made = left @ right, 0, []
    for one in posed:
        made.append(result[start : start + one.matrix.shape[0]])
        start += int(one.matrix.shape[0])
    return made


def _joined(arrays: Sequence[Array]) -> Array:
    """Stacks behind each other: where `adjoined` has put them, or a copy."""
    whole = stacked(arrays)
    return whole.reshape(-1, *whole.shape[2:])


def _vector(layout: KroneckerLayout, natural: Halves | Array) -> dict[str, Array | Product]:
    """Block vector of matrices ``[W, b]``; W is left as a product where there is one."""
    if not isinstance(natural, tuple):
        return dict(layout.vector(natural))
    left, right = natural
    if layout.groups > 1 or layout.weight is None:
        return dict(layout.vector(left @ right))
    # Apart, so that nothing has to be taken out of a matrix of both.
    d_in = right.shape[2] - (layout.bias is not None)
    parts: dict[str, Array | Product] = {layout.weight: lazily(left[0], right[0, :, :d_in], tuple(layout.weight_shape))}
    if layout.bias is not None:
        parts[layout.bias] = matrix_vector(left[0], right[0, :, d_in])
    return parts


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


def paired_rows(gradient: Factors) -> KroneckerRows:
    """Inputs a and cotangents g, one of each a row; ``gᵀ [a, 1]`` is the gradient that the rows stand for."""
    base, scale = unscaled(gradient)
    apart = base.kronecker_rows()
    g, n = apart.cotangents, apart.inputs.shape[1]
    if g.shape[1] != n:
        # Several columns share an input.
        g = g.reshape(g.shape[0], n, -1, g.shape[2]).sum(axis=2)
    return replace(apart, cotangents=g * (scale / gradient.normalizer))
