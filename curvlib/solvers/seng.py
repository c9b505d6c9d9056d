"""Sketched Woodbury: kernel and products from a sample of the columns of J."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from curvlib.arrays import Array, add_diagonal, cholesky, cholesky_solve, device, namespace, record
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.solvers.base import Gradient, Solver, as_vector, check_block, check_damping
from curvlib.solvers.dense import flatten

__all__ = ["SENG", "SENGEstimate", "SENGInverse", "Sketch"]

_TEMPORARY = 1 << 24
"""Elements of explicit rows to make at a time."""


@record
@dataclass(frozen=True, eq=False)
class Sketch:
    """Columns of J at positions `index`, shape ``(rows, s)``, times parameters / s."""

    columns: Array
    index: Array


@record
@dataclass(frozen=True, eq=False)
class SENGEstimate:
    """Estimate: all rows, the sketch (None where the block is no larger than one), the kernel, number of updates."""

    factors: Factors
    sketch: Sketch | None
    kernel: Array
    count: int


@record
@dataclass(frozen=True, eq=False)
class SENGInverse:
    """Inverse: all rows, the sketch, the Cholesky factor of the damped kernel."""

    factors: Factors
    sketch: Sketch | None
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
    seed
        Chooses the sample, with the number of updates so far.

    Notes
    -----
    With s columns J_S drawn without replacement, uniformly, at every update,

        p = (g − Jᵀ (K̂ + λI)⁻¹ v̂ / n) / λ,   K̂ = (P / s) J_S J_Sᵀ / n,   v̂ = (P / s) J_S g_S:

    K̂ and v̂ are J Jᵀ / n and J g on average, and the last product is that of the whole J. The authors' code multiplies
    both factors of each product by P / s, which makes K̂ and v̂ too large by that number. Of large blocks they sample
    inputs and cotangents apart, after a truncated decomposition of each sample's cotangents; here explicit rows
    are made a few at a time, for their sample alone. With a small sample p need not be a direction of descent.
    """

    exact: ClassVar[bool] = False
    columns: int = 65536
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 1:
            raise ConfigurationError(f"SENG samples at least one column, as an integer, got columns={self.columns!r}")

    def update(self, estimate: SENGEstimate | None, factors: Factors) -> SENGEstimate:
        count = 0 if estimate is None else estimate.count
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

    def factorize(self, estimate: SENGEstimate, damping: float) -> SENGInverse:
        factor = cholesky(add_diagonal(estimate.kernel, check_damping(damping)))
        return SENGInverse(estimate.factors, estimate.sketch, factor, damping)

    def solve(self, inverse: SENGInverse, gradient: Gradient) -> dict[str, Array]:
        rows, sketch = inverse.factors, inverse.sketch
        vector, shapes = as_vector(gradient), rows.shapes
        check_block(vector, shapes)
        products = rows.matvec(vector) if sketch is None else sketch.columns @ flatten(vector, shapes)[sketch.index]
        correction = rows.rmatvec(cholesky_solve(inverse.factor, products) / rows.normalizer)
        return {name: (vector[name] - correction[name]) / inverse.damping for name in shapes}


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
