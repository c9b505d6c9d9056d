"""Gradients as rows: parameters kept out of the autograd graph, so that backward makes no weight gradient for them.

A solver that is given the gradient as fresh rows needs no explicit one: for the loss's own rows the natural gradient is
``Jᵀ w``, at the price of one weight gradient. Computing the ordinary one as well would double it. So while a module
runs, its parameters do not require gradients; whatever else it passes back is autograd's business as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.arrays import Deferred
from curvlib.capture.attached import Hooks
from curvlib.capture.loans import Loan
from curvlib.capture.records import Pass
from curvlib.capture.rows import joined
from curvlib.factors import Factors
from curvlib.layers import Block

__all__ = ["GradientRows", "Taken", "Withholding", "gradient_rows", "rooted"]


@dataclass(frozen=True)
class GradientRows:
    """A block's gradient as fresh rows J: ``scale · Jᵀ1 / normalizer``."""

    factors: Factors
    scale: float


@dataclass(frozen=True)
class Taken:
    """What the passes since the last step gave.

    Parameters
    ----------
    factors
        Rows of the curvature, by block.
    gradients
        Gradients of the blocks that hand theirs over.
    checks
        Of the outputs, where they were put off.
    lent
        What the rows may lie in that were not made to last, by block.
    """

    factors: dict[str, Factors]
    gradients: dict[str, GradientRows]
    checks: list[Deferred] = field(default_factory=list)
    lent: dict[str, Loan] = field(default_factory=dict)


def gradient_rows(
    passes: Sequence[Pass],
    handed: Sequence[Mapping[str, Factors]],
    factors: Mapping[str, Factors],
    blocks: tuple[Block, ...],
    observations: int,
    scale: float,
) -> dict[str, GradientRows]:
    """Gradients of blocks as rows, over the passes in which their parameters were kept out of the graph.

    Parameters
    ----------
    passes
        In their order.
    handed
        Rows of each pass that are of the loss alone.
    factors
        Rows of the curvature. Where they are the loss's own, they are the gradient's too, up to what scaled them.
    blocks, observations, scale
        Blocks, observations of all passes, and what the loss's own rows were multiplied by for the curvature.
    """
    result = {}
    parts = [dict(own) for own in handed]
    for block in blocks:
        name, use = block.name, block.uses[0]
        seen, shared = 0, []
        for place, one in enumerate(passes):
            apart = name in handed[place]
            if apart or name in one.factors:
                seen += 1
                if not apart and use in one.withheld:
                    shared.append(place)
        if shared and len(shared) == seen:
            result[name] = GradientRows(factors[name], observations / scale)
            continue
        for place in shared:
            parts[place][name] = passes[place].factors[name].scaled(1 / scale)
    for name, rows in joined(parts, blocks, observations).items():
        result[name] = GradientRows(rows, float(observations))
    return result


class Withholding:
    """Hooks that keep the parameters of some modules out of the graph during their calls.

    Parameters
    ----------
    wanted
        Whether a call of the block of this name that begins now is to be treated so.

    Attributes
    ----------
    names
        Blocks with hooks.
    always
        Those of them that are treated so in every pass, and not only where rows of the curvature are made anyway.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.names: set[str] = set()
        self.always: set[str] = set()
        self._wanted = wanted
        self._withheld: dict[nn.Module, list[nn.Parameter]] = {}
        self._hooks = Hooks(self)

    def add(self, block: Block, always: bool) -> None:
        """Treat a block's module so, if it can be."""
        if block.name in (self.always if always else self.names) or not can_withhold(block):
            return
        if always:
            self.always.add(block.name)
        if block.name in self.names:
            return
        module, parameters = block.uses[0].module, list(block.parameters.values())

        def begin(module: nn.Module, args: Any) -> None:
            # A module that is there already was interrupted, and its parameters are not where they belong yet.
            if self._wanted(block.name) and module not in self._withheld:
                self._withheld[module] = held = [p for p in parameters if p.requires_grad]
                for p in held:
                    p.requires_grad_(False)

        self.names.add(block.name)
        self._hooks.before(module, begin)

    def end(self, module: nn.Module) -> bool:
        """Put the parameters of a module back whose call has just ended, and tell whether they were kept out of it."""
        held = self._withheld.pop(module, None)
        if held is None:
            return False
        for p in held:
            p.requires_grad_(True)
        return True

    def of(self, blocks: Sequence[Block]) -> tuple[set[str], set[str]]:
        """Names of these blocks that have hooks, and of those treated so always."""
        names = {block.name for block in blocks}
        return self.names & names, self.always & names

    def restore(self) -> None:
        """Put parameters back that a call left out of the graph when it was interrupted."""
        for held in self._withheld.values():
            for p in held:
                p.requires_grad_(True)
        self._withheld.clear()

    def detach(self) -> None:
        """Remove the hooks."""
        self.restore()
        self._hooks.remove()
        self.names.clear()
        self.always.clear()


def can_withhold(block: Block) -> bool:
    """Whether a block is one module that holds its parameters itself and treats samples apart."""
    if len(block.uses) != 1:
        return False
    module, adapter = block.uses[0].module, block.uses[0].adapter
    if adapter.whole_call or not adapter.closed_form or adapter.couples(module):
        return False
    own = {id(p) for p in module._parameters.values()}
    return all(id(p) in own for p in block.parameters.values())


def rooted(output: Any) -> Any:
    """Output of a call whose parameters were kept out; the graph begins at it if nothing went in that has one."""
    if not isinstance(output, Tensor) or output.requires_grad:
        return output
    return _Root.apply(torch.zeros((), requires_grad=True), [output])  # type: ignore[no-untyped-call]  # in torch


class _Root(torch.autograd.Function):
    """A tensor as the beginning of a graph. It may be changed in place afterwards, as any output may."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, holder: list[Tensor]) -> Tensor:
        return holder[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None
