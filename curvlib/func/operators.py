"""Blocks and Factors as linear operators: products, solves, trace, log-determinant; SciPy's interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import array_api_compat

from curvlib.arrays import Array, Vector, add_diagonal, cholesky, device, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.solvers import Solver, Woodbury
from curvlib.solvers.base import check_block, check_damping
from curvlib.solvers.dense import flatten, unflatten

__all__ = ["Curvature", "jacobian_operator"]


@dataclass(frozen=True, eq=False)
class Curvature:
    """The damped curvature ``F + λI`` of a block, ``F = JᵀJ / normalizer``, as a symmetric linear operator.

    Vectors are block vectors (name to array), or flat arrays of shape ``(parameters,)`` in the block's order; the
    answer has the form of what was given.

    Parameters
    ----------
    factors
        Rows J.
    damping
        λ ≥ 0; `solve` and `logdet` need λ > 0.
    solver
        How `solve` inverts; exact by default.

    Examples
    --------
    >>> import torch, curvlib
    >>> block = curvlib.func.Curvature(curvlib.factors.Dense(weight=torch.eye(2)), damping=0.5)
    >>> block @ torch.ones(2)
    tensor([1., 1.])
    """

    factors: Factors
    damping: float = 0.0
    solver: Solver = field(default_factory=Woodbury)

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise ConfigurationError(f"damping must be a finite number ≥ 0, got {self.damping!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(parameters, parameters)``."""
        return self.factors.size, self.factors.size

    def product(self, vector: Vector | Array) -> Any:
        """Return ``(F + λI) v``."""

        def apply(block: Vector) -> dict[str, Array]:
            curved = self.factors.rmatvec(self.factors.matvec(block) / self.factors.normalizer)
            return {name: value + self.damping * block[name] for name, value in curved.items()}

        return self._on_blocks(apply, vector)

    def __matmul__(self, vector: Vector | Array) -> Any:
        return self.product(vector)

    def solve(self, vector: Vector | Array) -> Any:
        """Return ``(F + λI)⁻¹ v``; the factorisation is made once."""
        return self._on_blocks(lambda block: self.solver.solve(self._inverse, block), vector)

    @cached_property
    def _inverse(self) -> Any:
        return self.solver.factorize(self.solver.update(None, self.factors), check_damping(self.damping))

    def trace(self) -> Array:
        """Return the trace of ``F + λI``, a scalar array."""
        parts = [value.sum() for value in self.factors.diagonal().values()]
        return sum(parts[1:], parts[0]) / self.factors.normalizer + self.damping * self.factors.size

    def logdet(self) -> Array:
        """Return the log-determinant of ``F + λI``, a scalar array.

        With N rows and P > N parameters it is ``logdet(J Jᵀ / n + λI) + (P − N) log λ``.
        """
        rows, damping = self.factors, check_damping(self.damping)
        few = len(rows) < rows.size
        small = (rows.gram() if few else rows.covariance()) / rows.normalizer
        factor = cholesky(add_diagonal(small, damping))
        xp = namespace(factor)
        inside = 2 * xp.log(xp.linalg.diagonal(factor)).sum()
        return inside + max(0, rows.size - len(rows)) * math.log(damping)

    def scipy(self) -> Any:
        """Return this operator as a `scipy.sparse.linalg.LinearOperator`."""
        return _scipy_operator(self.shape, self.factors, self.product, self.product)

    def scipy_inverse(self) -> Any:
        """Return the inverse as a `scipy.sparse.linalg.LinearOperator`, a preconditioner for instance."""
        return _scipy_operator(self.shape, self.factors, self.solve, self.solve)

    def _on_blocks(self, apply: Callable[[Vector], dict[str, Array]], vector: Vector | Array) -> Any:
        shapes = self.factors.shapes
        if isinstance(vector, Mapping):
            check_block(vector, shapes)
            return apply(vector)
        if tuple(vector.shape) != (self.factors.size,):
            raise ConfigurationError(
                f"a flat vector of this block has shape ({self.factors.size},), got {tuple(vector.shape)}"
            )
        return flatten(apply(unflatten(vector, shapes)), shapes)


def jacobian_operator(factors: Factors) -> Any:
    """Return J, shape ``(rows, parameters)``, as a `scipy.sparse.linalg.LinearOperator`.

    Raises
    ------
    ConfigurationError
        If SciPy is not installed.
    """
    shapes = factors.shapes
    return _scipy_operator(
        (len(factors), factors.size),
        factors,
        lambda v: factors.matvec(unflatten(v, shapes)),
        lambda w: flatten(factors.rmatvec(w), shapes),
    )


def _scipy_operator(
    shape: tuple[int, int], factors: Factors, forward: Callable[[Array], Array], backward: Callable[[Array], Array]
) -> Any:
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ConfigurationError("linear operators of SciPy need SciPy: pip install scipy") from error
    import numpy

    like = factors.row_weights(0.0)

    def through(apply: Callable[[Array], Array]) -> Callable[[Any], Any]:
        def run(vector: Any) -> Any:
            own = namespace(like).asarray(numpy.ascontiguousarray(vector).reshape(-1), device=device(like))
            result = apply(namespace(own).astype(own, like.dtype))
            return numpy.asarray(array_api_compat.to_device(result, "cpu"))

        return run

    dtype = numpy.asarray(array_api_compat.to_device(like[:1], "cpu")).dtype
    return LinearOperator(shape, matvec=through(forward), rmatvec=through(backward), dtype=dtype)
