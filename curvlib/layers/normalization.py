"""Adapters of normalisation within a sample: LayerNorm, RMSNorm, GroupNorm and InstanceNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib.factors import Dense
from curvlib.layers.channels import channel_rows
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register
from curvlib.layers.saved import fitting, saved_results

__all__ = ["group_norm", "instance_norm", "layer_norm", "rms_norm"]


def saved_statistics(layer: nn.LayerNorm, output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and inverse standard deviation of every position, if autograd saved them."""
    return saved_results(output, "NativeLayerNorm")


@register(nn.LayerNorm, columns=True, positionwise=True, kronecker=False, saved=saved_statistics)
def layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Dense:
    """Rows ``Σ g · x̂`` and ``Σ g`` over positions, x̂ the normalised input.

    Parameters
    ----------
    layer
        Parameters of shape `normalized_shape`.
    x
        Shape ``(n, *positions, *normalized_shape)``.
    g
        Shape ``(n, columns, *positions, *normalized_shape)``.
    statistics
        From `saved_statistics`.
    """
    weight, bias = trainable(layer)
    normalized = None
    if weight is not None:
        each = (*x.shape[: -len(layer.normalized_shape)], *(1 for _ in layer.normalized_shape))
        if (known := fitting(statistics, each, x)) is not None:
            mean, inverse = known
            normalized = (x - mean).mul_(inverse)
        else:
            normalized = functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return _feature_rows(normalized, g, layer.normalized_shape, weight, bias)


@register(nn.RMSNorm, columns=True, positionwise=True, kronecker=False)
def rms_norm(layer: nn.RMSNorm, x: Tensor, g: Tensor) -> Dense:
    """Rows ``Σ g · x / rms(x)`` over positions; shapes as for `layer_norm`."""
    normalized = functional.rms_norm(x, layer.normalized_shape, None, layer.eps)
    return _feature_rows(normalized, g, layer.normalized_shape, "weight", None)


@register(nn.GroupNorm, columns=True, kronecker=False)
def group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> Dense:
    """Rows ``Σ g · x̂`` and ``Σ g`` over the positions of a channel.

    Parameters
    ----------
    layer
        Parameters of shape ``(channels,)``.
    x
        Shape ``(n, channels, *positions)``.
    g
        Shape ``(n, columns, channels, *positions)``.
    """
    weight, bias = trainable(layer)
    normalized = functional.group_norm(x, layer.num_groups, None, None, layer.eps) if weight else None
    return channel_rows(normalized, g, weight, bias)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, columns=True, kronecker=False)
def instance_norm(layer: Any, x: Tensor, g: Tensor) -> Dense:
    """Rows ``Σ g · x̂`` and ``Σ g`` over the positions of a channel; shapes as for `group_norm`.

    x̂ is normalised by the sample's own statistics, or by the running ones in eval mode where the layer tracks them.
    """
    weight, bias = trainable(layer)
    if weight is None:
        return channel_rows(None, g, weight, bias)
    if layer.training or not layer.track_running_stats:
        normalized = functional.instance_norm(x, eps=layer.eps)
    else:
        mean, var = layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype)
        normalized = functional.instance_norm(x, mean, var, use_input_stats=False, eps=layer.eps)
    return channel_rows(normalized, g, weight, bias)


def _feature_rows(
    normalized: Tensor | None, g: Tensor, shape: tuple[int, ...], weight: str | None, bias: str | None
) -> Dense:
    n, columns = g.shape[:2]
    g = g.reshape(n, columns, -1, *shape)
    values = {}
    if weight is not None and normalized is not None:
        values[weight] = _products(g, normalized.reshape(n, -1, *shape), axis=1).flatten(0, 1)
    if bias is not None:
        values[bias] = g.sum(dim=2).flatten(0, 1)
    return Dense(values)


def _products(g: Tensor, normalized: Tensor, axis: int) -> Tensor:
    if g.shape[1] == 1:
        return normalized.mul_(g[:, 0]).sum(dim=axis, keepdim=True)  # x̂ is nobody else's
    # One column at a time: the product of all of them would be one more tensor as large as g.
    return torch.stack([(column * normalized).sum(dim=axis) for column in g.unbind(1)], dim=1)
