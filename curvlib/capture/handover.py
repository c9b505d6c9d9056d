"""Gradients as rows: parameters kept out of the autograd graph, so that backward makes no weight gradient for them.

A solver that is given the gradient as fresh rows needs no explicit one: for the loss's own rows the natural gradient is
``Jᵀ w``, at the price of one weight gradient. Computing the ordinary one as well would double it. So while a module
runs, its parameters do not require gradients; whatever else it passes back is autograd's business as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvlib.factors import Factors
from curvlib.layers import Block

__all__ = ["GradientRows", "Taken", "Withholding"]


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
    """

    factors: dict[str, Factors]
    gradients: dict[str, GradientRows]


class Withholding:
    """Hooks that keep the parameters of some modules out of the graph during their calls.

    Parameters
    ----------
    wanted
        Whether a call that begins now is to be treated so.
    """

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self.names: set[str] = set()
        self._wanted = wanted
        self._withheld: dict[nn.Module, list[nn.Parameter]] = {}
        self._last: nn.Module | None = None
        self._handles: list[Any] = []

    def add(self, block: Block) -> None:
        """Treat a block's module so, if it can be."""
        if block.name in self.names or not can_withhold(block):
            return
        module, parameters = block.uses[0].module, list(block.parameters.values())

        def begin(module: nn.Module, args: Any) -> None:
            if self._wanted():
                self._withheld[module] = [p for p in parameters if p.requires_grad]
                for p in self._withheld[module]:
                    p.requires_grad_(False)

        def end(module: nn.Module, args: Any, output: Any) -> Any:
            held = self._withheld.pop(module, None)
            if held is None:
                return None
            for p in held:
                p.requires_grad_(True)
            self._last = module
            # Nothing that needs a gradient went in: the graph has to begin here.
            if not isinstance(output, Tensor) or output.requires_grad:
                return None
            return _Root.apply(torch.zeros((), requires_grad=True), [output])  # type: ignore[no-untyped-call]  # in torch

        self.names.add(block.name)
        self._handles += [
            module.register_forward_pre_hook(begin),
            # Before the hook that records, and also when the call fails.
            module.register_forward_hook(end, prepend=True, always_call=True),
        ]

    def just_withheld(self, module: nn.Module) -> bool:
        """Whether the call of `module` that has just ended kept its parameters out."""
        last, self._last = self._last, None
        return last is module

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.names.clear()


def can_withhold(block: Block) -> bool:
    """Whether a block is one module that holds its parameters itself and treats samples apart."""
    if len(block.uses) != 1:
        return False
    module, adapter = block.uses[0].module, block.uses[0].adapter
    own = dict(module.named_parameters(recurse=False))
    plain = all(any(p is mine for mine in own.values()) for p in block.parameters.values())
    return plain and not adapter.whole_call and adapter.closed_form and not adapter.couples(module)


class _Root(torch.autograd.Function):
    """A tensor as the beginning of a graph. It may be changed in place afterwards, as any output may."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, holder: list[Tensor]) -> Tensor:
        return holder[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None
