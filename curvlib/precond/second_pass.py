"""A step's batch evaluated again after the parameters moved: the loss for the damping, the rows for solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlib.capture import Capture
from curvlib.errors import CaptureError, ConfigurationError, NotPositiveDefiniteError
from curvlib.factors import Factors
from curvlib.layers import Block
from curvlib.precond.backends import plain
from curvlib.precond.curvature import BlockState
from curvlib.precond.damping import Damping
from curvlib.precond.refresh import Refresh
from curvlib.precond.transforms import Context
from curvlib.solvers import Solver
from curvlib.solvers.base import Evaluation

__all__ = ["evaluate_again", "evaluations", "followed", "needs_closure", "predicted_change", "require_closure"]


def needs_closure(damping: Damping, solvers: Mapping[str, Solver]) -> str:
    """Return why steps need a closure, as the beginning of a sentence; an empty string if they need none."""
    if damping.needs_loss:
        return f"{type(damping).__name__} compares the loss before and after steps"
    for block, solver in solvers.items():
        if solver.of_second_pass:
            return f"{type(plain(solver)).__name__} (block {block!r}) compares the batch before and after steps"
    return ""


def require_closure(damping: Damping, solvers: Mapping[str, Solver], closure: object) -> None:
    """Refuse a step without a closure where one is needed.

    Raises
    ------
    ConfigurationError
        Naming the part that needs it.
    """
    reason = "" if closure is not None else needs_closure(damping, solvers)
    if reason:
        raise ConfigurationError(
            f"{reason}: call optimizer.step(closure) with a function that evaluates the model, calls backward and "
            "returns the loss"
        )


def evaluations(
    blocks: Sequence[Block],
    solvers: Mapping[str, Solver],
    curvature: Mapping[str, BlockState],
    factors: Mapping[str, Factors],
    step: int,
) -> dict[str, Evaluation]:
    """Blocks whose solver follows the step, as they are now; their parameters are copied.

    Parameters
    ----------
    blocks, solvers
        All blocks and their solvers.
    curvature
        States of all blocks; those renewed at this step are followed.
    factors
        Rows of the evaluation.
    step
        Number of the step.
    """
    result = {}
    for block in blocks:
        renewed = curvature[block.name].refreshed == step and curvature[block.name].inverse is not None
        if solvers[block.name].of_second_pass and renewed and block.name in factors:
            # Half precision is solved in float32, as rows come in it.
            parameters = {
                name: p.detach().clone() if p.itemsize >= 4 else p.detach().float()
                for name, p in block.parameters.items()
            }
            result[block.name] = Evaluation(parameters, factors[block.name])
    return result


def predicted_change(
    blocks: Sequence[Block], context: Context, moves: list[Tensor], factors: Mapping[str, Factors]
) -> float:
    """Change of the loss that the quadratic model of the whole network predicts for a step."""
    changes = {p: -rate * move for p, rate, move in zip(context.parameters, context.rates, moves, strict=True)}
    linear = sum(float((g * changes[p]).sum()) for p, g in zip(context.parameters, context.gradients, strict=True))
    total: Tensor | float = 0.0
    for block in blocks:
        if block.name in factors:
            names = block.parameters.items()
            change = {name: changes[p] if p in changes else p.new_zeros(p.shape) for name, p in names}
            total = total + factors[block.name].matvec(change)
    normalizer = next(iter(factors.values())).normalizer
    return linear + float((total * total).sum() if isinstance(total, Tensor) else 0.0) / (2 * normalizer)


def evaluate_again(
    closure: Callable[[], Any], capture: Capture, parameters: Iterable[Tensor], rows: bool
) -> tuple[Any, dict[str, Factors]]:
    """Call the closure once more; gradients are afterwards as they were.

    Parameters
    ----------
    closure
        Evaluates the model, calls backward and returns the loss.
    capture
        What watches the model.
    parameters
        All parameters whose gradients are kept.
    rows
        Whether rows are captured.

    Returns
    -------
    tuple
        What the closure returned, and Factors by block name.
    """
    kept, armed = [(p, p.grad) for p in parameters], capture.armed
    for p, _ in kept:
        p.grad = None  # the closure may zero or add to gradients in place
    capture.armed = rows
    try:
        with torch.enable_grad():
            loss = closure()
        return loss, capture.take() if rows else {}
    finally:
        capture.clear()
        capture.armed = armed
        for p, gradient in kept:
            p.grad = gradient


def followed(
    solvers: Mapping[str, Solver],
    refresh: Refresh,
    curvature: Mapping[str, BlockState],
    before: Mapping[str, Evaluation],
    after: Mapping[str, Evaluation],
    step: int,
) -> dict[str, BlockState]:
    """States after solvers have compared the batch before and after the step.

    Inverses are made anew where `refresh` has them made at this step; one that fails leaves its block as it was.

    Parameters
    ----------
    solvers, refresh
        As in `compose`.
    curvature
        States that the step used.
    before, after
        From `evaluations`.
    step
        Number of the step.

    Raises
    ------
    CaptureError
        If a block has not as many rows after the step as before.
    """
    result = dict(curvature)
    for name in [name for name in before if name in after]:
        state, solver = curvature[name], solvers[name]
        rows = tuple(len(evaluation.factors) for evaluation in (before[name], after[name]))
        if rows[0] != rows[1]:
            raise CaptureError(
                f"step {step}: block {name!r}: the closure gave {rows[0]} rows before the step and {rows[1]} after it, "
                "when the parameters had moved; it must evaluate the same batch whenever it is called"
            )
        estimate = solver.follow(state.estimate, state.inverse, before[name], after[name])
        if not refresh.inverse_due(step) or state.damping is None:
            result[name] = replace(state, estimate=estimate)
            continue
        try:
            inverse = solver.factorize(estimate, state.damping)
        except NotPositiveDefiniteError:
            continue
        result[name] = replace(state, estimate=estimate, inverse=inverse)
    return result
