"""Moving averages of curvature with bias correction."""

from __future__ import annotations

from curvlib.arrays import Array
from curvlib.errors import ConfigurationError

__all__ = ["averaged", "check_decay"]


def averaged(old: Array | None, count: int, new: Array, decay: float) -> Array:
    """Bias-corrected exponential average after one more observation.

    The average of `count` + 1 observations weights them by powers of `decay` that sum to one, so the first is taken
    whole and none starts from zero or from the identity.

    Parameters
    ----------
    old
        Average of the observations so far; None if there are none.
    count
        How many there were.
    new
        The next observation.
    decay
        Weight of the past in [0, 1); 0 forgets it.
    """
    if old is None or decay == 0:
        return new
    weight = (1 - decay) / (1 - decay ** (count + 1))
    return old + weight * (new - old)


def check_decay(decay: float) -> None:
    """Refuse a decay outside [0, 1).

    Raises
    ------
    ConfigurationError
        Naming the value.
    """
    if not 0 <= decay < 1:
        raise ConfigurationError(f"the decay of a moving average must lie in [0, 1), got {decay!r}")
