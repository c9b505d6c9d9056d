"""The composed optimizer: an ordinary `torch.optim.Optimizer` whose gradients pass through damped inverse curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.arrays import pack, unpack
from curvlib.capture import Capture, GradientRows, Output
from curvlib.errors import CaptureError, ConfigurationError, CurvatureError
from curvlib.factors import Factors
from curvlib.fisher import Fisher
from curvlib.layers import Partition
from curvlib.precond.curvature import BlockState, Renewal, natural_gradient
from curvlib.precond.damping import Damping
from curvlib.precond.gradients import block_gradients, fresh, gaining, shared_rows
from curvlib.precond.refresh import Refresh
from curvlib.precond.second_pass import evaluate_again, evaluations, followed, needs_closure, require_closure
from curvlib.precond.transforms import Context, Transform
from curvlib.solvers import Solver

__all__ = ["NaturalGradient"]

_STATE_VERSION = 1


class NaturalGradient(torch.optim.Optimizer):
    """Moves along transformed natural gradients; `curvlib.compose` makes it and documents the parameters.

    Attributes
    ----------
    curvature
        Block name to `BlockState`: estimate, inverse, age, failures.
    steps
        Number of steps taken.
    damping, refresh
        May be replaced between steps; a new damping factorises the estimates that are there again.
    solvers
        Block name to solver.
    model, fisher, output, rest
        As given to `curvlib.compose`.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Partition,
        *,
        fisher: Fisher,
        solvers: dict[str, Solver],
        damping: Damping,
        refresh: Refresh,
        transforms: tuple[Transform, ...],
        lr: float,
        rest: str | None,
        output: Output | None,
        seed: int,
        verify: bool,
        fused: bool = False,
    ) -> None:
        if isinstance(lr, bool) or not (isinstance(lr, int | float) and math.isfinite(lr) and lr >= 0):
            raise ConfigurationError(f"lr must be a finite number ≥ 0, got {lr!r}")
        uncovered = list(parts.rest.values())
        inside = [p for block in parts.blocks for p in block.parameters.values()]
        composed = inside + (uncovered if rest == "sgd" else [])
        groups: list[dict[str, Any]] = [{"params": composed}] if composed else []
        self._adamw = torch.optim.AdamW(uncovered) if rest == "adamw" and uncovered else None
        if self._adamw is not None:
            groups += self._adamw.param_groups
        super().__init__(groups, {"lr": float(lr)})
        self.damping = damping
        self.refresh = refresh
        self.model = model
        self.fisher = fisher
        self.output = output
        self.rest = rest
        self.solvers = solvers
        self.transforms = transforms
        self.curvature = {block.name: BlockState() for block in parts.blocks}
        self.steps = 0
        self._due = True
        self._fused = fused
        self._fresh = fresh(fisher, refresh)
        self._blocks = parts.blocks
        self._block_of: dict[Tensor, str] = {p: block.name for block in parts.blocks for p in block.parameters.values()}
        self._composed = len(groups) - (self._adamw is not None)
        self._generator = torch.Generator(device=self.param_groups[0]["params"][0].device).manual_seed(seed)
        self._capture = Capture(model, parts.blocks, fisher, output, self._generator, check=verify)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._link()

    def detach(self) -> None:
        """Remove every hook from the model; no further step can take curvature."""
        self._capture.detach()

    @property
    def needs_closure(self) -> bool:
        """Whether `step` must be given a closure, because the damping or a solver looks at the batch a second time."""
        return bool(needs_closure(self.damping, self.solvers))

    # -- one step -----------------------------------------------------------------------------------------------------

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
            If there is no gradient, a gradient is not finite, or curvature is missing.
        CurvatureError
            If a block's curvature cannot be factorised, not even after retries, and there is no earlier inverse.

        Notes
        -----
        Whatever is raised, parameters and the optimizer's state are as they were, unless the second call of a closure
        raises it.
        """
        require_closure(self.damping, self.solvers, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            factors, rows = shared_rows(self._capture.taken())
            self._check_gradients(loss, rows)
        finally:
            self._capture.clear()
        context, own = self._context(rows)
        if any(transform.on_gradient for transform in self.transforms):
            changed = self._transformed(context.gradients, context, before=True)
            context = replace(context, given=changed)
            own = dict(zip(context.parameters, changed, strict=True))
        curvature, natural = self._natural(own, rows, factors)
        # Outside every block the direction is the gradient itself.
        moves = [natural[p] if p in natural else own[p] for p in context.parameters]
        moves = self._transformed(moves, context, before=False)
        predicted = self._predicted(context, moves, factors) if self._adapts() and factors else None
        before = evaluations(self._blocks, self.solvers, curvature, factors, self.steps)
        for rate in dict.fromkeys(context.rates):
            chosen = [place for place, own in enumerate(context.rates) if own == rate]
            torch._foreach_add_([context.parameters[i] for i in chosen], [moves[i] for i in chosen], alpha=-rate)
        if self._adamw is not None:
            self._adamw.step()
        if closure is not None and (predicted is not None or before):
            parameters = [p for group in self.param_groups for p in group["params"]]
            again, again_rows = evaluate_again(closure, self._capture, parameters, rows=bool(before))
            if predicted is not None:
                self.damping.adapt(self.steps, float(again - loss) / predicted if predicted else math.nan)
            after = evaluations(self._blocks, self.solvers, curvature, again_rows, self.steps)
            curvature = followed(self.solvers, self.refresh, curvature, before, after, self.steps)
        self.curvature = curvature
        self.steps += 1
        # A refresh that found no forward pass to look at stays due.
        self._due = self.refresh.due(self.steps) or (self._due and not factors)
        self._capture.armed = self._due or self._adapts()
        return loss

    def _context(self, rows: Mapping[str, GradientRows]) -> tuple[Context, dict[Tensor, Tensor]]:
        """What transforms may look at, and the gradients that autograd made, by parameter."""
        handed = {p for block in self._blocks if block.name in rows for p in block.parameters.values()}
        active = [
            (p, group["lr"])
            for group in self.param_groups[: self._composed]
            for p in group["params"]
            if p.grad is not None or p in handed
        ]
        own = {p: p.grad for p, _ in active if p.grad is not None}

        def explicit() -> list[Tensor]:
            whole = dict(own)
            for block in self._blocks:
                if block.name in rows:
                    vector = block_gradients([block], own, rows)[block.name].vector
                    whole.update((p, vector[name]) for name, p in block.parameters.items())
            return [whole[p] for p, _ in active]

        context = Context(
            [p for p, _ in active],
            given=explicit,
            rates=[rate for _, rate in active],
            step=self.steps,
            blocks=tuple(self._block_of.get(p, "") for p, _ in active),
        )
        return context, own

    def _transformed(self, directions: list[Tensor], context: Context, before: bool) -> list[Tensor]:
        for index, transform in enumerate(self.transforms):
            if transform.on_gradient == before and directions:
                buffers = self._buffers(index, transform, context.parameters)
                directions = transform.apply(directions, context, buffers)
        return directions

    def _natural(
        self, own: Mapping[Tensor, Tensor], rows: Mapping[str, GradientRows], factors: dict[str, Factors]
    ) -> tuple[dict[str, BlockState], dict[Tensor, Tensor]]:
        """New states of all blocks, and the natural gradient of every parameter in a block that has a gradient."""
        gradients = block_gradients(self._blocks, own, rows)
        renewal = Renewal(self.solvers, self.damping, self.refresh)
        curvature = renewal.renewed(self._blocks, self.curvature, factors if self._due else {}, gradients, self.steps)
        natural: dict[Tensor, Tensor] = {}
        for block in self._blocks:
            if block.name in gradients:
                state, solver, gradient = curvature[block.name], self.solvers[block.name], gradients[block.name]
                direction = natural_gradient(solver, state, gradient)
                if gradient.rows is not None and not self._fresh:
                    self._check_direction(block.name, direction)
                curvature[block.name] = replace(state, estimate=solver.remember(state.estimate, direction))
                given = block.parameters if gradient.rows is not None else gradient.own
                natural.update((block.parameters[name], direction[name]) for name in given)
        if self._fused:
            self._capture.hand_over(gaining(self._blocks, self.solvers, factors, self._fresh))
        return curvature, natural

    # -- damping that follows the loss --------------------------------------------------------------------------------

    def _adapts(self) -> bool:
        return self.damping.needs_loss and self.damping.adapts_at(self.steps)

    def _predicted(self, context: Context, moves: list[Tensor], factors: dict[str, Factors]) -> float:
        """Change of the loss that the quadratic model of the whole network predicts for a step."""
        changes = {p: -rate * move for p, rate, move in zip(context.parameters, context.rates, moves, strict=True)}
        linear = sum(float((g * changes[p]).sum()) for p, g in zip(context.parameters, context.gradients, strict=True))
        total: Tensor | float = 0.0
        for block in self._blocks:
            if block.name in factors:
                names = block.parameters.items()
                change = {name: changes[p] if p in changes else p.new_zeros(p.shape) for name, p in names}
                total = total + factors[block.name].matvec(change)
        normalizer = next(iter(factors.values())).normalizer
        return linear + float((total * total).sum() if isinstance(total, Tensor) else 0.0) / (2 * normalizer)

    def _buffers(self, index: int, transform: Transform, parameters: Iterable[Tensor]) -> dict[str, list[Tensor]]:
        same = sum(type(other) is type(transform) for other in self.transforms[:index])
        prefix = type(transform).__name__ + (str(same + 1) if same else "")
        result: dict[str, list[Tensor]] = {}
        for name in transform.buffers:
            key = f"{prefix}.{name}"
            for p in parameters:
                if key not in self.state[p]:
                    self.state[p][key] = torch.zeros_like(p)
            result[name] = [self.state[p][key] for p in parameters]
        return result

    def _check_direction(self, block: str, direction: Mapping[str, Tensor]) -> None:
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(list(direction.values())))).all()):
            raise CaptureError(
                f"step {self.steps}: the natural gradient of block {block!r} is not finite, as its gradient's rows are "
                "not; parameters and state are unchanged. Look at the loss and the inputs, or lower the learning rate"
            )

    def _check_gradients(self, loss: Any, rows: Mapping[str, GradientRows]) -> None:
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not given and not rows:
            raise CaptureError("step() found no gradient: call loss.backward() before optimizer.step()")
        if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
            raise CaptureError(f"step {self.steps}: the loss is {loss.tolist()}; parameters and state are unchanged")
        if not given:
            return
        if any(p.grad.is_sparse for p in given if p.grad is not None):
            raise CaptureError("gradients must be dense: set sparse=False on the embedding")
        norms = torch._foreach_norm([p.grad for p in given if p.grad is not None])
        finite = torch.isfinite(torch.stack([norm.to(norms[0]) for norm in norms]))
        if not bool(finite.all()):
            bad = [self._names.get(id(p), "?") for p, good in zip(given, finite.tolist(), strict=True) if not good]
            raise CaptureError(
                f"step {self.steps}: the gradient is not finite in {', '.join(bad)}; parameters and state are "
                "unchanged. Look at the loss and the inputs, lower the learning rate, or scale the loss (GradScaler) "
                "under float16"
            )

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: buffers, estimates, inverses, ages, step and label source.

        `torch.load(weights_only=True)` reads it back.
        """
        state = super().state_dict()
        state["curvature"] = {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "due": self._due,
            "damping": self.damping.state(),
            "generator": self._generator.get_state(),
            "blocks": pack(self.curvature),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, whole or not at all.

        Raises
        ------
        CurvatureError
            If it holds no curvature, or that of other blocks or of another version.
        """
        saved = state_dict.get("curvature")
        if not isinstance(saved, dict) or "blocks" not in saved:
            raise CurvatureError("this state holds no curvature: it was not saved by a curvlib optimizer")
        if saved.get("version") != _STATE_VERSION:
            raise CurvatureError(
                f"this state has version {saved.get('version')!r}, this curvlib reads {_STATE_VERSION}"
            )
        curvature = unpack(saved["blocks"])
        if list(curvature) != list(self.curvature):
            raise CurvatureError(
                f"this state belongs to the blocks {list(curvature)}; the model has {list(self.curvature)}"
            )
        generator = saved["generator"].cpu()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "curvature"})
        self.curvature = curvature
        self.steps = int(saved["steps"])
        self._generator.set_state(generator)
        self._capture.clear()
        self.damping.restore(saved["damping"])
        self._due = bool(saved["due"])
        self._capture.armed = self._due or self._adapts()
        self._link()

    def _link(self) -> None:
        """Let the inner AdamW see the same groups and state, so that schedulers and checkpoints reach it."""
        if self._adamw is not None:
            self._adamw.param_groups = self.param_groups[self._composed :]
            self._adamw.state = self.state
