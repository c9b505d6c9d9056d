"""The tensor that a likelihood is about, out of what a model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvlib.errors import CaptureError

__all__ = ["Output", "likelihood_outputs"]

Output = Callable[[Any], Tensor]
"""Picks the tensor that the likelihood is about out of what the model returns."""


def likelihood_outputs(result: Any, pick: Output | None) -> Tensor:
    """Return the tensor that the likelihood is about.

    Parameters
    ----------
    result
        What the model returned.
    pick
        Picks it; None where the model returns it itself.

    Raises
    ------
    CaptureError
        If it is no tensor, or has no samples.
    """
    outputs = result if pick is None else pick(result)
    if not isinstance(outputs, Tensor):
        raise CaptureError(
            f"the model returns {type(outputs).__name__}, not a tensor: say which tensor the likelihood is about, "
            "as in output=lambda result: result.logits"
        )
    if outputs.ndim == 0 or outputs.shape[0] == 0:
        raise CaptureError(
            f"the model's output has shape {tuple(outputs.shape)}: its first axis must be the samples, at least "
            "one; skip empty batches"
        )
    return outputs
