"""What is tried when a damped curvature cannot be factorised, before anything is given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from curvlib.errors import ConfigurationError, NotPositiveDefiniteError
from curvlib.precond.factorized import FactorizedIn
from curvlib.solvers import Solver

__all__ = ["factorize_with_retries"]

_MORE_DAMPING = (10.0, 100.0, 1000.0)


def factorize_with_retries(solver: Solver, estimate: Any, damping: float) -> tuple[Any, list[str]]:
    """Factorise; on failure in float64, then with more and more damping.

    Float64 comes first because it leaves the problem as it was posed.

    Parameters
    ----------
    solver, estimate, damping
        As in `Solver.factorize`.

    Returns
    -------
    tuple
        The inverse, and what had to be done to get it (empty if nothing).

    Raises
    ------
    NotPositiveDefiniteError
        If every rung failed.
    """
    wider = FactorizedIn(solver)
    rungs: list[tuple[str, Callable[[], Any]]] = [
        ("", lambda: solver.factorize(estimate, damping)),
        ("in float64", lambda: wider.factorize(estimate, damping)),
    ]
    for factor in _MORE_DAMPING:
        more = damping * factor
        rungs.append((f"with damping {more:g}", lambda more=more: wider.factorize(estimate, more)))  # type: ignore[misc]  # mypy cannot type a default
    tried: list[str] = []
    for what, attempt in rungs:
        try:
            inverse = attempt()
        except NotPositiveDefiniteError as error:
            failure = error
        except ConfigurationError as error:  # a method may have no meaning with as much damping
            if not what:
                raise
            failure = NotPositiveDefiniteError(str(error))
        else:
            return inverse, [*tried, what] if what else []
        if what:
            tried.append(f"failed {what}")
    raise NotPositiveDefiniteError(f"{failure}; {', '.join(tried)}")
