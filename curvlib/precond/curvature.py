"""The curvature of every block over time: estimates, inverses, how old they are, and what happens when one fails."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from curvlib.arrays import record
from curvlib.errors import CaptureError, CurvatureError, CurvatureWarning, NotPositiveDefiniteError
from curvlib.factors import Factors
from curvlib.layers import Block
from curvlib.precond.ladder import factorize_with_retries
from curvlib.solvers import Solver

__all__ = ["BlockState", "natural_gradient", "refreshed"]


@record
@dataclass(frozen=True, eq=False)
class BlockState:
    """Curvature of one block.

    Parameters
    ----------
    estimate, inverse
        The solver's two states; None before the first refresh.
    damping
        λ that the inverse was asked for.
    refreshed
        Step at which the estimate last took in new curvature.
    failures
        How many factorisations needed a retry or kept the last good inverse.
    """

    estimate: Any = None
    inverse: Any = None
    damping: float | None = None
    refreshed: int | None = None
    failures: int = 0


def refreshed(
    blocks: Sequence[Block],
    solvers: Mapping[str, Solver],
    states: Mapping[str, BlockState],
    factors: Mapping[str, Factors],
    damping: float,
    step: int,
) -> dict[str, BlockState]:
    """Return the states after new curvature, where there is some, and after a change of damping.

    Only estimates that changed, or whose damping did, are factorised; nothing given is modified.

    Raises
    ------
    CaptureError
        If a block has a gradient but no curvature, new or old.
    CurvatureError
        If a block's curvature cannot be factorised and there is no earlier inverse.
    """
    result = dict(states)
    for block in blocks:
        state, rows = states[block.name], factors.get(block.name)
        if rows is not None:
            estimate = solvers[block.name].update(state.estimate, rows)
            result[block.name] = _factorized(block, solvers[block.name], state, estimate, damping, step, step)
        elif state.inverse is None and any(p.grad is not None for p in block.parameters.values()):
            raise CaptureError(
                f"step {step}: block {block.name!r} has a gradient, but no call of its module was seen in a forward "
                "pass through the model (with gradients enabled, after the optimizer was made); if its parameters are "
                "used without calling the module, register an adapter for the module that uses them"
            )
        elif state.inverse is not None and state.damping != damping:
            result[block.name] = _factorized(
                block, solvers[block.name], state, state.estimate, damping, state.refreshed, step
            )
    return result


def _factorized(
    block: Block,
    solver: Solver,
    state: BlockState,
    estimate: Any,
    damping: float,
    taken: int | None,
    step: int,
) -> BlockState:
    try:
        inverse, retries = factorize_with_retries(solver, estimate, damping)
    except NotPositiveDefiniteError as error:
        where = f"step {step}: block {block.name!r}: {error}"
        if state.inverse is None:
            raise CurvatureError(
                f"{where}. Parameters are unchanged. Look for non-finite activations or labels; otherwise raise the "
                "damping"
            ) from error
        _warn(f"{where}; the inverse of step {state.refreshed} is used on ({state.failures + 1} failures so far)")
        return replace(state, failures=state.failures + 1)
    if retries:
        _warn(f"step {step}: block {block.name!r} was factorised {'; '.join(retries)}")
    return BlockState(estimate, inverse, damping, taken, state.failures + bool(retries))


def _warn(message: str) -> None:
    warnings.warn(message, CurvatureWarning, stacklevel=5)


def natural_gradient(block: Block, solver: Solver, state: BlockState) -> dict[str, Tensor]:
    """Natural gradient of a block from its parameters' gradients; a missing gradient counts as zero.

    Returns
    -------
    dict
        Name inside the block to direction, in the parameter's dtype.
    """
    gradient = {
        name: p.new_zeros(p.shape) if p.grad is None else p.grad.detach() for name, p in block.parameters.items()
    }
    wide = {name: g.float() if g.itemsize < 4 else g for name, g in gradient.items()}
    natural = solver.solve(state.inverse, wide)
    return {name: natural[name].to(gradient[name].dtype) for name in gradient}
