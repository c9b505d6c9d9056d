"""Adapter of BatchNorm, whose statistics couple the samples of a batch in training mode.

In eval mode with running statistics a row is the gradient of the sample's own output, as for any other layer.

With batch statistics a sample's output depends on all inputs, so there is no per-sample network to differentiate. A row
is then defined as the sample's share of the gradient *at the activations*: ``Σ_positions g_i · x̂_i``, with the batch
statistics as they were and g_i the cotangent of this sample's activation, to which every sample's loss contributes.
The sum of the rows is the exact gradient of the batch. The same holds for every layer before a batch norm: its rows are
those of its own activations, which is what Kronecker-factored methods and TENGraD use on such networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib.errors import CaptureError
from curvlib.factors import Dense
from curvlib.layers.channels import batch_rows, channel_rows
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register
from curvlib.layers.saved import fitting, saved_results

__all__ = ["batch_norm", "uses_batch_statistics"]


def uses_batch_statistics(layer: Any) -> bool:
    """Whether a batch norm normalises by the batch, not by running statistics."""
    return bool(layer.training or (layer.running_mean is None and layer.running_var is None))


def saved_statistics(layer: Any, output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and inverse standard deviation that autograd saved of a call; None where there are none to be had.

    Parameters
    ----------
    layer
        Normalises by the batch.
    output
        What it returned.
    """
    return saved_results(output, "NativeBatchNorm") if uses_batch_statistics(layer) else None


@register(
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    columns=True,
    couples_samples=uses_batch_statistics,
    kronecker=False,
    saved=saved_statistics,
)
def batch_norm(layer: Any, x: Tensor, g: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Dense:
    """Rows ``Σ g · x̂`` and ``Σ g`` over the positions of a channel; see above for what they mean in training mode.

    Parameters
    ----------
    layer
        Parameters of shape ``(channels,)``.
    x
        The whole batch, shape ``(n, channels, *positions)``.
    g
        Shape ``(n, columns, channels, *positions)``.
    statistics
        From `saved_statistics`.

    Raises
    ------
    CaptureError
        If the statistics come from several processes.
    """
    weight, bias = trainable(layer)
    if weight is None:
        return channel_rows(None, g, weight, bias)
    if not uses_batch_statistics(layer):
        mean, var = layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype)
        return channel_rows(functional.batch_norm(x, mean, var, eps=layer.eps), g, weight, bias)
    if isinstance(layer, nn.SyncBatchNorm) and _processes() > 1:
        raise CaptureError(
            "SyncBatchNorm in training mode normalises by the batches of all processes, and one process has no exact "
            "rows for it: use BatchNorm, put it in eval mode, or freeze its weight"
        )
    return batch_rows(x, g, layer.eps, weight, bias, fitting(statistics, x.shape[1:2], x))


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
