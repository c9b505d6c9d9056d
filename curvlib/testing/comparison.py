"""One comparison for the whole kit, and the message that it fails with: which quantity, by how much, where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Comparison", "ConformanceError", "numbers"]

_FLOOR = 1e-3
"""Below this size, against inputs of size one, an expected quantity counts as zero up to rounding."""


class ConformanceError(AssertionError):
    """A part does not do what its seam asks for."""


@dataclass(frozen=True)
class Comparison:
    """Compares quantities of one subject in one situation.

    Parameters
    ----------
    subject
        What is checked, such as ``"adapter of Linear"``.
    tolerance
        Largest error allowed, relative to the largest expected entry.
    situation
        Variant, block and columns; what distinguishes this comparison from the others of the same check.
    """

    subject: str
    tolerance: float
    situation: str = ""

    def where(self, situation: str) -> Comparison:
        """Return the same comparison with more said about the situation."""
        return replace(self, situation=f"{self.situation}, {situation}" if self.situation else situation)

    def fail(self, quantity: str, problem: str) -> ConformanceError:
        """Error for `quantity`, to be raised."""
        at = f" ({self.situation})" if self.situation else ""
        return ConformanceError(f"{self.subject}{at}: {quantity} {problem}")

    def close(self, quantity: str, given: Any, expected: Any, scale: float | None = None) -> None:
        """Require two arrays of any library to agree.

        Parameters
        ----------
        quantity
            What is compared, in the message.
        given, expected
            Arrays of the same shape.
        scale
            What the error is relative to; the largest expected entry by default.

        Raises
        ------
        ConformanceError
            With the quantity, the relative error, and the place of the worst entry.
        """
        mine, truth = numbers(given), numbers(expected)
        if mine.shape != truth.shape:
            raise self.fail(quantity, f"has shape {tuple(mine.shape)}, expected {tuple(truth.shape)}")
        if not truth.numel():
            return
        difference = (mine - truth).abs().nan_to_num(nan=torch.inf)
        size = float(truth.abs().max()) if scale is None else scale
        worst = float(difference.max())
        if worst <= self.tolerance * max(size, _FLOOR):
            return
        place = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), tuple(truth.shape)))
        raise self.fail(
            quantity,
            f"is off by {worst / max(size, _FLOOR):.1e} of its scale (tolerance {self.tolerance:.0e}); worst at "
            f"{list(place)}: {float(mine[place]):.6g} where {float(truth[place]):.6g} is expected"
            f"{_hint(mine, truth)}",
        )

    def close_vectors(self, quantity: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Require two block vectors to agree, parameter by parameter, on the scale of the whole block."""
        if set(given) != set(expected):
            raise self.fail(quantity, f"has the parameters {sorted(given)}, expected {sorted(expected)}")
        scale = max(
            (float(numbers(array).abs().max()) for array in expected.values() if numbers(array).numel()), default=0
        )
        for name in expected:
            self.where(f"parameter {name!r}").close(quantity, given[name], expected[name], scale)

    def equal(self, quantity: str, given: Any, expected: Any) -> None:
        """Require two plain values to be equal."""
        if given != expected:
            raise self.fail(quantity, f"is {given}, expected {expected}")


def _hint(mine: Tensor, truth: Tensor) -> str:
    """Say so where the result is a multiple of the truth, or the truth with its first axis in another order."""
    square = float((truth * truth).sum())
    if not bool(torch.isfinite(mine).all()):
        return "; it is not finite"
    if square == 0:
        return ""
    if not bool(mine.any()):
        return "; all of it is zero"
    factor = float((mine * truth).sum()) / square
    if float((mine - factor * truth).abs().max()) <= 1e-3 * abs(factor) * float(truth.abs().max()):
        return f"; all of it is {factor:.4g} times what is expected"
    if mine.ndim and 1 < len(mine) <= 512:
        flat, reference = mine.reshape(len(mine), -1), truth.reshape(len(truth), -1)
        nearest = torch.cdist(flat, reference).argmin(dim=1)
        reordered = reference[nearest]
        permuted = len(set(nearest.tolist())) == len(flat)
        if permuted and float((flat - reordered).abs().max()) <= 1e-3 * float(truth.abs().max()):
            return f"; its rows are the expected ones in another order, {nearest.tolist()}"
    return ""


def numbers(array: Any) -> Tensor:
    """Array of any library as a float64 tensor on the CPU."""
    if isinstance(array, Tensor):
        return array.detach().to("cpu", torch.float64)
    fetched = array.get() if hasattr(array, "get") else array
    return torch.as_tensor(np.asarray(fetched), dtype=torch.float64)
