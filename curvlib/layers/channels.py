"""Rows of a gain and a shift for each channel, as normalisation layers have them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from curvlib.factors import Dense

__all__ = ["batch_rows", "channel_rows"]

_FEWEST_POSITIONS = 16
"""Positions of a channel from which on its sums are worth a kernel that goes through them one channel at a time."""


def channel_rows(normalized: Tensor | None, g: Tensor, weight: str | None, bias: str | None) -> Dense:
    """Rows ``Σ g · x̂`` and ``Σ g`` over the positions of a channel.

    Parameters
    ----------
    normalized
        x̂, what the gain multiplies, shape ``(n, channels, *positions)``; None where `weight` is.
    g
        Shape ``(n, columns, channels, *positions)``.
    weight, bias
        Names of the parameters, None for one that is frozen or missing.
    """
    n, columns, channels = g.shape[:3]
    g = g.reshape(n, columns, channels, -1)
    values = {}
    if weight is not None and normalized is not None:
        # A dot product for each sample and channel, without a product as large as g.
        values[weight] = torch.einsum("nkcr,ncr->nkc", g, normalized.reshape(n, channels, -1)).flatten(0, 1)
    if bias is not None:
        values[bias] = g.sum(dim=3).flatten(0, 1)
    return Dense(values)


def batch_rows(x: Tensor, g: Tensor, eps: float, weight: str, bias: str | None) -> Dense:
    """Rows as of `channel_rows` for x̂ normalised by the statistics of the batch.

    On a CPU x̂ is never made: rows are sums of g (x - mean) divided by the standard deviation, and the variance comes
    from the same kernel. That is the backward pass of a batch norm in which every sample has channels of its own.

    Parameters
    ----------
    x
        Shape ``(n, channels, *positions)``.
    g
        Shape ``(n, columns, channels, *positions)``.
    eps
        What is added to the variance.
    weight, bias
        As in `channel_rows`.
    """
    n, channels = x.shape[:2]
    positions = x[0, 0].numel()
    if positions < _FEWEST_POSITIONS or x.device.type != "cpu" or not x.is_contiguous() or is_compiling():
        normalized = torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps)
        return channel_rows(normalized, g, weight, bias)
    x, columns = x.reshape(1, n * channels, positions), [one.reshape(1, n * channels, positions) for one in g.unbind(1)]
    middle = x.reshape(n, channels, positions).sum(dim=2).sum(dim=0) / (n * positions)
    centre = middle.repeat(n)
    # Sums around a point near the mean, as those around zero cancel where the mean is large.
    (linear, _), (times_x, _) = (_centred_sums(one, x, centre) for one in (torch.ones_like(x), x))
    total = linear.reshape(n, channels).sum(dim=0, dtype=torch.float64)
    squares = times_x.reshape(n, channels).sum(dim=0, dtype=torch.float64) - middle * total
    mean = total / (n * positions)
    scale = (squares / (n * positions) - mean * mean).clamp_min(0).add(eps).rsqrt()
    made = [[rows.reshape(n, channels) for rows in _centred_sums(column, x, centre)] for column in columns]
    values = {weight: torch.stack([(products - mean * sums) * scale for products, sums in made], dim=1).to(x.dtype)}
    if bias is not None:
        values[bias] = torch.stack([sums for _, sums in made], dim=1)
    return Dense({name: rows.flatten(0, 1) for name, rows in values.items()})


def _centred_sums(g: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ g (x - centre)`` and ``Σ g`` over the last axis, shape ``(rows,)``, of tensors of shape ``(1, rows, r)``."""
    one = torch.ones_like(centre)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        g, x, None, None, None, centre, one, True, 0.0, [False, True, True]
    )
    return products, sums
