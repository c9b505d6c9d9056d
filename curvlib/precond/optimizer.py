"""The composed optimizer: an ordinary `torch.optim.Optimizer` whose gradients pass through damped inverse curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import Deferred, in_pieces
from curvlib.capture import GradientRows
from curvlib.capture.autocast import without_autocast
from curvlib.errors import CaptureError
from curvlib.factors import Factors
from curvlib.precond.applied import transformed
from curvlib.precond.callbacks import Callback, check_callback, guarded
from curvlib.precond.checks import check_directions, check_finite_gradients, check_gradients, check_unscaled
from curvlib.precond.curvature import BlockState, Renewal, natural_gradients
from curvlib.precond.deferral import Unseen, Verdict, selected
from curvlib.precond.deferring import Deferring
from curvlib.precond.division import Division
from curvlib.precond.failure import Failures, OnFailure
from curvlib.precond.gradients import block_gradients, gaining, remembering, scaled_rows, turned
from curvlib.precond.groups import ByGroup, Group, check_options, one_sign
from curvlib.precond.health import Health, Moved
from curvlib.precond.second_pass import (
    evaluate_again,
    evaluations,
    followed,
    predicted_change,
    require_closure,
)
from curvlib.precond.transforms import Context, Direction
from curvlib.solvers import Solver

__all__ = ["NaturalGradient"]


class NaturalGradient(Deferring):
    """Moves along transformed natural gradients; `curvlib.compose` makes it and documents the parameters.

    Attributes
    ----------
    curvature
        Block name to `BlockState`: estimate, inverse, age, failures.
    steps
        Number of steps taken.
    damping
        Of blocks whose groups have none. Assigning another one, a number too, is for all groups; the estimates that are
        there are factorised again.
    refresh
        May be replaced between steps.
    solvers
        Block name to the solver at work.
    model, fisher, output, rest
        As given to `curvlib.compose`.
    """

    def __init__(
        self, division: Division, *, on_failure: OnFailure = "keep", callbacks: Iterable[Callback] = (), **options: Any
    ) -> None:
        failures, callbacks = Failures(on_failure), [check_callback(callback) for callback in callbacks]
        super().__init__(division, **options)
        self.failures = failures
        self._capture.lenient = on_failure == "skip"
        self.callbacks = callbacks
        self._watched = bool(self.callbacks)

    @property
    def health(self) -> Health:
        """What failed and how good the curvature is, computed when it is looked at.

        From the first look on, a step keeps its move until the next one, for the KL divergence.
        """
        self._look()
        self._watched = True
        return Health(self, self._moved)

    def add_callback(self, callback: Callback) -> None:
        """Call ``callback(optimizer, loss)`` after every step, after those that are there; see `compose`."""
        self.callbacks.append(check_callback(callback))
        self._watched = True

    # -- one step -----------------------------------------------------------------------------------------------------

    @guarded
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure
            Reevaluates the model, calls backward and returns the loss; optional where `needs_closure` is false. It is
            called once, or where something compares the batch before and after the step, a second time after it: on
            the same batch, with the same random masks if there are any.

        Returns
        -------
        Any
            What the closure returned.

        Raises
        ------
        ConfigurationError
            If there is no closure where one is needed.
        CaptureError
            If there is no gradient, or curvature is missing.
        NonFiniteError
            If a loss, a gradient or a natural gradient is not finite; not under ``on_failure="skip"``.
        RefreshError
            If a block's curvature cannot be renewed and `on_failure` lets nothing stand in.

        Notes
        -----
        Whatever is raised, parameters and the optimizer's state are as they were, unless the second call of a closure
        raises it. Where checks are put off (`deferred`), what is raised is about the step before, by its number: that
        one is undone, and this one is not taken. Call `step` again to take it.
        """
        if self._capture.detached:
            raise CaptureError(
                "this optimizer was detached from its model: compose another one, and load this one's state_dict() "
                "into it"
            )
        check_unscaled(self)
        require_closure(self.damping, self.solvers, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._look(stepping=True)
        self._notice_frozen()
        try:
            with without_autocast(self._generator.device):
                taken = self._capture.taken()
                factors, rows = taken.factors, scaled_rows(taken)
            later = self._later(rows)
            waiting = None if later is None else later.gradients
            for checks in taken.checks:
                elsewhere = checks.good is not None and checks.good.device != self._device
                checks.raise_if_failed() if waiting is None or elsewhere else waiting.take(checks)
            check_gradients(self.param_groups, loss, rows, self.steps, waiting)
            early = [transform for transform in self.transforms if transform.on_gradient]
            if later is not None or factors or self._due or early:
                self._check_finite(waiting)  # before what is costly; otherwise with the directions
            self._untouched.check()
        finally:
            self._capture.clear()
            self._untouched.clear()
        for group in self._own_groups():
            check_options(group, self.transforms)
        self._read_solvers()
        upwards = [name for name, up in self._said("maximize").items() if up]
        factors, rows = turned(remembering(factors, rows), rows, upwards, self.fisher)
        context, own = self._context(rows)
        in_place, host = self._before(later)
        if early:
            changed = transformed(self.transforms, self.state, context.gradients, context, before=True)
            context = replace(context, given=changed)
            own = dict(zip(map(id, context.parameters), changed, strict=True))
        used = factors if self._due else {name: rows for name, rows in factors.items() if name in self._wanting}
        solvers, asked, curvature = self._switched(used)
        with without_autocast(self._generator.device):
            damping = ByGroup(self.damping, self._said("damping"))
            renewal = Renewal(solvers, damping, self.refresh, self.failures, later, taken.lent)
            curvature, natural = self._natural(renewal, curvature, own, rows, factors, used)
            # Outside every block the direction is the gradient itself.
            directions = [natural[id(p)] if id(p) in natural else own[id(p)] for p in context.parameters]
            moves = transformed(self.transforms, self.state, directions, context, before=False)
        adapts = self._adapts() and bool(factors)
        predicted = predicted_change(self._blocks, context, moves, factors) if adapts else None
        before = evaluations(self._blocks, solvers, curvature, factors, self.steps)
        if later is not None:
            good = later.good
            moves = selected(good, moves)
        for rate in dict.fromkeys(context.rates):
            chosen = [place for place, own in enumerate(context.rates) if own == rate]
            torch._foreach_add_(
                *in_pieces([context.parameters[i] for i in chosen], [moves[i] for i in chosen]), alpha=-rate
            )
        if self._adamw is not None:
            self._adamw.step()
        if later is not None:
            in_place.keep_if(good)
            self._unseen = Unseen(self.steps, Verdict(good), later, renewal, in_place, host)
        if closure is not None and (predicted is not None or before):
            parameters = [p for group in self.param_groups for p in group["params"]]
            again, again_rows = evaluate_again(closure, self._capture, parameters, rows=bool(before))
            if predicted is not None:
                change = one_sign(self._own_groups()) * float(again - loss)
                self.damping.adapt(self.steps, change / predicted if predicted else math.nan)
            again_rows, _ = turned(again_rows, {}, upwards, self.fisher)
            after = evaluations(self._blocks, solvers, curvature, again_rows, self.steps)
            with without_autocast(self._generator.device):
                curvature = followed(solvers, self.refresh, curvature, before, after, self.steps)
            self._untouched.clear()
        self._moved = Moved(context, moves) if self._watched else None
        self.curvature, self.solvers, self._asked = curvature, solvers, asked
        self.steps += 1
        self._wanting -= used.keys()
        # A refresh that found no forward pass to look at stays due.
        self._due = self.refresh.due(self.steps) or (self._due and not factors)
        self._arm()
        return loss

    def _check_finite(self, later: Deferred | None = None) -> None:
        check_finite_gradients(self.param_groups, self.model, self.steps, later)

    def _context(self, rows: Mapping[str, GradientRows]) -> tuple[Context, dict[int, Tensor]]:
        """What transforms may look at, and the gradients that autograd made, by the parameters' ids."""
        active: list[Tensor] = []
        blocks: list[str] = []
        groups: list[Group] = []
        own: dict[int, Tensor] = {}
        for group in self._own_groups():
            for p in group["params"]:
                block, gradient = self._block_of.get(id(p)), p.grad
                ours = block is not None or id(p) in self._plain
                if (ours and gradient is not None) or block in rows:
                    active.append(p)
                    blocks.append(block or "")
                    groups.append(group)
                    if gradient is not None:
                        own[id(p)] = -gradient if group["maximize"] else gradient

        def explicit() -> list[Tensor]:
            whole = dict(own)
            for block in self._blocks:
                if block.name in rows:
                    vector = block_gradients([block], own, rows)[block.name].vector
                    whole.update((id(p), vector[name]) for name, p in block.parameters.items())
            return [whole[id(p)] for p in active]

        rates = [float(group["lr"]) for group in groups]
        return Context(active, explicit, rates, self.steps, tuple(blocks), tuple(groups)), own

    def _switched(
        self, used: Mapping[str, Factors]
    ) -> tuple[dict[str, Solver], dict[str, Solver], dict[str, BlockState]]:
        """Solvers, what they are called by, and states, where blocks with new rows begin with another solver."""
        same = self._wanted == self._asked  # as dictionaries, which look at the values of the same solver no further
        new = {} if same else {name: self._wanted[name] for name in used if self._wanted[name] != self._asked[name]}
        if not new:
            return self.solvers, self._asked, self.curvature
        made = self._division.at_work(new, [block for block in self._blocks if block.name in new])
        fresh_states = {name: BlockState() for name in new}
        return {**self.solvers, **made}, {**self._asked, **new}, {**self.curvature, **fresh_states}

    def _natural(
        self,
        renewal: Renewal,
        states: Mapping[str, BlockState],
        own: Mapping[int, Tensor],
        rows: Mapping[str, GradientRows],
        factors: dict[str, Factors],
        used: Mapping[str, Factors],
    ) -> tuple[dict[str, BlockState], dict[int, Direction]]:
        """New states of all blocks, and the natural gradient of every parameter in a block that has one, by its id."""
        gradients = block_gradients(self._blocks, own, rows)
        curvature = renewal.renewed(self._blocks, states, used, gradients, self.steps)
        natural: dict[int, Direction] = {}
        later = renewal.later
        # Rows that are not finite have no Cholesky factor, so what an exact solver made of them needs no second look.
        sound = self._always and self.fisher.needs_backward
        directions = natural_gradients(renewal.solvers, curvature, gradients, later)
        looked = {
            name: direction
            for name, direction in directions.items()
            if not (sound and name in rows and renewal.solvers[name].exact)
        }
        for block in self._blocks:
            if block.name in gradients:
                state, gradient, direction = curvature[block.name], gradients[block.name], directions[block.name]
                if state.estimate is not None:
                    estimate = renewal.solvers[block.name].remember(state.estimate, direction)
                    if estimate is not state.estimate:
                        curvature[block.name] = replace(state, estimate=estimate)
                given = block.parameters if gradient.rows is not None else gradient.own
                for name in given:
                    natural[id(block.parameters[name])] = direction[name]
        # Gradients outside every block too: those of frozen parameters, and what the inner AdamW is about to use.
        everything: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        others = [p.grad for p in everything if p.grad is not None and id(p) not in natural]
        waiting = None if later is None else later.directions
        check_directions(looked, others, self.steps, cause=self._check_finite, later=waiting)
        if self._fused:
            self._hand_over(renewal.solvers, factors)
        return curvature, natural

    def _hand_over(self, solvers: Mapping[str, Solver], factors: Mapping[str, Factors]) -> None:
        """Take the gradients of blocks as rows from now on whose solver gains from it."""
        alike = self.fisher.needs_backward  # the loss's rows are the curvature's
        always, sometimes = self._capture.handed_over(always=True), self._capture.handed_over()
        rest = [block for block in self._blocks if block.name in factors and block.name not in always]
        every = gaining(rest, solvers, factors, self._always and alike, self._always)
        some: list[str] = []
        if not self._always:  # else there is nothing to tell apart
            rest = [block for block in rest if block.name not in sometimes]
            some = gaining(rest, solvers, factors, self._at_once and alike, self._at_once)
        if every or some:
            self._capture.hand_over(every, with_curvature=some)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "on_failure": self.failures.policy}
