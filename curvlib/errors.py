"""The errors and warnings that curvlib raises, each with what was wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ConfigurationError",
    "CurvatureError",
    "CurvatureWarning",
    "DataError",
    "FailureWarning",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "RefreshError",
    "UncoveredParameterError",
]


class CurvatureError(RuntimeError):
    """Base class of every error that curvlib raises on purpose."""


class ConfigurationError(CurvatureError, ValueError):
    """A part was constructed or combined in a way that cannot work."""


class UncoveredParameterError(ConfigurationError):
    """A trainable parameter lies outside every block and nothing says how to treat it."""


class CaptureError(CurvatureError):
    """The forward or backward pass did not give what the curvature needs."""


class NonFiniteError(CaptureError):
    """A loss, a gradient or a natural gradient is infinite or not a number."""


class NotPositiveDefiniteError(CurvatureError):
    """A damped curvature matrix could not be factorised."""


class RefreshError(CurvatureError):
    """The curvature of a block could not be renewed, and nothing may stand in for it.

    Attributes
    ----------
    block
        Name of the block.
    step
        Number of the step.
    cause
        What was raised.
    """

    def __init__(self, block: str, step: int, cause: BaseException, remedy: str) -> None:
        super().__init__(block, step, cause, remedy)
        self.block = block
        self.step = step
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"step {self.step}: block {self.block!r}: {self.cause}. Parameters are unchanged. {self.remedy}"


class DataError(CurvatureError):
    """A data file or folder is missing, corrupt, or cannot be written."""


class CurvatureWarning(UserWarning):
    """Something went on in a degraded way, such as with an older inverse."""


class FailureWarning(CurvatureWarning):
    """A block's curvature could not be renewed as it was asked for; given once for each block and action, then counted.

    Attributes
    ----------
    block
        Name of the block; empty for a step that was skipped as a whole.
    step
        Number of the step.
    cause
        What happened.
    action
        What was done instead: "retried", "kept", "gradient" or "skipped".
    """

    def __init__(self, block: str, step: int, cause: str, action: str, done: str) -> None:
        super().__init__(block, step, cause, action, done)
        self.block = block
        self.step = step
        self.cause = cause
        self.action = action
        self.done = done

    def __str__(self) -> str:
        where = f"step {self.step}: " + (f"block {self.block!r}: " if self.block else "")
        return f"{where}{self.cause}; {self.done}. Further ones are counted in optimizer.health"
