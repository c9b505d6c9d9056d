"""The curvature of a whole model as one linear operator: block-diagonal over its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from curvlib.arrays import Array, Vector
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.func.operators import Curvature, scipy_operator
from curvlib.layers import partition
from curvlib.solvers import Solver, Woodbury
from curvlib.solvers.base import check_block
from curvlib.solvers.dense import flatten, unflatten

__all__ = ["ModelCurvature"]


@dataclass(frozen=True, eq=False)
class ModelCurvature:
    """The damped block-diagonal curvature ``F + λI`` of a model, a symmetric linear operator.

    Vectors are dictionaries from the model's parameter names to arrays, or flat arrays in the order of
    ``model.parameters()``, as `torch.nn.utils.parameters_to_vector` makes them, without those that need no gradient;
    the answer has the form of what was given.

    Parameters
    ----------
    model
        Whose parameters the blocks are of; it gives their names and their order.
    blocks
        Block name to Factors, from `curvlib.collect`.
    damping
        λ ≥ 0; `solve` and `logdet` need λ > 0.
    solver
        How `solve` inverts each block; exact by default.

    Raises
    ------
    ConfigurationError
        If the blocks are not those of the model.

    Examples
    --------
    >>> import torch, curvlib
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> blocks = curvlib.collect(model, curvlib.Exact(), torch.randn(8, 3))
    >>> curvature = curvlib.func.ModelCurvature(model, blocks, damping=0.1)
    >>> natural = curvature.solve(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    >>> natural.shape, curvature.trace().shape
    (torch.Size([26]), torch.Size([]))
    """

    model: nn.Module
    blocks: Mapping[str, Factors]
    damping: float = 0.0
    solver: Solver = field(default_factory=Woodbury)

    def __post_init__(self) -> None:
        # Both refuse what does not fit.
        _ = self._curvatures, self._places

    @cached_property
    def _curvatures(self) -> dict[str, Curvature]:
        return {name: Curvature(factors, self.damping, self.solver) for name, factors in self.blocks.items()}

    @cached_property
    def _places(self) -> dict[str, tuple[str, str]]:
        """Parameter name in the model to block and name inside it, in the model's order."""
        bare = "fallback" if any(name.endswith(".(own)") for name in self.blocks) else None
        known = {block.name: block for block in partition(self.model, bare=bare).blocks}
        where: dict[int, tuple[str, str]] = {}
        for name, factors in self.blocks.items():
            block = known.get(name)
            expected = {} if block is None else {inner: tuple(p.shape) for inner, p in block.parameters.items()}
            if block is None or {inner: tuple(shape) for inner, shape in factors.shapes.items()} != expected:
                raise ConfigurationError(
                    f"block {name!r} with parameters {factors.shapes} is none of the model's, whose blocks are "
                    f"{list(known)}: take Factors from curvlib.collect(model, ...)"
                )
            where.update((id(p), (name, inner)) for inner, p in block.parameters.items())
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        missing = [name for name, p in trainable.items() if id(p) not in where]
        if missing:
            raise ConfigurationError(
                f"no block covers the parameters {missing}: collect with rest='fallback', or set requires_grad=False"
            )
        return {name: where[id(p)] for name, p in trainable.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, in the model's order."""
        return {name: self.blocks[block].shapes[inner] for name, (block, inner) in self._places.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """``(parameters, parameters)``."""
        size = sum(factors.size for factors in self.blocks.values())
        return size, size

    def product(self, vector: Vector | Array) -> Any:
        """Return ``(F + λI) v``."""
        return self._on_blocks(Curvature.product, vector)

    def __matmul__(self, vector: Vector | Array) -> Any:
        return self.product(vector)

    def solve(self, vector: Vector | Array) -> Any:
        """Return ``(F + λI)⁻¹ v``; every block is factorised once."""
        return self._on_blocks(Curvature.solve, vector)

    def trace(self) -> Array:
        """Return the trace of ``F + λI``, a scalar array."""
        return self._sum(Curvature.trace)

    def logdet(self) -> Array:
        """Return the log-determinant of ``F + λI``, a scalar array."""
        return self._sum(Curvature.logdet)

    def scipy(self) -> Any:
        """Return this operator as a `scipy.sparse.linalg.LinearOperator`."""
        return scipy_operator(self.shape, next(iter(self.blocks.values())), self.product, self.product)

    def scipy_inverse(self) -> Any:
        """Return the inverse as a `scipy.sparse.linalg.LinearOperator`, a preconditioner for instance."""
        return scipy_operator(self.shape, next(iter(self.blocks.values())), self.solve, self.solve)

    def _sum(self, part: Callable[[Curvature], Array]) -> Array:
        first, *others = (part(curvature) for curvature in self._curvatures.values())
        return sum(others, first)

    def _on_blocks(self, apply: Callable[[Curvature, Vector], Any], vector: Vector | Array) -> Any:
        shapes = self.shapes
        if not isinstance(vector, Mapping):
            if tuple(vector.shape) != self.shape[:1]:
                raise ConfigurationError(
                    f"a flat vector of this model has shape {self.shape[:1]}, got {tuple(vector.shape)}"
                )
            return flatten(self._on_blocks(apply, unflatten(vector, shapes)), shapes)
        check_block(vector, shapes)
        parts: dict[str, dict[str, Array]] = {name: {} for name in self.blocks}
        for name, (block, inner) in self._places.items():
            parts[block][inner] = vector[name]
        answers = {block: apply(curvature, parts[block]) for block, curvature in self._curvatures.items()}
        return {name: answers[block][inner] for name, (block, inner) in self._places.items()}
