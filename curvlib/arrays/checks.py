"""Checks of numbers on a device: at once, or kept there to be looked at when nobody has to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from curvlib.arrays.namespace import Array, namespace
from curvlib.arrays.torch_kernels import is_compiling
from curvlib.errors import NotPositiveDefiniteError

__all__ = ["Deferred", "deferred", "require", "waiting"]


class Deferred:
    """Checks that were put off.

    Until they are read, what was computed in the meantime may be nonsense: multiply by `good`, or choose with it, on
    the device, and raise later.
    """

    def __init__(self) -> None:
        self._checks: list[tuple[Array, Callable[[], str]]] = []

    def add(self, holds: Array, message: Callable[[], str]) -> None:
        """Keep a check for later."""
        self._checks.append((holds, message))

    @property
    def good(self) -> Array | None:
        """Whether all hold, a boolean array of no axes on their device; None where nothing was put off."""
        if not self._checks:
            return None
        values = [holds for holds, _ in self._checks]
        xp = namespace(*values)
        return values[0] if len(values) == 1 else xp.all(xp.stack(values))

    def raise_if_failed(self) -> None:
        """Read the checks, waiting for their device, and forget them.

        Raises
        ------
        NotPositiveDefiniteError
            If one does not hold: with the message of the first.
        """
        checks, self._checks = self._checks, []
        for holds, message in checks:
            if not bool(holds):
                raise NotPositiveDefiniteError(message())


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


def require(holds: Array | bool, message: Callable[[], str]) -> None:
    """Raise unless `holds`, or keep the check for later inside `deferred`.

    Parameters
    ----------
    holds
        A bool, or a boolean array of no axes, which has to be waited for.
    message
        Makes the error's message. It should hold on to no array.

    Raises
    ------
    NotPositiveDefiniteError
        If it does not hold.
    """
    if holds is True or is_compiling():
        return
    checks = _DEFERRED.get()
    if checks is not None and not isinstance(holds, bool):
        checks.add(holds, message)
    elif not bool(holds):
        raise NotPositiveDefiniteError(message())
