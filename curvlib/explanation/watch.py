"""What a pass does to each block: the operations of its modules and adapters, and what couples samples behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvlib.explanation.counting import CountFlops
from curvlib.factors import Factors
from curvlib.layers import Block, Use, adapter_for

__all__ = ["Watch"]


class Watch:
    """Sees what the forward passes and adapters of blocks cost, and which come before a module that couples samples.

    Attributes
    ----------
    pulled_back
        Block name to the operations of its modules' forward passes, where cotangents have to go on to earlier ones.
    adapter
        Block name to the operations of its adapters.
    coupled
        Name of a block called before, or in, a module that couples samples, to the name of that module.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], counter: CountFlops) -> None:
        self.pulled_back = {block.name: 0 for block in blocks}
        self.adapter = {block.name: 0 for block in blocks}
        self.coupled: dict[str, str] = {}
        self._called: list[str] = []
        self._adapting = False  # the fallback calls modules again, which is no pass
        self._model, self._blocks, self._counter = model, blocks, counter
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for block in self._blocks:
            for use in block.uses:
                self._handles += self._watch(block.name, use.module)
        for name, module in self._model.named_modules():
            adapter = adapter_for(type(module))
            if adapter is not None and adapter.couples(module):
                self._handles.append(module.register_forward_hook(self._coupling(name or type(module).__name__)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def counted(self, block: Block) -> Block:
        """Return the same block, its adapters' operations counted."""

        def watched(use: Use) -> Use:
            original = use.adapter.function

            def function(*args: Any) -> Factors:
                before, self._adapting = self._counter.total, True
                try:
                    return original(*args)
                finally:
                    self._adapting = False
                    self.adapter[block.name] += self._counter.total - before

            return dataclasses.replace(use, adapter=dataclasses.replace(use.adapter, function=function))

        return dataclasses.replace(block, uses=tuple(watched(use) for use in block.uses))

    def clear(self) -> None:
        """Forget what was seen, before another pass."""
        self.pulled_back = dict.fromkeys(self.pulled_back, 0)
        self.adapter = dict.fromkeys(self.adapter, 0)
        self._called.clear()

    def _watch(self, name: str, module: nn.Module) -> list[Any]:
        start: list[int] = []

        def before(module: nn.Module, args: Any) -> None:
            if not self._adapting:
                start.append(self._counter.total)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._adapting:
                return
            cost = self._counter.total - start.pop()
            # Cotangents pass through a module only where something before it wants them.
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs))):
                self.pulled_back[name] += cost
            self._called.append(name)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, with_kwargs=True)]

    def _coupling(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            for block in self._called:
                self.coupled.setdefault(block, name)

        return note
