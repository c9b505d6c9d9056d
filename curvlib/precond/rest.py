"""What becomes of parameters outside every block, when the caller says so."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from curvlib.errors import ConfigurationError, UncoveredParameterError

__all__ = ["REST", "check_rest"]

REST = ("fallback", "sgd", "adamw", "freeze")
"""fallback: blocks of their own, by the exact fallback over the module that holds them; sgd: the plain gradient,
through the same transforms; adamw: an AdamW of their own; freeze: they stay as they are."""


def check_rest(rest: str | None, uncovered: Mapping[str, nn.Parameter]) -> None:
    """Refuse uncovered parameters that nothing is said about.

    Raises
    ------
    UncoveredParameterError
        Naming them and the ways to treat them.
    ConfigurationError
        If `rest` is no known policy.
    """
    if rest is not None and rest not in REST:
        raise ConfigurationError(f"rest must be one of {', '.join(map(repr, REST))}, got {rest!r}")
    if rest is None and uncovered:
        names = ", ".join(repr(name) for name in uncovered)
        raise UncoveredParameterError(
            f"no block covers the parameters {names}: modules hold them beside other parametrised modules. Either "
            "register an adapter for the module that owns them (curvlib.layers.register), or say how to treat them "
            "with rest='fallback' (exact curvature, by calling that module once more), rest='sgd' (plain gradient, "
            "same transforms), rest='adamw' or rest='freeze'"
        )
