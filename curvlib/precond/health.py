"""How the curvature is doing: counters that are there anyway, and numbers that are computed when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlib.precond.spectrum import eigenvalues, quadratic

if TYPE_CHECKING:
    from curvlib.precond.curvature import BlockState
    from curvlib.precond.optimizer import NaturalGradient
    from curvlib.precond.transforms import Context

__all__ = ["BlockHealth", "Health", "Moved"]


class Moved:
    """The move of the last step.

    Parameters
    ----------
    context
        Of the step.
    moves
        What the parameters moved along, times the negative learning rate.
    """

    def __init__(self, context: Context, moves: list[Tensor]) -> None:
        # A gradient may be zeroed in place before anyone looks.
        self.by_parameter = {
            p: (rate, move.clone() if move is p.grad else move)
            for p, rate, move in zip(context.parameters, context.rates, moves, strict=True)
        }


class BlockHealth:
    """Health of one block, as it was when `NaturalGradient.health` was looked at.

    Attributes
    ----------
    failures
        Refreshes that were given up: the last good inverse or the plain gradient was used on, or the step was skipped
        or raised an error.
    retries
        Refreshes that took more than one attempt, in float64 or with more damping.
    staleness
        Steps since the estimate took in new curvature, as of the last step; None before the first.
    damping
        λ that the inverse was asked for; None before the first.
    """

    def __init__(self, state: BlockState, parameters: int, steps: int, stopped: int) -> None:
        self._estimate = state.estimate
        self._parameters = parameters
        self.failures = state.failures + stopped
        self.retries = state.retries
        self.staleness = None if state.refreshed is None else steps - 1 - state.refreshed
        self.damping = state.damping

    @cached_property
    def _eigenvalues(self) -> Tensor | None:
        return None if self._estimate is None else eigenvalues(self._estimate)

    @property
    def condition(self) -> float | None:
        """``(k_max + λ) / (k_min + λ)`` of the damped curvature as the solver has it; None where it has no spectrum."""
        values = self._eigenvalues
        if values is None or self.damping is None:
            return None
        least = float(values.min()) if len(values) >= self._parameters else 0.0
        return (float(values.max()) + self.damping) / (least + self.damping)

    @property
    def effective_dimension(self) -> float | None:
        """``Σ k / (k + λ)``: how many directions the curvature rather than the damping decides; None as above."""
        values = self._eigenvalues
        if values is None or self.damping is None:
            return None
        return float((values / (values + self.damping)).sum())

    def numbers(self) -> dict[str, float | None]:
        """Return everything by name."""
        return {
            "damping": self.damping,
            "staleness": self.staleness,
            "failures": self.failures,
            "retries": self.retries,
            "condition": self.condition,
            "effective_dimension": self.effective_dimension,
        }


class Health(Mapping[str, BlockHealth]):
    """Health of an optimizer: a mapping from block names, and what concerns all of them.

    Attributes
    ----------
    steps
        Steps taken.
    skipped
        Steps that ``on_failure="skip"`` left out.
    refused
        Steps that raised an error.
    last_failure
        The last failure in words; empty if there was none.
    """

    def __init__(self, optimizer: NaturalGradient, moved: Moved | None) -> None:
        failures = optimizer.failures
        self.steps = optimizer.steps
        self.skipped = failures.skipped
        self.refused = failures.refused
        self.last_failure = failures.last
        self._states = dict(optimizer.curvature)
        self._parameters = {block.name: block.parameters for block in optimizer._blocks}
        self._stopped = dict(failures.by_block)
        self._moved = moved
        self._known: dict[str, BlockHealth] = {}

    def __getitem__(self, block: str) -> BlockHealth:
        if block not in self._known:
            size = sum(p.numel() for p in self._parameters[block].values())
            stopped = self._stopped.get(block, 0)
            self._known[block] = BlockHealth(self._states[block], size, self.steps, stopped)
        return self._known[block]

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    @cached_property
    def kl(self) -> float | None:
        """KL divergence of the last step to second order, ``δᵀFδ / 2`` with the curvature that solvers keep.

        None before a step that was watched (`NaturalGradient.health`), and where a solver has no such curvature.
        """
        if self._moved is None:
            return None
        total = 0.0
        with torch.no_grad():
            for name, parameters in self._parameters.items():
                moved = {
                    key: self._moved.by_parameter[p] for key, p in parameters.items() if p in self._moved.by_parameter
                }
                if not moved:
                    continue
                change = {
                    key: _wide(-moved[key][0] * moved[key][1] if key in moved else torch.zeros_like(p))
                    for key, p in parameters.items()
                }
                estimate = self._states[name].estimate
                part = None if estimate is None else quadratic(estimate, change)
                if part is None:
                    return None
                total += part / 2
        return total

    def __repr__(self) -> str:
        lines = [f"{self.steps} steps, {self.skipped} skipped, {self.refused} refused"]
        for name, block in self.items():
            age = "no curvature yet" if block.staleness is None else f"curvature {block.staleness} steps old"
            lines.append(f"  {name}: {age}, {block.failures} failures, {block.retries} retries")
        if self.last_failure:
            lines.append(f"last failure: {self.last_failure}")
        return "\n".join(lines)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor
