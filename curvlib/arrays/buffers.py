"""Memory of large arrays on the host, which one step leaves to the next, and which equals share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from curvlib.arrays.namespace import Array

__all__ = ["Buffers"]

_LARGE = 16 << 20
"""Bytes from which on glibc soon asks the system for memory each time, and gets it page by page, zeroed."""

_TOGETHER = 32 << 20
"""Bytes that tensors which lie side by side have together at most."""

SIDE_BY_SIDE = range(1 << 20, (8 << 20) + 1)
"""Bytes of tensors that share memory with others of their shape; products of others gain little from it, or nothing."""


_Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class _Lent:
    """Memory, and the view of it that a tensor is made of, for as long as that is there."""

    memory: Tensor
    view: ref[np.ndarray[Any, Any]]


class Buffers:
    """Uninitialised tensors on the host, whose memory is taken again or lies side by side.

    The memory of large tensors is taken again when nobody holds it any more: filling new memory takes several times as
    long as filling used one. Smaller tensors of one shape, where the round before asked for several of them, are parts
    of one, so that one call can multiply them all (`arrays.adjoining`); a round ends with `trim`. A GPU has an
    allocator of its own. Not part of a copy, nor of what is saved.
    """

    def __init__(self) -> None:
        self._memory: list[_Lent] = []
        self._asked: dict[_Kind, int] = {}  # how many of a kind this round has asked for
        self._expected: dict[_Kind, int] = {}  # and the last round that asked for any
        self._parts: dict[_Kind, list[Tensor]] = {}  # made, and not yet asked for
        self._lent = False  # whether this round took memory

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
        if type(like) is not Tensor or like.device.type != "cpu" or is_dynamo_compiling():
            return like.new_empty(tuple(shape))
        if size in SIDE_BY_SIDE:
            return self._side_by_side(like, tuple(shape), size)
        if size < _LARGE:
            return like.new_empty(tuple(shape))
        return self._taken_again(like, tuple(shape), size)

    def product(self, first: Array, second: Array) -> Array:
        """Return ``first @ second`` for arrays of any library, shapes ``(k, n, m)`` and ``(k, m, d)``."""
        shape = (*first.shape[:2], second.shape[2])
        plain = not isinstance(first, Tensor) or first.requires_grad or second.requires_grad or is_dynamo_compiling()
        if plain or prod(shape) * first.element_size() < min(_LARGE, SIDE_BY_SIDE.start):
            return first @ second
        return torch.bmm(first, second, out=self.empty(first, shape))

    def trim(self) -> None:
        """End a round: let go of memory that it left and nobody holds.

        A round that took none leaves all for the next: rows that are made anew every tenth step need as much again.
        """
        self._parts.clear()
        if self._asked:
            self._expected, self._asked = self._asked, {}
        if self._lent:
            self._lent = False
            while self._unused() is not None:
                pass

    def restart(self) -> None:
        """Begin the round anew: what it asked for was in vain."""
        self._parts.clear()
        self._asked.clear()

    def _taken_again(self, like: Tensor, shape: tuple[int, ...], size: int) -> Tensor:
        """Return a tensor of memory that nobody holds any more, or of new memory that will be lent again."""
        self._lent = True
        memory = self._unused(size)
        if memory is None:
            # Not NumPy's own: it asks for huge pages, which the system may have to put together first.
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        # The storage of the tensor holds this view of the memory for as long as there is a tensor of that storage.
        view = memory.numpy()
        self._memory.append(_Lent(memory, ref(view)))
        return torch.from_numpy(view).view(like.dtype).view(shape)

    def _side_by_side(self, like: Tensor, shape: tuple[int, ...], size: int) -> Tensor:
        """Return a part of a larger tensor, if as many of this kind are expected, and else a tensor by itself."""
        kind = (shape, like.dtype)
        number = self._asked.get(kind, 0)
        self._asked[kind] = number + 1
        if not self._parts.get(kind):
            coming = self._expected.get(kind, 0) - number
            if coming < 2:
                return like.new_empty(shape)
            # No more at once than the memory that glibc keeps, and evenly.
            together = -(-coming // -(-coming // ((_TOGETHER - 1) // size)))
            self._parts[kind] = list(self._taken_again(like, (together, *shape), together * size).unbind())
        # The last first, since backward asks for the last block's first.
        return self._parts[kind].pop()

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
