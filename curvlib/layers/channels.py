"""Rows of a gain and a shift for each channel, as normalisation layers have them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

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


def batch_rows(
    x: Tensor,
    g: Tensor,
    eps: float,
    weight: str,
    bias: str | None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Dense:
    """Rows as of `channel_rows` for x̂ normalised by the statistics of the batch.

    On a CPU x̂ is never made: rows are sums of g (x - mean) divided by the standard deviation, which the backward pass
    of a batch norm returns in which every sample has channels of its own.

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
    statistics
        Mean and inverse standard deviation of every channel, in the dtype of `x`, where they are known already.
    """
    n, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    differentiated = x.requires_grad or g.requires_grad  # the kernels below cannot be
    plain = differentiated or x.device.type != "cpu" or is_dynamo_compiling()
    if plain or positions < _FEWEST_POSITIONS or not x.is_contiguous():
        normalized = torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps)
        return channel_rows(normalized, g, weight, bias)
    centre, scale = (one.repeat(n) for one in (statistics or _statistics(x, eps)))
    x, columns = x.reshape(1, n * channels, positions), [one.reshape(1, n * channels, positions) for one in g.unbind(1)]
    made = [_centred_sums(column, x, centre, scale) for column in columns]
    values = {weight: _by_row([products for products, _ in made], channels)}
    if bias is not None:
        values[bias] = _by_row([sums for _, sums in made], channels)
    return Dense(values)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of every channel of a contiguous batch."""
    n, channels = x.shape[:2]
    # The fastest kernel that has moments: of each sample's channels, and of the batch by them.
    _, means, inverses = torch.native_group_norm(x, None, None, n, channels, math.prod(x.shape[2:]), channels, 0.0)
    between, mean = torch.var_mean(means.double(), dim=0, correction=0)
    variance = inverses.double().pow(-2).mean(dim=0).add_(between)
    return mean.to(x.dtype), variance.add_(eps).rsqrt_().to(x.dtype)


def _centred_sums(g: Tensor, x: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale · Σ g (x - centre)`` and ``Σ g`` over the last axis, for tensors of shape ``(1, rows, r)``.

    Returns
    -------
    tuple
        Two tensors of the shape of `centre` and `scale`, ``(rows,)``.
    """
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        g, x, None, None, None, centre, scale, True, 0.0, [False, True, True]
    )
    return products, sums


def _by_row(columns: list[Tensor], channels: int) -> Tensor:
    """Rows of a parameter from those of each column, samples before columns."""
    if len(columns) == 1:
        return columns[0].reshape(-1, channels)
    return torch.stack([column.reshape(-1, channels) for column in columns], dim=1).flatten(0, 1)
