"""One solver after the other, by the number of updates."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from curvlib.arrays import Array, Vector, record
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.solvers.base import Evaluation, Gradient, Solver

__all__ = ["Switch", "SwitchEstimate", "SwitchInverse"]


@record
@dataclass(frozen=True, eq=False)
class SwitchEstimate:
    """Estimate of the solver at position `place`, and how many updates there were in all."""

    place: int
    estimate: Any
    count: int


@record
@dataclass(frozen=True, eq=False)
class SwitchInverse:
    """Inverse of the solver at position `place`, which may not be the one that updates by now."""

    place: int
    inverse: Any


@dataclass(frozen=True)
class Switch(Solver):
    """Several solvers in turn; each begins without an estimate when its turn comes.

    HyLo (Mu et al., SC22) interpolates rows early in training and samples them later: its authors take KID before epoch
    10 and in epochs 26 to 30, KIS in all others. With k updates an epoch that is
    ``Switch((KID(), KIS(), KID(), KIS()), until=(10 * k, 26 * k, 31 * k))``.

    Parameters
    ----------
    solvers
        Two or more.
    until
        Numbers of updates after which the next solver takes over, one less than solvers, rising. A step that takes no
        new curvature is no update.
    """

    solvers: tuple[Solver, ...]
    until: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "solvers", tuple(self.solvers))
        object.__setattr__(self, "until", tuple(self.until))
        for solver in self.solvers:
            if not isinstance(solver, Solver):
                raise ConfigurationError(f"a switch is between solvers such as KID() and KIS(), got {solver!r}")
        if len(self.solvers) < 2 or len(self.until) != len(self.solvers) - 1:
            raise ConfigurationError(
                "a switch needs two or more solvers, and for each but the last the number of updates that it ends "
                f"after; got {len(self.solvers)} solvers and until={self.until}"
            )
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in self.until)
        if not whole or self.until[0] < 1 or any(after <= before for before, after in pairwise(self.until)):
            raise ConfigurationError(f"until must be rising numbers of updates, at least 1, got {self.until}")

    @property
    def exact(self) -> bool:
        return all(solver.exact for solver in self.solvers)

    @property
    def of_gradient(self) -> bool:  # type: ignore[override]  # a constant of other solvers
        return any(solver.of_gradient for solver in self.solvers)

    @property
    def of_fresh_rows(self) -> bool:  # type: ignore[override]
        return any(solver.of_fresh_rows for solver in self.solvers)

    @property
    def of_second_pass(self) -> bool:  # type: ignore[override]
        return any(solver.of_second_pass for solver in self.solvers)

    @property
    def of_preactivations(self) -> bool:  # type: ignore[override]
        return any(solver.of_preactivations for solver in self.solvers)

    @property
    def holds_rows(self) -> bool:  # type: ignore[override]
        return any(solver.holds_rows for solver in self.solvers)

    @property
    def of_kronecker_rows(self) -> bool:
        return any(solver.of_kronecker_rows for solver in self.solvers)

    def gains_from_rows(self, factors: Factors, same: bool, together: bool = False) -> bool:
        return all(solver.gains_from_rows(factors, same, together) for solver in self.solvers)

    def update(self, estimate: SwitchEstimate | None, factors: Factors) -> SwitchEstimate:
        count = 0 if estimate is None else estimate.count
        place = bisect_right(self.until, count)
        before = estimate.estimate if estimate is not None and estimate.place == place else None
        return SwitchEstimate(place, self.solvers[place].update(before, factors), count + 1)

    def factorize(self, estimate: SwitchEstimate, damping: float) -> SwitchInverse:
        return SwitchInverse(estimate.place, self.solvers[estimate.place].factorize(estimate.estimate, damping))

    def solve(self, inverse: SwitchInverse, gradient: Gradient) -> dict[str, Array]:
        return self.solvers[inverse.place].solve(inverse.inverse, gradient)

    def remember(self, estimate: SwitchEstimate, natural: Vector) -> SwitchEstimate:
        new = self.solvers[estimate.place].remember(estimate.estimate, natural)
        return SwitchEstimate(estimate.place, new, estimate.count)

    def follow(
        self, estimate: SwitchEstimate, inverse: SwitchInverse, before: Evaluation, after: Evaluation
    ) -> SwitchEstimate:
        solver = self.solvers[estimate.place]
        if inverse.place != estimate.place or not solver.of_second_pass:
            return estimate
        new = solver.follow(estimate.estimate, inverse.inverse, before, after)
        return SwitchEstimate(estimate.place, new, estimate.count)
