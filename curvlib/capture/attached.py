"""Hooks on modules that live as long as what they belong to, and that copies of a module do not take along."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

__all__ = ["Hook", "Hooks", "Silence", "owners"]


class Silence:
    """Kept while cotangents travel through a model's graph for a curvature's sake: then nobody's tensor hooks count.

    ``with silence:``, as often and as deep as needed. All that watch one model share it.

    Attributes
    ----------
    on
        How many keep it.
    """

    def __init__(self) -> None:
        self.on = 0

    def __enter__(self) -> None:
        self.on += 1

    def __exit__(self, *exception: object) -> None:
        self.on -= 1


class Hook:
    """A hook of a module that does not keep alive what it calls.

    A model holds its hooks; would they hold the optimizer, it could never go while the model is there. A hook whose
    owner is gone, or that came along when a module was copied or pickled, removes itself when it is called.

    Parameters
    ----------
    function
        What is called; the owner has to keep it. None for a hook of nobody.
    owner
        What it belongs to.
    """

    def __init__(self, function: Callable[..., Any] | None = None, owner: Any = None) -> None:
        self._function = _nobody if function is None else ref(function)
        self._owner = _nobody if owner is None else ref(owner)

    @property
    def owner(self) -> Any:
        """What the hook belongs to; None if that is gone."""
        return self._owner()

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        function = self._function()
        if function is not None:
            return function(module, *arguments)
        if not is_dynamo_compiling():
            self._leave(module)
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()

    def _leave(self, module: nn.Module) -> None:
        for hooks, notes in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for number in [number for number, hook in hooks.items() if hook is self]:
                for table in (hooks, *notes):
                    table.pop(number, None)


def _nobody() -> None:
    return None


@cache
def _uncompiled() -> type[Hook]:
    apart = torch.compiler.disable(Hook.__call__)  # type: ignore[no-untyped-call]  # untyped in torch

    def call(hook: Hook, module: nn.Module, *arguments: Any) -> Any:
        # What sets a function apart from what is compiled takes longer than most hooks, also where nothing is.
        if is_dynamo_compiling():
            return apart(hook, module, *arguments)
        function = hook._function()
        return Hook.__call__(hook, module, *arguments) if function is None else function(module, *arguments)

    return type("UncompiledHook", (Hook,), {"__call__": call})


class Hooks:
    """All hooks of one owner.

    Parameters
    ----------
    owner
        What they belong to; they end with it.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = ref(owner)
        self._functions: list[Callable[..., Any]] = []
        self._handles: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self._handles)

    def before(self, module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
        """Call a function before the calls of a module, as `register_forward_pre_hook` does."""
        self._handles.append(module.register_forward_pre_hook(self._hook(function), **options))

    def after(self, module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
        """Call a function after the calls of a module, as `register_forward_hook` does."""
        self._handles.append(module.register_forward_hook(self._hook(function), **options))

    def remove(self) -> None:
        """Take them all from their modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._functions.clear()

    def _hook(self, function: Callable[..., Any]) -> Hook:
        self._functions.append(function)
        # What hooks do is no part of a compiled model. The compiler takes seconds to import, and every optimizer of
        # torch imports it; where it is not there, nothing is compiled while these hooks are.
        kind = _uncompiled() if "torch._dynamo" in sys.modules else Hook
        return kind(function, self._owner())


def owners(model: nn.Module) -> Iterator[Any]:
    """Everything alive whose hooks are on a model or on a module in it; one may come several times."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, Hook) and hook.owner is not None:
                yield hook.owner
