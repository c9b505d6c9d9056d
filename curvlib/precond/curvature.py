"""The curvature of every block over time: estimates, inverses, how old they are, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import (
    TRANSIENT,
    Vector,
    altered,
    as_array,
    deferred,
    dot,
    evaluated,
    is_finite,
    map_arrays,
    namespace,
    record,
)
from curvlib.capture.loans import Loan
from curvlib.errors import CaptureError, CurvatureError
from curvlib.factors import Factors
from curvlib.layers import Block
from curvlib.precond.damping import Damping
from curvlib.precond.deferral import Later
from curvlib.precond.failure import REFRESH_FAILURES, Failures, PlainGradient, as_failure, raise_naming
from curvlib.precond.gradients import BlockGradient
from curvlib.precond.ladder import factorize_with_retries
from curvlib.precond.refresh import Refresh
from curvlib.precond.transforms import Direction
from curvlib.solvers import Solver

__all__ = ["BlockState", "Renewal", "natural_gradient", "natural_gradients", "residual"]

_AT_ONCE = nullcontext()
"""Around what is checked where it is computed."""

_NOTHING_LENT = Loan()


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
        Refreshes that were given up, so that the last good inverse or the plain gradient was used on.
    retries
        Factorisations that needed more than one attempt.
    mean_eigenvalue
        Trace of the last new curvature over the number of parameters, where the damping asks for it.
    lent
        Tensors of others that the states may lie in, where they were not meant to outlast their step.
    """

    estimate: Any = None
    inverse: Any = None
    damping: float | None = None
    refreshed: int | None = None
    factorized: int | None = None
    failures: int = 0
    retries: int = 0
    mean_eigenvalue: float = 0.0
    lent: Loan = field(default=_NOTHING_LENT, repr=False, metadata=TRANSIENT)


@dataclass(frozen=True, eq=False)
class _Factorization:
    """One that is due: of which block and state, with which damping, and what to go back to when it fails."""

    block: Block
    state: BlockState
    damping: float
    before: BlockState


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
    failures
        What to do about a block that cannot be renewed.
    later
        Takes the checks of factorisations, where nobody waits for them.
    lent
        What the new rows may lie in, by block.
    """

    solvers: Mapping[str, Solver]
    damping: Damping
    refresh: Refresh
    failures: Failures = field(default_factory=Failures)
    later: Later | None = None
    lent: Mapping[str, Loan] = field(default_factory=dict)

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
        RefreshError
            If a block's curvature cannot be renewed and the policy lets nothing stand in.
        """
        result = dict(states)
        waiting: list[_Factorization] = []
        stale = {
            block.name: factors[block.name]
            for block in blocks
            if block.name in factors
            and self._is_stale(block, states[block.name], factors[block.name], gradients.get(block.name))
        }
        estimates = self._updated_all(stale, states)
        for block in blocks:
            state = states[block.name]
            if block.name in stale:
                try:
                    new = self._updated(block, state, stale[block.name], estimates.get(block.name), step)
                except REFRESH_FAILURES as error:
                    self._look_first()
                    result[block.name] = self._given_up(block, state, error, step)
                    continue
                if state.inverse is None or self.refresh.inverse_due(step):
                    wanted = self.damping.at(step, block.name, new.mean_eigenvalue)
                    waiting.append(_Factorization(block, new, wanted, before=state))
                result[block.name] = new
            elif state.inverse is None and block.name in gradients:
                raise CaptureError(
                    f"step {step}: block {block.name!r} has a gradient, but no call of its module was seen in a "
                    "forward pass through the model (with gradients enabled, after the optimizer was made); if its "
                    "parameters are used without calling the module, register an adapter for the module that uses them"
                )
            elif state.inverse is not None:
                if block.name in gradients and state.lent.broken((state.estimate, state.inverse)):
                    raise CaptureError(
                        f"step {step}: block {block.name!r} has a gradient, but its module was not called in this "
                        f"step, and what it was called with in step {state.refreshed} was overwritten since: give "
                        "every batch a tensor of its own, or refresh every few steps only, which copies what is kept"
                    )
                wanted = self.damping.at(step, block.name, state.mean_eigenvalue)
                if wanted != state.damping and state.estimate is not None:
                    waiting.append(_Factorization(block, state, wanted, before=state))
        result.update(self._factorized_all(waiting, step))
        return result

    def _is_stale(self, block: Block, state: BlockState, rows: Factors, gradient: BlockGradient | None) -> bool:
        if self.refresh.tolerance is None or state.inverse is None:
            return True
        if gradient is None:
            return False
        return residual(self.solvers[block.name], state, rows, gradient.vector) > self.refresh.tolerance

    def _updated_all(self, rows: Mapping[str, Factors], states: Mapping[str, BlockState]) -> dict[str, Any]:
        """Estimates of the blocks whose solver takes them together; of none that fails so, nor those with it."""
        together: dict[int, list[str]] = {}
        for name in rows:
            together.setdefault(id(self.solvers[name]), []).append(name)
        made: dict[str, Any] = {}
        for names in together.values():
            own = [states[name].estimate for name in names], [rows[name] for name in names]
            try:
                made.update(zip(names, self.solvers[names[0]].update_all(*own), strict=True))
            except REFRESH_FAILURES:
                continue  # then each by itself shows which it was
        return made

    def _updated(self, block: Block, state: BlockState, rows: Factors, estimate: Any, step: int) -> BlockState:
        if estimate is None:
            estimate = self.solvers[block.name].update(state.estimate, rows)
        mean = state.mean_eigenvalue
        if self.damping.needs_trace:
            trace = sum(float(value.sum()) for value in rows.diagonal().values()) / rows.normalizer
            mean = trace / rows.size
        lent = self.lent.get(block.name, _NOTHING_LENT)
        return altered(state, estimate=estimate, refreshed=step, mean_eigenvalue=mean, lent=lent)

    def _factorized_all(self, waiting: Sequence[_Factorization], step: int) -> dict[str, BlockState]:
        """Factorise blocks of one solver together; where that fails, each by itself with all that can be tried."""
        result: dict[str, BlockState] = {}
        together: dict[int, list[_Factorization]] = {}
        for one in waiting:
            together.setdefault(id(self.solvers[one.block.name]), []).append(one)
        for group in together.values():
            solver = self.solvers[group[0].block.name]
            try:
                with _AT_ONCE if self.later is None else deferred() as checks:
                    inverses = solver.factorize_all(
                        [one.state.estimate for one in group], [one.damping for one in group]
                    )
            except REFRESH_FAILURES as error:
                if as_failure(error) is None:
                    raise
                self._look_first()
                result.update((one.block.name, self._factorized(one, step)) for one in group)
                continue
            if self.later is not None and checks is not None:
                self.later.factorizations.append((group, checks))
            for one, inverse in zip(group, inverses, strict=True):
                result[one.block.name] = altered(one.state, inverse=inverse, damping=one.damping, factorized=step)
        return result

    def _look_first(self) -> None:
        """Where something failed at once, a gradient that is not finite is the cause to be named."""
        if self.later is not None:
            self.later.gradients.raise_if_failed()

    def seen(self, step: int) -> dict[str, BlockState]:
        """States of the blocks whose factorisations were put off and failed: made again, with all that can be tried.

        Parameters
        ----------
        step
            Number of the step that they belong to.

        Raises
        ------
        RefreshError
            As `renewed`.
        """
        result: dict[str, BlockState] = {}
        for group, checks in self.later.factorizations if self.later is not None else ():
            if checks.good is not None and not bool(checks.good):
                result.update((one.block.name, self._factorized(one, step)) for one in group)
        return result

    def _factorized(self, one: _Factorization, step: int) -> BlockState:
        block, state, damping = one.block, one.state, one.damping
        try:
            inverse, retries = factorize_with_retries(self.solvers[block.name], state.estimate, damping)
        except REFRESH_FAILURES as error:
            # The estimate that could not be factorised is not kept either: it would poison an average.
            return self._given_up(block, one.before, error, step)
        if retries:
            self.failures.retried(block.name, step, retries)
        return replace(state, inverse=inverse, damping=damping, factorized=step, retries=state.retries + bool(retries))

    def _given_up(self, block: Block, state: BlockState, error: Exception, step: int) -> BlockState:
        """Return the state of a block whose renewal failed, from the one before."""
        failure = as_failure(error)
        if failure is None:
            raise_naming(error, block.name)
        if state.estimate is not None and not _finite(state.estimate):
            # Poisoned between two factorisations: the next rows begin anew.
            state = replace(state, estimate=None)
        # Where the gradient must be that of the rows, those of an earlier step are of no use.
        useless = isinstance(state.inverse, PlainGradient) or self.solvers[block.name].of_fresh_rows
        # Nor are those of a batch that was written over.
        useless = useless or state.lent.broken((state.estimate, state.inverse))
        good = None if useless else state.factorized
        if self.failures.give_up(block.name, step, failure, good):
            return replace(state, failures=state.failures + 1)
        damping = self.damping.at(step, block.name, state.mean_eigenvalue)
        return replace(state, inverse=PlainGradient(), damping=damping, failures=state.failures + 1)


def _finite(estimate: Any) -> bool:
    good = []

    def look(array: Any) -> Any:
        good.append(not namespace(array).isdtype(array.dtype, "real floating") or is_finite(array))
        return array

    map_arrays(look, estimate)
    return all(good)


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
        return evaluated(natural_gradients({"": solver}, {"": state}, {"": gradient})[""])
    if isinstance(state.inverse, PlainGradient):
        return {name: value / (state.damping or 1.0) for name, value in gradient.items()}
    natural = solver.solve(state.inverse, _wide(gradient))
    return {name: natural[name].to(gradient[name].dtype) for name in gradient}


def natural_gradients(
    solvers: Mapping[str, Solver],
    states: Mapping[str, BlockState],
    gradients: Mapping[str, BlockGradient],
    later: Later | None = None,
) -> dict[str, dict[str, Direction]]:
    """Natural gradients of all blocks that have a gradient; those of one solver are solved for together.

    Parameters
    ----------
    solvers, states, gradients
        By block.
    later
        Takes the checks of solves, where nobody waits for them.
    """
    result: dict[str, dict[str, Direction]] = {}
    together: dict[int, list[str]] = {}
    for name, gradient in gradients.items():
        if isinstance(states[name].inverse, PlainGradient):
            result[name] = dict(natural_gradient(solvers[name], states[name], gradient.vector))
        else:
            together.setdefault(id(solvers[name]), []).append(name)
    for names in together.values():
        given = [gradients[name] for name in names]
        asked = [_wide(one.vector) if one.own or one.rows is None else one.rows.factors for one in given]
        solver, inverses = solvers[names[0]], [states[name].inverse for name in names]
        try:
            with _AT_ONCE if later is None else deferred() as checks:
                naturals = solver.solve_lazily(inverses, asked)
        except REFRESH_FAILURES as error:
            raise_naming(error, *names)
        if later is not None and checks is not None:
            later.directions.take(checks, f"block {' or '.join(map(repr, names))}: ")
        for name, one, natural in zip(names, given, naturals, strict=True):
            scale = 1.0 if one.own or one.rows is None else one.rows.scale
            result[name] = {
                inner: _finished(value, scale, one.parameters[inner].dtype) for inner, value in natural.items()
            }
    return result


def _finished(direction: Direction, scale: float, dtype: torch.dtype) -> Direction:
    """Direction times a number, in the dtype of its parameter."""
    if scale == 1 and direction.dtype == dtype:
        return direction
    value: Tensor = as_array(direction)
    return (value if scale == 1 else value * scale).to(dtype)


def _wide(vector: Vector) -> dict[str, Tensor]:
    return {name: value.float() if value.itemsize < 4 else value for name, value in vector.items()}
