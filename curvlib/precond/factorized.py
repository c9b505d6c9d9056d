"""Solvers that factorise in another precision than they keep their states in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from curvlib.arrays import Array, map_arrays, namespace, widen
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.precond.wrapped import Wrapped
from curvlib.solvers import Solver

__all__ = ["FactorizeIn", "FactorizedIn", "factorized_in"]

FactorizeIn = Literal["float64"] | None
"""Precision of factorisations; None for that of the estimates."""


@dataclass(frozen=True)
class FactorizedIn(Wrapped):
    """A solver whose factorisations are in float64; estimates, inverses and solves stay in their own precision."""

    def factorize(self, estimate: Any, damping: float) -> Any:
        wider = _Wider()
        return wider.narrowed(self.solver.factorize(wider.widened(estimate), damping))

    def factorize_all(self, estimates: Sequence[Any], dampings: Sequence[float]) -> list[Any]:
        wider = _Wider()
        inverses = self.solver.factorize_all([wider.widened(estimate) for estimate in estimates], dampings)
        return [wider.narrowed(inverse) for inverse in inverses]

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        # The inverse is made of other objects than the rows, though of equal numbers.
        return self.solver.gains_from_rows(factors, False)


class _Wider:
    """States in float64 and back; what passes through a factorisation unchanged comes back as the array it was."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Array, Array]] = {}
        self._narrow: Any = None

    def widened(self, estimate: Any) -> Any:
        return map_arrays(self._up, estimate)

    def narrowed(self, inverse: Any) -> Any:
        return map_arrays(self._down, inverse)

    def _up(self, array: Array) -> Array:
        xp = namespace(array)
        if not xp.isdtype(array.dtype, "real floating"):
            return array
        if self._narrow is None or array.dtype.itemsize < self._narrow.itemsize:
            self._narrow = array.dtype
        wide = widen(array)
        self._known[id(wide)] = (wide, array)
        return wide

    def _down(self, array: Array) -> Array:
        if id(array) in self._known:
            return self._known[id(array)][1]
        xp = namespace(array)
        return xp.astype(array, self._narrow) if xp.isdtype(array.dtype, "real floating") else array


def factorized_in(precision: str | None, solvers: Mapping[str, Solver]) -> dict[str, Solver]:
    """Solvers of all blocks with factorisations of this precision.

    Raises
    ------
    ConfigurationError
        If it is neither None nor "float64".
    """
    if precision is None:
        return dict(solvers)
    if precision != "float64":
        raise ConfigurationError(
            f"factorize_in must be None (the precision of the curvature) or 'float64', got {precision!r}"
        )
    made = {id(solver): FactorizedIn(solver) for solver in solvers.values()}
    return {block: made[id(solver)] for block, solver in solvers.items()}
