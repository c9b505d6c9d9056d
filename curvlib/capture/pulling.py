"""Cotangents of recorded outputs: columns at the model's outputs, sent back through the graph for the curvature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlib.capture.axes import ALONE
from curvlib.capture.records import Edge

__all__ = ["gradients", "pull_back"]


def pull_back(edges: Sequence[Edge], outputs: Tensor, columns: Tensor, batched: bool) -> bool:
    """Send columns of output cotangents back to the outputs of recorded calls.

    Parameters
    ----------
    edges
        From `Pass.edges`.
    outputs
        The model's outputs, in the graph.
    columns
        Shape ``(columns, *outputs.shape)``.
    batched
        Whether to try to send all columns at once, vectorised, rather than one after the other.

    Returns
    -------
    bool
        Whether that may be tried again.

    Notes
    -----
    An output without a sample axis is shared by all samples, and what arrives there is their sum. Its cotangents are
    taken one sample at a time: exact, at the price of a backward pass for each.
    """
    try:
        _pull_back(edges, outputs, columns, batched)
    except RuntimeError:
        # A compiled backward, or a function of the user's, may have no vectorised form.
        if not batched:
            raise
        _pull_back(edges, outputs, columns, batched=False)
        return False
    return batched


def _pull_back(edges: Sequence[Edge], outputs: Tensor, columns: Tensor, batched: bool) -> None:
    samples = outputs.shape[0]
    apart = [place for place in edges if place[0].axis != ALONE]
    alone = [place for place in edges if place[0].axis == ALONE]
    if apart:
        found = gradients(outputs, [edge for _, _, edge in apart], columns, batched)
        for call, index, _ in reversed(apart):
            # Let go one by one, since the columns of a call are copied together.
            call.arrived(index, [column.pop() for column in found])
    if alone:
        eye = torch.eye(samples, dtype=columns.dtype, device=columns.device)
        masks = eye.reshape(samples, samples, *([1] * (outputs.ndim - 1)))
        for column, one in enumerate(columns):
            found = gradients(outputs, [edge for _, _, edge in alone], masks * one, batched)
            for call, index, _ in reversed(alone):
                call.arrived(index, [sample.pop() for sample in found])
                mine, before = call.cotangents[index], call.alone.get(index)
                if mine is not None:
                    mine = mine[None]
                    call.alone[index] = mine if column == 0 or before is None else torch.cat([before, mine])
        for call, index, _ in alone:
            call.cotangents[index] = call.alone.pop(index, None)


def gradients(outputs: Tensor, edges: list[GradientEdge], columns: Tensor, batched: bool) -> list[list[Tensor | None]]:
    """Gradients at the edges, one list a column."""
    if not batched or columns.shape[0] == 1:
        return [list(torch.autograd.grad(outputs, edges, one, retain_graph=True, allow_unused=True)) for one in columns]
    found = torch.autograd.grad(outputs, edges, columns, retain_graph=True, allow_unused=True, is_grads_batched=True)
    return [[None if g is None else g[column] for g in found] for column in range(columns.shape[0])]
