"""A training step as a pure function of its state, for `torch.compile` of the whole step as one graph.

The optimizer watches a training loop through hooks and `loss.backward()`, which a compiler cannot look into. Here the
same parts (adapters, solver, transforms) are called in a function from state and batch to new state and loss: the
cotangents are derivatives with respect to zeros that are added to the layers' outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from curvlib.capture.handover import can_withhold
from curvlib.errors import CaptureError, ConfigurationError
from curvlib.layers import Block, partition
from curvlib.precond.transforms import Context, Transform, check_order
from curvlib.solvers import Solver

__all__ = ["PureStep"]

State = dict[str, Any]


class PureStep:
    """Exact or approximate natural-gradient steps on the loss's own rows, renewed at every step.

    `compose` with ``fisher=Empirical()``, ``refresh=1`` takes the same steps.

    Parameters
    ----------
    model
        Network of layers that each are called once, hold their parameters themselves and treat samples apart. It is
        copied; its parameters and buffers are not changed.
    loss
        ``loss(outputs, *targets)``, the mean over samples.
    solver
        For all blocks; any but `Switch`, and `KIS`, which draws its rows in Python, becomes part of a compiled graph.
    damping
        λ > 0.
    lr
        Learning rate.
    transforms
        As in `compose`; not those that look at the gradient or at the number of the step.

    Raises
    ------
    ConfigurationError
        If a layer or a transform has no place in a pure step.

    Notes
    -----
    Within `curvlib.arrays.deferred` a step reads nothing of the device, so it can be captured as a CUDA graph: with
    fixed tensors for the batch, and `write` for the state.

    Examples
    --------
    >>> import torch, curvlib
    >>> model = torch.nn.Linear(4, 3)
    >>> step = curvlib.precond.PureStep(
    ...     model, torch.nn.functional.cross_entropy, solver=curvlib.Woodbury(), damping=0.1, lr=0.1
    ... )
    >>> x, y = torch.ones(8, 4), torch.zeros(8, dtype=torch.long)
    >>> state = step.init(x)
    >>> state, loss = step(state, (x,), (y,))  # or torch.compile(step, fullgraph=True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        *,
        solver: Solver,
        damping: float,
        lr: float,
        transforms: Sequence[Transform] = (),
    ) -> None:
        check_order(transforms)
        for transform in transforms:
            if transform.on_gradient or transform.needs_gradient:
                raise ConfigurationError(f"{transform} looks at the gradient, which a pure step does not make")
        self.model = copy.deepcopy(model)
        parts = partition(self.model)
        unfit = [block.name for block in parts.blocks if not can_withhold(block)]
        if unfit or parts.rest:
            raise ConfigurationError(
                f"a pure step needs layers that are called once, hold their parameters themselves and treat samples "
                f"apart; {unfit + list(parts.rest)} are not so: use compose"
            )
        self.loss, self.solver, self.damping, self.lr = loss, solver, damping, lr
        self.transforms = tuple(transforms)
        self._blocks = parts.blocks
        self._taps: dict[str, Tensor] | None = None
        self._seen: dict[str, Tensor] = {}
        self._names = [(block, name, _full(block, name)) for block in parts.blocks for name in block.parameters]
        for block in parts.blocks:
            block.uses[0].module.register_forward_hook(self._tap(block.name))

    def _tap(self, block: str) -> Callable[..., Tensor]:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._seen[block] = args[0]
            # Without taps the shapes of outputs are asked for.
            if self._taps is None:
                self._seen[f"{block} output"] = output
                return output
            return output + self._taps[block]

        return tap

    def init(self, *inputs: Tensor) -> State:
        """State of a first step on batches of the shape of `inputs`: parameters as the model has them, zero buffers."""
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._taps, self._seen = None, {}
        with torch.no_grad():
            functional_call(self.model, parameters, inputs)
        missing = [block.name for block in self._blocks if f"{block.name} output" not in self._seen]
        if missing:
            raise CaptureError(f"the blocks {missing} were not called by the model")
        taps = {block.name: torch.zeros_like(self._seen[f"{block.name} output"]) for block in self._blocks}
        buffers = {
            f"{place}.{name}": [torch.zeros_like(parameters[full]) for _, _, full in self._names]
            for place, transform in enumerate(self.transforms)
            for name in transform.buffers
        }
        self._seen = {}
        return {"parameters": parameters, "buffers": buffers, "taps": taps}

    @staticmethod
    def write(state: State, new: State, good: Tensor | None = None) -> None:
        """Write a new state over an old one, in place, as a CUDA graph of the step needs it.

        Parameters
        ----------
        state, new
            Before and after a step.
        good
            A boolean on the device, without axes: unless it is true, the old state stays.
        """
        for old, value in zip(_leaves(state), _leaves(new), strict=True):
            if value is not old:
                old.copy_(value if good is None else torch.where(good, value, old))

    def _evaluate(
        self, taps: dict[str, Tensor], parameters: dict[str, Tensor], inputs: Sequence[Tensor], targets: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._taps, self._seen = taps, {}
        loss = self.loss(functional_call(self.model, parameters, tuple(inputs)), *targets)
        seen, self._taps, self._seen = self._seen, None, {}
        return loss, seen

    def __call__(self, state: State, inputs: Sequence[Tensor], targets: Sequence[Any]) -> tuple[State, Tensor]:
        """Take a step.

        Parameters
        ----------
        state
            From `init` or an earlier step; not changed.
        inputs, targets
            What the model and, after the outputs, the loss are called with.

        Returns
        -------
        tuple
            New state, and the loss before the step. Nothing waits for the device, so nothing is raised for values that
            are not finite: look at the loss.
        """
        parameters, taps = state["parameters"], state["taps"]
        cotangents, (loss, seen) = grad_and_value(self._evaluate, has_aux=True)(taps, parameters, inputs, targets)
        natural: dict[str, Tensor] = {}
        for block in self._blocks:
            use, x, g = block.uses[0], seen[block.name], cotangents[block.name]
            rows = use.adapter.function(use.module, x, g[:, None] if use.adapter.columns else g)
            rows = rows.scaled(float(x.shape[0]))
            if self.solver.keeps_rows:
                rows = rows.compact()  # what the solver keeps, so that it knows its own rows in the gradient
            inverse = self.solver.factorize(self.solver.update(None, rows), self.damping)
            direction = self.solver.solve(inverse, rows)
            natural.update((_full(block, inner), direction[inner]) for inner in direction)
        names = [full for _, _, full in self._names]
        old = [parameters[name] for name in names]
        moves = [natural[name] for name in names]
        context = Context(
            old, _no_gradients, [self.lr] * len(names), 0, tuple(block.name for block, _, _ in self._names)
        )
        buffers: dict[str, list[Tensor]] = {}
        for place, transform in enumerate(self.transforms):
            own = {name: [b.clone() for b in state["buffers"][f"{place}.{name}"]] for name in transform.buffers}
            moves = transform.apply(moves, context, own)
            buffers |= {f"{place}.{name}": values for name, values in own.items()}
        moved = {name: p - self.lr * move for name, p, move in zip(names, old, moves, strict=True)}
        return {"parameters": {**parameters, **moved}, "buffers": buffers, "taps": taps}, loss


def _leaves(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [leaf for part in (state.values() if isinstance(state, dict) else state) for leaf in _leaves(part)]


def _full(block: Block, name: str) -> str:
    module = block.uses[0].module_name
    return f"{module}.{name}" if module else name


def _no_gradients() -> list[Tensor]:
    raise ConfigurationError("a pure step makes no gradients")
