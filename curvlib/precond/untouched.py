"""Gradients that nobody changed between backward and step: what is taken as rows would not be changed with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import Tensor

from curvlib.errors import ConfigurationError

__all__ = ["Untouched"]


class Untouched:
    """Notices gradients that were clipped or replaced after backward, where there are any at all.

    Gradients as rows have no `.grad` that could be clipped. In the first step all gradients are explicit,
    so a loop that does such things is found out at once.
    """

    def __init__(self) -> None:
        self._seen: dict[Tensor, tuple[Tensor, int]] = {}
        self._handles: list[Any] = []

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Watch the gradients of these parameters from now on, and no others."""
        self.detach()
        me = ref(self)

        def note(p: Tensor) -> None:
            watcher = me()
            if watcher is not None and p.grad is not None:
                watcher._seen[p] = (p.grad, p.grad._version)

        for p in parameters:
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]  # in torch

    def check(self) -> None:
        """Refuse gradients that are no longer what backward made.

        Raises
        ------
        ConfigurationError
            Saying what cannot be combined.
        """
        for p, (gradient, version) in self._seen.items():
            if p.grad is not gradient or gradient._version != version:
                raise ConfigurationError(
                    "gradients were changed between backward and step, by clip_grad_norm_ perhaps; "
                    "fused=True takes gradients as rows, which such changes do not reach: leave out fused=True"
                )

    def clear(self) -> None:
        """Forget the gradients of this step."""
        self._seen.clear()

    def detach(self) -> None:
        """Watch nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
