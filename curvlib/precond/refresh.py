"""When curvature is taken anew."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from curvlib.errors import ConfigurationError

__all__ = ["Every", "Refresh"]


class Refresh(ABC):
    """Decides at which steps estimates and inverses are renewed."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether step number `step` (0 is the first) takes new curvature. Step 0 must."""


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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigurationError(f"the refresh interval must be an integer ≥ 1, got {self.steps!r}")

    def due(self, step: int) -> bool:
        return step % self.steps == 0


def as_refresh(refresh: Refresh | int) -> Refresh:
    """Return `refresh` itself, or `Every(refresh)` for a number."""
    return refresh if isinstance(refresh, Refresh) else Every(refresh)
