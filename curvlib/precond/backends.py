"""Any solver in another array library: it sees that library's arrays, the rest of the optimizer sees tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from curvlib.arrays import Array, Vector, map_arrays
from curvlib.factors import Factors
from curvlib.precond.places import Place, place_for
from curvlib.precond.wrapped import Wrapped
from curvlib.solvers import Solver
from curvlib.solvers.base import Evaluation, Gradient

__all__ = ["Placed", "placed", "plain"]


@dataclass(frozen=True, eq=False)
class Placed(Wrapped):
    """A solver at work in a place of its own.

    Factors, gradients and states are tensors outside and arrays of the place inside, on the same memory. States outside
    are the ones that the solver itself would have with tensors, so a checkpoint may be resumed in another place.

    Parameters
    ----------
    solver
        What works.
    place
        Where.
    """

    place: Place
    _inner: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary, init=False, repr=False)
    """From what was handed out or in to its like inside, while the former lives: nothing is converted twice, and a
    solver recognises its own rows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Placed, (self.solver, self.place)

    def update(self, estimate: Any, factors: Factors) -> Any:
        with self.place.working():
            return self._outside(self.solver.update(self._inside(estimate), self._inside(factors)))

    def update_all(self, estimates: Sequence[Any], factors: Sequence[Factors]) -> list[Any]:
        with self.place.working():
            inside = [self._inside(estimate) for estimate in estimates], [self._inside(rows) for rows in factors]
            return [self._outside(estimate) for estimate in self.solver.update_all(*inside)]

    def factorize(self, estimate: Any, damping: float) -> Any:
        with self.place.working():
            return self._outside(self.solver.factorize(self._inside(estimate), damping))

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        with self.place.working():
            inverses = self.solver.factorize_all([self._inside(estimate) for estimate in estimates], dampings)
            return [self._outside(inverse) for inverse in inverses]

    def solve_all(self, inverses: Sequence[Any], gradients: Sequence[Gradient]) -> list[dict[str, Array]]:
        with self.place.working():
            naturals = self.solver.solve_all(
                [self._inside(inverse) for inverse in inverses], [self._inside(gradient) for gradient in gradients]
            )
            if self.place.native:
                return naturals
            return [{name: self.place.leave(a) for name, a in natural.items()} for natural in naturals]

    def solve(self, inverse: Any, gradient: Gradient) -> dict[str, Array]:
        with self.place.working():
            natural = self.solver.solve(self._inside(inverse), self._inside(gradient))
            return natural if self.place.native else {name: self.place.leave(a) for name, a in natural.items()}

    def remember(self, estimate: Any, natural: Vector) -> Any:
        if type(self.solver).remember is Solver.remember:
            return estimate
        with self.place.working():
            before = self._inside(estimate)
            after = self.solver.remember(before, self._inside(natural))
            return estimate if after is before else self._outside(after)

    def follow(self, estimate: Any, inverse: Any, before: Evaluation, after: Evaluation) -> Any:
        with self.place.working():
            states = [self._inside(state) for state in (estimate, inverse, before, after)]
            return self._outside(self.solver.follow(*states))

    def _inside(self, value: Any) -> Any:
        if self.place.native or value is None:
            return value
        try:
            return self._inner[value]
        except (KeyError, TypeError):  # not met before, or nothing that can be (a dict, a number)
            made = _entered(self.place, value)
            self._keep(value, made)
            return made

    def _outside(self, value: Any) -> Any:
        if self.place.native:
            return value
        made = map_arrays(self.place.leave, value)
        self._keep(made, value)
        return made

    def _keep(self, outer: Any, inner: Any) -> None:
        if dataclasses.is_dataclass(outer):
            self._inner[outer] = inner


def _entered(place: Place, value: Any) -> Any:
    """Return `value` with every tensor as an array of the place, Factors in a kind that these may belong to."""
    if isinstance(value, Factors):
        return map_arrays(place.enter, value.portable())
    if isinstance(value, Mapping):
        return {key: _entered(place, item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: _entered(place, getattr(value, one.name)) for one in dataclasses.fields(value)}
        return type(value)(**fields)
    return map_arrays(place.enter, value)


def placed(
    solvers: Mapping[str, Solver], backend: str, precision: str, devices: Iterable[torch.device]
) -> dict[str, Solver]:
    """Solvers of all blocks, where a backend has them work.

    Parameters
    ----------
    solvers
        Block name to solver.
    backend, precision, devices
        As for `curvlib.precond.places.place_for`, which says what it refuses.
    """
    place = place_for(backend, precision, devices)
    if place is None:
        return dict(solvers)
    shared = {id(solver): Placed(solver, place) for solver in solvers.values()}
    return {block: shared[id(solver)] for block, solver in solvers.items()}


def plain(solver: Solver) -> Solver:
    """Return the solver itself, wherever it works."""
    return solver.solver if isinstance(solver, Placed) else solver
