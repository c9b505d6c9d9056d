"""The curvature of every block over time: estimates, inverses, how old they are, and what happens when one fails."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from curvlib.arrays import Vector, dot, record
from curvlib.errors import CaptureError, CurvatureError, CurvatureWarning, NotPositiveDefiniteError
from curvlib.factors import Factors
from curvlib.layers import Block
from curvlib.precond.damping import Damping
from curvlib.precond.gradients import BlockGradient
from curvlib.precond.ladder import factorize_with_retries
from curvlib.precond.refresh import Refresh
from curvlib.solvers import Solver

__all__ = ["BlockState", "Renewal", "natural_gradient", "residual"]


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
    factorized
        Step at which the inverse was made.
    failures
        How many factorisations needed a retry or kept the last good inverse.
    mean_eigenvalue
        Trace of the last new curvature over the number of parameters, where the damping asks for it.
    """

    estimate: Any = None
    inverse: Any = None
    damping: float | None = None
    refreshed: int | None = None
    factorized: int | None = None
    failures: int = 0
    mean_eigenvalue: float = 0.0


@dataclass(frozen=True)
class Renewal:
    """What decides which states are renewed, and how.

    Parameters
    ----------
    solvers
        Solver of every block.
    damping
        λ of every block and step.
    refresh
        When new rows are looked at, used and factorised.
    """

    solvers: Mapping[str, Solver]
    damping: Damping
    refresh: Refresh

    def renewed(
        self,
        blocks: Sequence[Block],
        states: Mapping[str, BlockState],
        factors: Mapping[str, Factors],
        gradients: Mapping[str, BlockGradient],
        step: int,
    ) -> dict[str, BlockState]:
        """Return the states after new curvature, where there is some, and after a change of damping.

        Nothing given is modified.

        Parameters
        ----------
        blocks
            All blocks.
        states
            Their states.
        factors
            New rows of blocks.
        gradients
            Gradients of the blocks that take part in the step.
        step
            Number of the step.

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
            if rows is not None and self._is_stale(block, state, rows, gradients.get(block.name)):
                result[block.name] = self._updated(block, state, rows, step)
            elif state.inverse is None and block.name in gradients:
                raise CaptureError(
                    f"step {step}: block {block.name!r} has a gradient, but no call of its module was seen in a "
                    "forward pass through the model (with gradients enabled, after the optimizer was made); if its "
                    "parameters are used without calling the module, register an adapter for the module that uses them"
                )
            elif state.inverse is not None:
                wanted = self.damping.at(step, block.name, state.mean_eigenvalue)
                if wanted != state.damping:
                    result[block.name] = self._factorized(block, state, wanted, step)
        return result

    def _is_stale(self, block: Block, state: BlockState, rows: Factors, gradient: BlockGradient | None) -> bool:
        if self.refresh.tolerance is None or state.inverse is None:
            return True
        if gradient is None:
            return False
        return residual(self.solvers[block.name], state, rows, gradient.vector) > self.refresh.tolerance

    def _updated(self, block: Block, state: BlockState, rows: Factors, step: int) -> BlockState:
        estimate = self.solvers[block.name].update(state.estimate, rows)
        mean = state.mean_eigenvalue
        if self.damping.needs_trace:
            trace = sum(float(value.sum()) for value in rows.diagonal().values()) / rows.normalizer
            mean = trace / rows.size
        new = replace(state, estimate=estimate, refreshed=step, mean_eigenvalue=mean)
        if state.inverse is not None and not self.refresh.inverse_due(step):
            return new
        return self._factorized(block, new, self.damping.at(step, block.name, mean), step, before=state)

    def _factorized(
        self, block: Block, state: BlockState, damping: float, step: int, before: BlockState | None = None
    ) -> BlockState:
        try:
            inverse, retries = factorize_with_retries(self.solvers[block.name], state.estimate, damping)
        except NotPositiveDefiniteError as error:
            where = f"step {step}: block {block.name!r}: {error}"
            if state.inverse is None:
                raise CurvatureError(
                    f"{where}. Parameters are unchanged. Look for non-finite activations or labels; otherwise raise "
                    "the damping"
                ) from error
            _warn(f"{where}; the inverse of step {state.factorized} is used on ({state.failures + 1} failures so far)")
            # The estimate that could not be factorised is not kept either: it would poison an average.
            return replace(before or state, failures=state.failures + 1)
        if retries:
            _warn(f"step {step}: block {block.name!r} was factorised {'; '.join(retries)}")
        failures = state.failures + bool(retries)
        return replace(state, inverse=inverse, damping=damping, factorized=step, failures=failures)


def _warn(message: str) -> None:
    warnings.warn(message, CurvatureWarning, stacklevel=6)


def residual(solver: Solver, state: BlockState, rows: Factors, gradient: Vector) -> float:
    """``‖(F + λI) p − g‖ / ‖g‖`` for the curvature F of given rows and the natural gradient p of the present inverse.

    Parameters
    ----------
    solver, state
        Of the block; the state has an inverse.
    rows
        Factors whose curvature is F.
    gradient
        g.
    """
    if state.damping is None:
        raise CurvatureError("a block without an inverse has no residual")
    natural = natural_gradient(solver, state, gradient)
    product = rows.rmatvec(rows.matvec(natural))
    difference = {
        name: product[name] / rows.normalizer + state.damping * natural[name] - gradient[name] for name in gradient
    }
    size = float(dot(gradient, gradient)) ** 0.5
    return 0.0 if size == 0 else float(dot(difference, difference)) ** 0.5 / size


def natural_gradient(solver: Solver, state: BlockState, gradient: Vector | BlockGradient) -> dict[str, Tensor]:
    """Natural gradient of a block, in the dtypes of its gradient; half precision is solved in float32."""
    if isinstance(gradient, BlockGradient):
        if gradient.rows is not None and not gradient.own:
            natural, scale = solver.solve(state.inverse, gradient.rows.factors), gradient.rows.scale
            dtypes = {name: p.dtype for name, p in gradient.parameters.items()}
            return {name: (value if scale == 1 else value * scale).to(dtypes[name]) for name, value in natural.items()}
        gradient = gradient.vector
    wide = {name: value.float() if value.itemsize < 4 else value for name, value in gradient.items()}
    natural = solver.solve(state.inverse, wide)
    return {name: natural[name].to(gradient[name].dtype) for name in gradient}
