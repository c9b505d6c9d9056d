"""The tensor that a likelihood is about, out of what a model returns, and its cotangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlib.errors import CaptureError
from curvlib.fisher import Fisher
from curvlib.layers.tree import wide

__all__ = ["Output", "likelihood_outputs", "output_cotangents"]

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


def output_cotangents(fisher: Fisher, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
    """All columns of output cotangents, in the dtype of the outputs, shape ``(columns, *outputs.shape)``.

    Parameters
    ----------
    fisher
        Gives them; half precision is widened for it.
    outputs
        What the likelihood is about.
    generator
        Source of sampled labels.

    Raises
    ------
    CaptureError
        If it gives other shapes.
    """
    columns = fisher.cotangents(wide(outputs.detach()), generator).to(outputs.dtype)
    if columns.shape[1:] != outputs.shape:
        raise CaptureError(
            f"{fisher} gave cotangents of shape {tuple(columns.shape)} for outputs of shape {tuple(outputs.shape)}; "
            "they need shape (columns, *outputs)"
        )
    return columns
