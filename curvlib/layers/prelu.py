"""Adapter of `torch.nn.PReLU`, with one slope or one a channel."""

from __future__ import annotations

from torch import Tensor, nn

from curvlib.factors import Dense
from curvlib.layers.registry import register

__all__ = ["prelu"]


@register(nn.PReLU, columns=True, kronecker=False)
def prelu(layer: nn.PReLU, x: Tensor, g: Tensor) -> Dense:
    """Rows ``Σ g · min(x, 0)`` over everything that one slope serves.

    Parameters
    ----------
    layer
        Slopes of shape ``(1,)`` or ``(channels,)``.
    x
        Shape ``(n, *features)``; with several slopes the first of the features is the channel.
    g
        Shape ``(n, columns, *features)``.
    """
    n, columns, slopes = g.shape[0], g.shape[1], layer.num_parameters
    products = g.reshape(n, columns, slopes, -1) * x.clamp(max=0).reshape(n, 1, slopes, -1)
    return Dense(weight=products.sum(dim=3).flatten(0, 1))
