"""The errors and warnings that curvlib raises, each with what was wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ConfigurationError",
    "CurvatureError",
    "CurvatureWarning",
    "DataError",
    "NotPositiveDefiniteError",
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


class NotPositiveDefiniteError(CurvatureError):
    """A damped curvature matrix could not be factorised."""


class DataError(CurvatureError):
    """A data file or folder is missing, corrupt, or cannot be written."""


class CurvatureWarning(UserWarning):
    """Something went on in a degraded way, such as with an older inverse."""
