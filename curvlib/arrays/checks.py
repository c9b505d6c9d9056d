"""Checks of numbers on a device: at once, or kept there to be looked at when nobody has to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from curvlib.arrays.host import is_compiling
from curvlib.arrays.namespace import Array, namespace
from curvlib.errors import CurvatureError, NotPositiveDefiniteError

__all__ = ["Deferred", "deferred", "is_compiling", "require", "waiting"]


class Deferred:
    """Checks that were put off.

    Until they are read, what was computed in the meantime may be nonsense: multiply by `good`, or choose with it, on
    the device, and raise later.
    """

    def __init__(self) -> None:
        self._checks: list[tuple[Array, Callable[[], str], type[CurvatureError]]] = []

    def add(
        self, holds: Array, message: Callable[[], str], kind: type[CurvatureError] = NotPositiveDefiniteError
    ) -> None:
        """Keep a check for later; as for `require`."""
        self._checks.append((holds, message, kind))

    def take(self, other: Deferred, where: str = "") -> None:
        """Take over the checks of another one, behind those that are there; their messages begin with `where`."""
        for holds, message, kind in other._checks:
            self.add(holds, partial(_placed, where, message), kind)
        other._checks = []

    @property
    def good(self) -> Array | None:
        """Whether all hold, a boolean array of no axes on their device; None where nothing was put off."""
        if not self._checks:
            return None
        values = [holds for holds, _, _ in self._checks]
        xp = namespace(*values)
        return values[0] if len(values) == 1 else xp.all(xp.stack(values))

    def raise_if_failed(self) -> None:
        """Read the checks, waiting for their device, and forget them.

        Raises
        ------
        CurvatureError
            If one does not hold: that of the first, as a rule a `NotPositiveDefiniteError`.
        """
        checks, self._checks = self._checks, []
        for holds, message, kind in checks:
            if not bool(holds):
                raise kind(message())


def _placed(where: str, message: Callable[[], str]) -> str:
    return where + message()


_DEFERRED: ContextVar[Deferred | None] = ContextVar("_DEFERRED", default=None)


@contextmanager
def deferred() -> Iterator[Deferred]:
    """Put off the checks of factorisations inside, so that none waits for a device.

    What a library looks at by itself is raised at once all the same: torch's eigendecomposition on CUDA, and all of
    CuPy's and NumPy's decompositions.
    """
    checks = Deferred()
    token = _DEFERRED.set(checks)
    try:
        yield checks
    finally:
        _DEFERRED.reset(token)


def waiting() -> bool:
    """Whether checks are read at once. In a graph that a compiler makes, they are not read at all."""
    return not is_compiling() and _DEFERRED.get() is None


def require(
    holds: Array | bool, message: Callable[[], str], kind: type[CurvatureError] = NotPositiveDefiniteError
) -> None:
    """Raise unless `holds`, or keep the check for later inside `deferred`.

    Parameters
    ----------
    holds
        A bool, or a boolean array of no axes, which has to be waited for.
    message
        Makes the error's message. It should hold on to no array of many elements.
    kind
        Of the error.

    Raises
    ------
    CurvatureError
        Of that kind, if it does not hold.
    """
    if holds is True or is_compiling():
        return
    checks = _DEFERRED.get()
    if checks is not None and not isinstance(holds, bool):
        checks.add(holds, message, kind)
    elif not bool(holds):
        raise kind(message())
