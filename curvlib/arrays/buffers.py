"""Memory of large arrays on the host, which one step leaves to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from curvlib.arrays.namespace import Array

__all__ = ["Buffers"]

_LARGE = 32 << 20
"""Bytes from which on glibc asks the system for memory each time, and gets it page by page, zeroed."""


@dataclass(frozen=True, eq=False)
class _Lent:
    """Memory, and the view of it that a tensor is made of, for as long as that is there."""

    memory: Tensor
    view: ref[np.ndarray[Any, Any]]


class Buffers:
    """Uninitialised tensors whose memory is taken again when nobody holds it any more.

    Only of large tensors on the host: there, filling new memory takes several times as long as filling used one. A GPU
    has an allocator of its own that does this. Not part of a copy, nor of what is saved.
    """

    def __init__(self) -> None:
        self._memory: list[_Lent] = []

    def __len__(self) -> int:
        return len(self._memory)

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of this shape, with the dtype and on the device of another; it may hold anything.

        Parameters
        ----------
        like
            Gives the dtype and the device.
        shape
            Of the tensor.
        """
        size = prod(shape) * like.element_size()
        # Tensors of other types may have no memory, such as those that stand for others while shapes are found out.
        if type(like) is not Tensor or like.device.type != "cpu" or size < _LARGE or is_compiling():
            return like.new_empty(tuple(shape))
        memory = self._unused(size)
        if memory is None:
            # Not NumPy's own: it asks for huge pages, which the system may have to put together first.
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        # The storage of the tensor holds this view of the memory for as long as there is a tensor of that storage.
        view = memory.numpy()
        self._memory.append(_Lent(memory, ref(view)))
        return torch.from_numpy(view).view(like.dtype).view(tuple(shape))

    def product(self, first: Array, second: Array) -> Array:
        """Return ``first @ second`` for arrays of any library, shapes ``(k, n, m)`` and ``(k, m, d)``."""
        shape = (*first.shape[:2], second.shape[2])
        plain = not isinstance(first, Tensor) or first.requires_grad or second.requires_grad or is_compiling()
        if plain or prod(shape) * first.element_size() < _LARGE:
            return first @ second
        return torch.bmm(first, second, out=self.empty(first, shape))

    def trim(self) -> None:
        """Let go of memory that nobody holds."""
        while self._unused() is not None:
            pass

    def _unused(self, size: int | None = None) -> Tensor | None:
        """Take out memory that no tensor is made of, of so many bytes or of any number."""
        for lent in list(self._memory):
            if lent.view() is None and size in (None, lent.memory.nbytes):
                try:
                    self._memory.remove(lent)
                except ValueError:  # another thread took it
                    continue
                return lent.memory
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, ()
