"""A solver around another one, which does all but what a subclass changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curvlib.arrays import Array, Vector
from curvlib.factors import Factors
from curvlib.solvers import Solver
from curvlib.solvers.base import Evaluation, Gradient

__all__ = ["Wrapped"]


@dataclass(frozen=True, eq=False)
class Wrapped(Solver):
    """A solver that says and does what `solver` does.

    Parameters
    ----------
    solver
        What works.
    """

    solver: Solver

    def __post_init__(self) -> None:
        for name in ("of_gradient", "of_fresh_rows", "of_second_pass", "of_preactivations", "holds_rows"):
            object.__setattr__(self, name, getattr(self.solver, name))

    @property
    def of_kronecker_rows(self) -> bool:
        return self.solver.of_kronecker_rows

    @property
    def exact(self) -> bool:
        return self.solver.exact

    @property
    def keeps_rows(self) -> bool:
        return self.solver.keeps_rows

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        return self.solver.gains_from_rows(factors, same, together)

    def update(self, estimate: Any, factors: Factors) -> Any:
        return self.solver.update(estimate, factors)

    def update_all(self, estimates: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        return self.solver.update_all(estimates, factors)

    def factorize(self, estimate: Any, damping: float) -> Any:
        return self.solver.factorize(estimate, damping)

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        return self.solver.factorize_all(estimates, dampings)

    def solve(self, inverse: Any, gradient: Gradient) -> dict[str, Array]:
        return self.solver.solve(inverse, gradient)

    def solve_all(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        return self.solver.solve_all(inverses, gradients)

    def remember(self, estimate: Any, natural: Vector) -> Any:
        return self.solver.remember(estimate, natural)

    def follow(self, estimate: Any, inverse: Any, before: Evaluation, after: Evaluation) -> Any:
        return self.solver.follow(estimate, inverse, before, after)
