"""Blocks and Factors as linear operators: products, solves, trace, log-determinant; SciPy's interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import array_api_compat
import numpy as np
from scipy.sparse.linalg import LinearOperator

from curvlib.arrays import Array, Vector, add_diagonal, cholesky, device, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.solvers import Solver, Woodbury
from curvlib.solvers.base import check_block, check_damping
from curvlib.solvers.dense import flatten, unflatten

__all__ = ["Curvature", "Jacobian"]


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
        return scipy_operator(self.shape, self.factors, self.product, self.product)

    def scipy_inverse(self) -> Any:
        """Return the inverse as a `scipy.sparse.linalg.LinearOperator`, a preconditioner for instance."""
        return scipy_operator(self.shape, self.factors, self.solve, self.solve)

    def _on_blocks(self, apply: Callable[[Vector], dict[str, Array]], vector: Vector | Array) -> Any:
        shapes = self.factors.shapes
        if isinstance(vector, Mapping):
            check_block(vector, shapes)
            return apply(vector)
        _check_flat(vector, self.factors.size, "a flat vector of this block")
        return flatten(apply(unflatten(vector, shapes)), shapes)


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The rows J of a block, shape ``(rows, parameters)``, as a linear operator on arrays of their own library.

    ``J @ v`` takes a block vector or a flat array of shape ``(parameters,)``, and ``J.T @ w`` row weights of shape
    ``(rows,)``, which it turns into a flat array; `rmatvec_block` keeps the block vector.

    Parameters
    ----------
    factors
        Rows J.

    Examples
    --------
    >>> import torch, curvlib
    >>> rows = curvlib.func.Jacobian(curvlib.factors.Dense(weight=torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])))
    >>> rows @ torch.ones(2), rows.T @ torch.ones(3)
    (tensor([ 3.,  7., 11.]), tensor([ 9., 12.]))
    """

    factors: Factors

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, parameters)``."""
        return len(self.factors), self.factors.size

    @property
    def T(self) -> Transposed:  # noqa: N802  # as arrays call it
        """Jᵀ."""
        return Transposed(self)

    def matvec(self, vector: Vector | Array) -> Array:
        """Return ``J v``, shape ``(rows,)``."""
        if isinstance(vector, Mapping):
            check_block(vector, self.factors.shapes)
            return self.factors.matvec(vector)
        _check_flat(vector, self.shape[1], "a flat vector of this block")
        return self.factors.matvec(unflatten(vector, self.factors.shapes))

    def rmatvec(self, weights: Array) -> Array:
        """Return ``Jᵀ w``, shape ``(parameters,)``."""
        return flatten(self.rmatvec_block(weights), self.factors.shapes)

    def rmatvec_block(self, weights: Array) -> dict[str, Array]:
        """Return ``Jᵀ w`` as a block vector."""
        _check_flat(weights, self.shape[0], "a vector of weights of these rows")
        return self.factors.rmatvec(weights)

    def __matmul__(self, vector: Vector | Array) -> Array:
        return self.matvec(vector)

    def scipy(self) -> Any:
        """Return this operator as a `scipy.sparse.linalg.LinearOperator`."""
        return scipy_operator(self.shape, self.factors, self.matvec, self.rmatvec)


@dataclass(frozen=True, eq=False)
class Transposed:
    """The transpose of a `Jacobian`, shape ``(parameters, rows)``.

    Parameters
    ----------
    T
        The Jacobian itself.
    """

    T: Jacobian

    @property
    def shape(self) -> tuple[int, int]:
        """``(parameters, rows)``."""
        rows, parameters = self.T.shape
        return parameters, rows

    def matvec(self, weights: Array) -> Array:
        """Return ``Jᵀ w``, shape ``(parameters,)``."""
        return self.T.rmatvec(weights)

    def rmatvec(self, vector: Vector | Array) -> Array:
        """Return ``J v``, shape ``(rows,)``."""
        return self.T.matvec(vector)

    def __matmul__(self, weights: Array) -> Array:
        return self.matvec(weights)

    def scipy(self) -> Any:
        """Return this operator as a `scipy.sparse.linalg.LinearOperator`."""
        return self.T.scipy().T


def _check_flat(vector: Array, size: int, what: str) -> None:
    if tuple(vector.shape) != (size,):
        raise ConfigurationError(f"{what} has shape ({size},), got {tuple(vector.shape)}")


def scipy_operator(
    shape: tuple[int, int], factors: Factors, forward: Callable[[Array], Array], backward: Callable[[Array], Array]
) -> Any:
    """SciPy's operator around products in the library, dtype and device of the factors' arrays."""
    like = factors.row_weights(0.0)

    def through(apply: Callable[[Array], Array]) -> Callable[[Any], Any]:
        def run(vector: Any) -> Any:
            own = namespace(like).asarray(np.ascontiguousarray(vector).reshape(-1), device=device(like))
            result = apply(namespace(own).astype(own, like.dtype))
            return np.asarray(array_api_compat.to_device(result, "cpu"))

        return run

    dtype = np.asarray(array_api_compat.to_device(like[:1], "cpu")).dtype
    return LinearOperator(shape, matvec=through(forward), rmatvec=through(backward), dtype=dtype)
