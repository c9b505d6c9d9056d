"""When curvature is taken anew, and when it is factorised."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from curvlib.errors import ConfigurationError
from curvlib.hyperparameters import Checked

__all__ = ["Every", "Intervals", "OnEvidence", "Refresh", "When"]


class Refresh(Checked, ABC):
    """Decides at which steps estimates and inverses are renewed."""

    tolerance: float | None = None
    """Where not None: rows that were taken are used only for blocks whose inverse has a greater residual on them."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether step number `step` (0 is the first) takes new curvature. Step 0 must."""

    def inverse_due(self, step: int) -> bool:
        """Whether a step that took new curvature factorises it too. A block without an inverse always does."""
        return True


@dataclass(frozen=True)
class Every(Refresh):
    """Every `steps`-th step, beginning with the first.

    Parameters
    ----------
    steps
        Interval, ≥ 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_interval("the refresh interval", self.steps)

    def due(self, step: int) -> bool:
        return step % self.steps == 0


@dataclass(frozen=True)
class Intervals(Refresh):
    """Estimates and inverses at intervals of their own, as K-FAC does with averaged factors.

    Parameters
    ----------
    estimate
        Steps between updates of the estimate.
    inverse
        Steps between factorisations, a multiple of `estimate`.
    """

    estimate: int
    inverse: int

    def __post_init__(self) -> None:
        _check_interval("the interval of estimates", self.estimate)
        _check_interval("the interval of inverses", self.inverse)
        if self.inverse % self.estimate:
            raise ConfigurationError(
                f"an inverse every {self.inverse} steps does not meet an estimate every {self.estimate}: "
                "the interval of inverses must be a multiple of that of estimates"
            )

    def due(self, step: int) -> bool:
        return step % self.estimate == 0

    def inverse_due(self, step: int) -> bool:
        return step % self.inverse == 0


@dataclass(frozen=True)
class When(Refresh):
    """At the steps that a function names, and at the first.

    Parameters
    ----------
    rule
        From the number of a step to whether it takes new curvature.
    """

    rule: Callable[[int], bool]

    def due(self, step: int) -> bool:
        return step == 0 or bool(self.rule(step))


@dataclass(frozen=True)
class OnEvidence(Refresh):
    """Look at fresh rows now and then; renew a block only where they say that its inverse has gone stale.

    Looking costs the rows and two products with them; the Gram and the factorisation are what is saved.

    Parameters
    ----------
    look_every
        Steps between looks.
    tolerance
        Residual above which a block is renewed: ``‖(F + λI) p − g‖ / ‖g‖`` for the block's gradient g, its natural
        gradient p from the present inverse, and the curvature F of the fresh rows. It is 0 for an exact inverse of
        these very rows; batches as unlike as their noise makes it of order ‖F‖/λ times their relative difference.
        The same formula serves every solver; an approximate one has a floor of its own.
    """

    look_every: int
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        _check_interval("the interval of looks", self.look_every)
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ConfigurationError(f"the tolerance of OnEvidence must be a finite number ≥ 0, got {self.tolerance!r}")

    def due(self, step: int) -> bool:
        return step % self.look_every == 0


def as_refresh(refresh: Refresh | int) -> Refresh:
    """Return `refresh` itself, or `Every(refresh)` for a number."""
    return refresh if isinstance(refresh, Refresh) else Every(refresh)


def _check_interval(what: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"{what} must be an integer ≥ 1, got {steps!r}")
