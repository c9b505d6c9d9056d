"""How much damping a step uses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from curvlib.errors import ConfigurationError

__all__ = ["Constant", "Damping"]


class Damping(ABC):
    """Gives λ of ``curvature + λ · identity`` for each step."""

    @abstractmethod
    def at(self, step: int) -> float:
        """Damping of step number `step`, > 0."""


@dataclass(frozen=True)
class Constant(Damping):
    """The same damping at every step.

    Parameters
    ----------
    value
        λ > 0, in the units of the curvature.
    """

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ConfigurationError(
                f"damping must be a positive finite number, got {self.value!r}; a batch smaller than the block "
                "has a singular curvature without it"
            )

    def at(self, step: int) -> float:
        return float(self.value)


def as_damping(damping: Damping | float) -> Damping:
    """Return `damping` itself, or `Constant(damping)` for a number."""
    if isinstance(damping, Damping):
        return damping
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        raise ConfigurationError(f"damping must be a number > 0 or a Damping, got {damping!r}")
    return Constant(damping)
