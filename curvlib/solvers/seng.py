"""Sketched Woodbury: kernel and products from a sample of the columns of J."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from curvlib.arrays import (
    Array,
    Vector,
    add_diagonal,
    cholesky,
    cholesky_solve,
    device,
    eigh,
    is_finite,
    namespace,
    record,
)
from curvlib.errors import ConfigurationError
from curvlib.factors import Dense, Factors, KroneckerLayout, OneHotOuter, SharedOuter, Sum
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping, corrected
from curvlib.solvers.dense import flatten

__all__ = ["SENG", "SENGEstimate", "SENGInverse", "SidesSketch", "Sketch"]

_TEMPORARY = 1 << 24
"""Elements of explicit rows to make at a time."""


@record
@dataclass(frozen=True, eq=False)
class Sketch:
    """Columns of J at positions `index`, shape ``(rows, s)``, times parameters / s."""

    columns: Array
    index: Array

    def products(self, vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> Array:
        """J g on average, shape ``(rows,)``."""
        return self.columns @ flatten(vector, shapes)[self.index]


@record
@dataclass(frozen=True, eq=False)
class SidesSketch:
    """Columns of J where sampled outputs and inputs of [W, b] cross: rows of such matrices, times all / sampled."""

    rows: Factors
    outputs: Array
    inputs: Array
    layout: KroneckerLayout

    def products(self, vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> Array:
        """J g on average, shape ``(rows,)``."""
        matrix = self.layout.matrix(vector)[:, self.outputs, :][:, :, self.inputs]
        ((name, shape),) = self.rows.shapes.items()
        return self.rows.matvec({name: matrix.reshape(shape)})


@record
@dataclass(frozen=True, eq=False)
class SENGEstimate:
    """Estimate: all rows, the sketch (None where the block is no larger than one), the kernel, number of updates."""

    factors: Factors
    sketch: Sketch | SidesSketch | None
    kernel: Array
    count: int


@record
@dataclass(frozen=True, eq=False)
class SENGInverse:
    """Inverse: all rows, the sketch, the Cholesky factor of the damped kernel."""

    factors: Factors
    sketch: Sketch | SidesSketch | None
    factor: Array
    damping: float


@dataclass(frozen=True)
class SENG(Solver):
    """SENG (Yang et al. 2020, arXiv 2006.05924): sketched empirical natural gradient.

    Rows of any Fisher will do; the paper takes the empirical one.

    Parameters
    ----------
    columns
        s, how many of a block's P parameters are sampled (the authors: 256²). A block of no more is solved exactly.
    implicit
        A block of more parameters than this (the authors: 10⁶), whose rows are sums of products of inputs and
        cotangents, is never made explicit: the positions of each row are reduced to `rank`, and outputs and inputs
        are sampled apart, √s of each.
    rank
        Positions that such a row keeps.
    seed
        Chooses the sample, with the number of updates so far.

    Notes
    -----
    With s columns J_S drawn without replacement, uniformly, at every update,

        p = (g − Jᵀ (K̂ + λI)⁻¹ v̂ / n) / λ,   K̂ = (P / s) J_S J_Sᵀ / n,   v̂ = (P / s) J_S g_S:

    K̂ and v̂ are J Jᵀ / n and J g on average, and the last product is that of the whole J. The authors' code multiplies
    both factors of each product by P / s, which makes K̂ and v̂ too large by that number. With a small sample p need not
    be a direction of descent.

    Of implicit blocks a row is G X for the cotangents G of its sample, shape ``(d_out, positions)``, and the inputs
    X (with a 1 for the bias), of which ``G V Vᵀ X`` is kept, V the first right singular vectors of G: as many positions
    as the rank. J stands for these rows from there on. The authors also replace the last product,
    ``Σ w_i G_i X_i``, by the one product ``(Σ √|w_i| G_i) (Σ w_i / √|w_i| X_i)``. That pairs every sample with
    every other and depends on the signs that a library gives to singular vectors, so it is left out: the exact product
    costs a weight gradient, of fewer positions.

    Lookups, and rows of other kinds, have explicit rows made a few at a time, for their sample alone.
    """

    exact: ClassVar[bool] = False
    columns: int = 65536
    seed: int = 0
    implicit: int = 1_000_000
    rank: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:
            raise ConfigurationError(f"SENG samples at least one column, as an integer, got columns={self.columns!r}")
        for name, value in (("implicit", self.implicit), ("rank", self.rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be an integer of at least 1, got {value!r}")

    def update(self, estimate: SENGEstimate | None, factors: Factors) -> SENGEstimate:
        count = 0 if estimate is None else estimate.count
        if factors.size > max(self.columns, self.implicit):
            sides = _sides(factors)
            if sides is not None:
                return self._implicit(factors, *sides, count)
        kept = factors.compact()
        if factors.size <= self.columns:
            return SENGEstimate(kept, None, kept.gram() / factors.normalizer, count + 1)
        like = factors.row_weights(0.0)
        drawn = sorted(random.Random(f"{self.seed}/{count}").sample(range(factors.size), self.columns))
        index = namespace(like).asarray(drawn, device=device(like))
        columns = _columns(kept, index)
        ratio = factors.size / self.columns
        kernel = columns @ columns.T * (ratio / factors.normalizer)
        return SENGEstimate(kept, Sketch(columns * ratio, index), kernel, count + 1)

    def _implicit(
        self, factors: Factors, inputs: Array, cotangents: Array, layout: KroneckerLayout, count: int
    ) -> SENGEstimate:
        inputs, cotangents = _truncated(inputs, cotangents, self.rank)
        source, side, chosen = random.Random(f"{self.seed}/{count}"), isqrt(self.columns), []
        for size in (cotangents.shape[3], inputs.shape[3]):
            drawn = sorted(source.sample(range(size), min(side, size)))
            chosen.append(namespace(inputs).asarray(drawn, device=device(inputs)))
        outputs, places = chosen
        rows, groups = inputs.shape[0], inputs.shape[2]
        ratio = cotangents.shape[3] * inputs.shape[3] / (outputs.shape[0] * places.shape[0])
        sample = SharedOuter(
            inputs[:, :, :, places],
            cotangents[:, None][..., outputs],
            weight_shape=(groups * outputs.shape[0], places.shape[0]),
            samples=factors.normalizer,
        )
        kernel = sample.gram() * (ratio / factors.normalizer)
        sketch = SidesSketch(sample.scaled(ratio), outputs, places, layout)
        d_in = inputs.shape[3] - (layout.bias is not None)
        kept: Factors = SharedOuter(
            inputs[:, :, :, :d_in], cotangents, layout.weight_shape, layout.weight, samples=factors.normalizer
        )
        if layout.bias is not None:
            bias = (cotangents * inputs[:, :, :, d_in:]).sum(axis=1).reshape(rows, -1)
            kept = Sum((kept, Dense({layout.bias: bias})), samples=factors.normalizer)
        return SENGEstimate(kept, sketch, kernel, count + 1)

    def factorize(self, estimate: SENGEstimate, damping: float) -> SENGInverse:
        factor = cholesky(add_diagonal(estimate.kernel, check_damping(damping)))
        return SENGInverse(estimate.factors, estimate.sketch, factor, damping)

    def solve(self, inverse: SENGInverse, gradient: Gradient) -> dict[str, Array]:
        rows, sketch = inverse.factors, inverse.sketch
        vector, shapes = as_vector(gradient), rows.shapes
        check_block(vector, shapes)
        products = rows.matvec(vector) if sketch is None else sketch.products(vector, shapes)
        weights = cholesky_solve(inverse.factor, products) / (-rows.normalizer * inverse.damping)
        return corrected([vector], [rows.rmatvec(weights)], inverse.damping)[0]


def _columns(factors: Factors, index: Array) -> Array:
    """Columns of J at `index`, shape ``(rows, s)``, made from few rows at a time."""
    xp = namespace(index)
    step = max(1, _TEMPORARY // factors.size)
    starts = range(0, len(factors), step)
    parts = [
        factors.rows(xp.arange(start, min(start + step, len(factors)), device=device(index))).dense().matrix()[:, index]
        for start in starts
    ]
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def _sides(factors: Factors) -> tuple[Array, Array, KroneckerLayout] | None:
    """Inputs with the 1 of a bias and cotangents of every row, shape ``(rows, positions, groups, d)``; None for others.

    A lookup has such sides too, but one of them is as long as the table.
    """
    if isinstance(factors, OneHotOuter):
        return None
    try:
        apart = factors.kronecker_rows()
    except ConfigurationError:
        return None
    if apart.layout.weight is None:
        return None
    xp, (groups, seen, d_in) = namespace(apart.inputs), apart.inputs.shape
    columns = apart.cotangents.shape[1] // seen
    inputs = apart.inputs.reshape(groups, len(factors) // columns, -1, d_in)
    if apart.layout.bias is not None:
        inputs = xp.concat([inputs, xp.ones_like(inputs[..., :1])], axis=3)
    inputs = xp.repeat(xp.permute_dims(inputs, (1, 2, 0, 3)), columns, axis=0)
    cotangents = apart.cotangents.reshape(groups, len(factors), -1, apart.cotangents.shape[2])
    return inputs, xp.permute_dims(cotangents, (1, 2, 0, 3)), apart.layout


def _truncated(inputs: Array, cotangents: Array, rank: int) -> tuple[Array, Array]:
    """Both sides with the positions of each row and group combined to `rank`, keeping most of its cotangents."""
    positions, d_out = cotangents.shape[1], cotangents.shape[3]
    if positions <= rank:
        return inputs, cotangents
    if not is_finite(cotangents):
        # No decomposition: `factorize` refuses it, where a refusal has a place.
        return inputs[:, :rank], float("nan") * cotangents[:, :rank]
    xp = namespace(cotangents)
    transpose = xp.matrix_transpose
    inputs, cotangents = (xp.permute_dims(side, (0, 2, 1, 3)) for side in (inputs, cotangents))
    # Singular vectors as eigenvectors of the smaller product; orthonormal, so that no singular value is divided by.
    if positions <= d_out:
        left = transpose(eigh(cotangents @ transpose(cotangents))[1][..., -rank:])
        sides = (left @ inputs, left @ cotangents)
    else:
        right = eigh(transpose(cotangents) @ cotangents)[1][..., -rank:]
        sides = (transpose(cotangents @ right) @ inputs, transpose(right))
    return xp.permute_dims(sides[0], (0, 2, 1, 3)), xp.permute_dims(sides[1], (0, 2, 1, 3))
