"""Steps that nobody waits for: their checks stay on the device, and are looked at when the next step begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvlib.arrays import Deferred

__all__ = ["InPlace", "Later", "Unseen", "Verdict", "selected"]


@dataclass(eq=False)
class Later:
    """Checks of one step, in the order in which they are looked at.

    Parameters
    ----------
    gradients
        Of outputs, loss and gradients.
    factorizations
        Of blocks that were factorised together: what is needed to do it again, and the checks.
    directions
        Of solves and natural gradients.
    """

    gradients: Deferred = field(default_factory=Deferred)
    factorizations: list[tuple[Sequence[Any], Deferred]] = field(default_factory=list)
    directions: Deferred = field(default_factory=Deferred)

    @property
    def good(self) -> Tensor:
        """Whether all hold, a boolean on the device."""
        parts = [self.gradients.good, *(checks.good for _, checks in self.factorizations), self.directions.good]
        return torch.stack([part for part in parts if part is not None]).all()


def selected(good: Tensor, moves: Sequence[Tensor]) -> list[Tensor]:
    """Return the moves where all is good, and zeros elsewhere, whatever the moves hold then."""
    # Made on the device: a number of the host might have to be copied there.
    zeros = {dtype: torch.zeros((), dtype=dtype, device=good.device) for dtype in {move.dtype for move in moves}}
    return [torch.where(good, move, zeros[move.dtype]) for move in moves]


class Verdict:
    """A boolean on its way from the device to the host.

    Parameters
    ----------
    good
        The boolean, no axes.
    """

    def __init__(self, good: Tensor) -> None:
        self._host, self._arrived = good, None
        if good.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._host.copy_(good, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # in torch
            self._arrived.record(torch.cuda.current_stream(good.device))

    def holds(self) -> bool:
        """Whether it is true. Waits until the device has made it, and for nothing that was asked of it since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._host)


class InPlace:
    """State of an optimizer that a step changes in place, as it was before: tensors are copied.

    Parameters
    ----------
    state
        Parameter to its buffers by name; a step may add some.
    parameters
        Parameters that another optimizer moves.
    """

    def __init__(self, state: MutableMapping[Any, Any], parameters: Iterable[Tensor] = ()) -> None:
        self._state = state
        self._names = {p: tuple(held) for p, held in state.items()}
        tensors = [value for held in state.values() for value in held.values() if isinstance(value, Tensor)]
        self._tensors = [(value, value.clone()) for value in tensors]
        self._parameters = [(p, p.detach().clone()) for p in parameters]

    def keep_if(self, good: Tensor) -> None:
        """Put the parameters back on the device, unless all is good: the next forward pass needs them."""
        for p, before in self._parameters:
            p.copy_(torch.where(good, p, before))

    def restore(self) -> None:
        """Put the state back."""
        for value, before in self._tensors:
            value.copy_(before)
        for p, held in list(self._state.items()):
            for name in [name for name in held if name not in self._names.get(p, ())]:
                del held[name]


@dataclass(frozen=True, eq=False)
class Unseen:
    """A step that was taken, and not looked at yet.

    Parameters
    ----------
    step
        Its number.
    verdict
        Whether all was good.
    later
        Its checks.
    renewal
        What renewed the curvature, and can do it again.
    in_place
        State to go back to, changed in place.
    host
        The rest of it: attributes of the optimizer, by name.
    """

    step: int
    verdict: Verdict
    later: Later
    renewal: Any
    in_place: InPlace
    host: Mapping[str, Any]
