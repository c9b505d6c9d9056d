"""Rows that lie in the memory of a batch, which its owner may write the next one into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from curvlib.arrays import map_arrays
from curvlib.factors import Factors

__all__ = ["Loan", "apart", "memory"]

_ELSEWHERE = -1


class Loan:
    """Tensors that the states of a block may lie in, for as long as nobody writes there.

    Parameters
    ----------
    tensors
        Their memory is not kept.
    """

    __slots__ = ("_lent",)

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._lent = [(_counter(tensor), tensor._version, _place(tensor)) for tensor in tensors]

    def broken(self, state: Any) -> bool:
        """Whether one was changed since that arrays of a state lie in, or may do so."""
        changed = {place for counter, version, place in self._lent if counter._version != version}
        return bool(changed and (changed | {_ELSEWHERE}) & memory(state))


def apart(rows: Factors, inputs: Sequence[Tensor], copies: dict[Any, Tensor]) -> Factors:
    """Return the same rows with copies of what lies in the memory of some tensors.

    Parameters
    ----------
    rows, inputs
        Rows, and these tensors.
    copies
        By where the originals lie, so that there is one copy for all rows of a pass; it takes new ones in.
    """
    theirs = {_place(tensor) for tensor in inputs}
    if not theirs & memory(rows):
        return rows

    def own(array: Tensor) -> Tensor:
        if _place(array) not in theirs:
            return array
        view = array.data_ptr(), array.shape, array.stride(), array.dtype
        if view not in copies:
            copies[view] = array.clone()
        return copies[view]

    copied: Factors = map_arrays(own, rows)
    return copied


def memory(state: Any) -> set[int]:
    """Where the arrays of a state lie that are tensors, and one place for all others."""
    found: set[int] = set()

    def note(array: Any) -> Any:
        found.add(_place(array))
        return array

    map_arrays(note, state)
    return found


def _counter(tensor: Tensor) -> Tensor:
    """Return a tensor without memory whose `_version` goes on as that of another one, and of all that share its."""
    counter = tensor.detach()
    counter.data = tensor.new_empty(0)
    return counter


def _place(array: Any) -> int:
    return array.untyped_storage().data_ptr() if isinstance(array, Tensor) else _ELSEWHERE
