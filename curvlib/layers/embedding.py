"""Adapters of `torch.nn.Embedding` and `EmbeddingBag`: lookups, never as wide as the table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvlib.errors import CaptureError
from curvlib.factors import OneHotOuter
from curvlib.layers.fallback import Call
from curvlib.layers.registry import register

__all__ = ["embedding", "embedding_bag"]


@register(nn.Embedding, columns=True, positionwise=True, lookup=True)
def embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> OneHotOuter:
    """Rows ``Σ_r e(x_r) g_rᵀ`` over the positions r of a sample; a position of `padding_idx` does not count.

    Parameters
    ----------
    layer
        Weight ``(vocabulary, d)``. Whether its own gradients are sparse makes no difference here.
    x
        Indices, shape ``(n, *positions)``.
    g
        Shape ``(n, columns, *positions, d)``.

    Raises
    ------
    CaptureError
        With `max_norm` or `scale_grad_by_freq`.
    """
    _refuse(layer)
    n, columns, d = g.shape[0], g.shape[1], g.shape[-1]
    x, g = x.reshape(n, -1).long(), g.reshape(n, columns, -1, d)
    if layer.padding_idx is not None:
        g = g * (x != layer.padding_idx)[:, None, :, None]
    return OneHotOuter(x, g, layer.num_embeddings)


@register(nn.EmbeddingBag, columns=True, whole_call=True, lookup=True)
def embedding_bag(layer: nn.EmbeddingBag, call: Call, cotangents: tuple[Tensor | None, ...]) -> OneHotOuter:
    """Rows of a sum, mean or maximum of lookups: a bag's cotangent at each of its positions, times what counts of it.

    Parameters
    ----------
    layer
        Weight ``(vocabulary, d)``; any mode. The maximum passes the cotangent of each output to one position.
    call
        Indices of shape ``(bags, length)``, or of shape ``(total,)`` with offsets; per-sample weights or none. Several
        bags in a row may belong to one sample.
    cotangents
        One, of shape ``(columns, bags, d)``.

    Raises
    ------
    CaptureError
        With `max_norm` or `scale_grad_by_freq`, or if bags do not divide into samples.
    """
    _refuse(layer)
    given = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False)) | dict(call.kwargs)
    x, offsets, weights = given["input"], given.get("offsets"), given.get("per_sample_weights")
    (g,) = cotangents
    assert g is not None  # an adapter is called when a cotangent has arrived
    bags, lookups, present = _bags(layer, x, offsets)
    if bags.shape[0] % call.samples:
        raise CaptureError(
            f"EmbeddingBag: {bags.shape[0]} bags do not divide into {call.samples} samples; each sample needs the same "
            "number of bags (empty ones are allowed)"
        )
    if layer.padding_idx is not None:
        present = present & (bags != layer.padding_idx)
    counts: Tensor = present.to(g.dtype)
    if layer.mode == "mean":
        counts = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    if weights is not None:
        counts = counts * weights.reshape(-1)[lookups].to(g.dtype)
    spread = g[:, :, None] * counts[:, :, None]
    if layer.mode == "max":
        spread = spread * _largest(layer.weight.detach(), bags, present)
    columns, d = g.shape[0], g.shape[-1]
    spread = spread.reshape(columns, call.samples, -1, d).transpose(0, 1)
    return OneHotOuter(bags.reshape(call.samples, -1), spread, layer.num_embeddings)


def _bags(layer: nn.EmbeddingBag, x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Indices as ``(bags, longest)``, the place of each in `x` flattened, and whether there is one."""
    if offsets is None:
        places = torch.arange(x.numel(), device=x.device).reshape(x.shape)
        return x.long(), places, torch.ones_like(x, dtype=torch.bool)
    offsets = offsets.long()
    end = offsets.new_tensor([] if layer.include_last_offset else [x.numel()])
    starts, ends = offsets[: len(offsets) - int(layer.include_last_offset)], torch.cat([offsets[1:], end])
    lengths = ends - starts
    step = torch.arange(int(lengths.max()) if len(lengths) else 0, device=x.device)
    present = step < lengths[:, None]
    places = (starts[:, None] + step) * present
    return x.long()[places], places, present


def _largest(table: Tensor, bags: Tensor, present: Tensor) -> Tensor:
    """Indicator of the position that gave each output its maximum, shape ``(bags, longest, d)``."""
    values = table[bags].masked_fill(~present[:, :, None], -torch.inf)
    return torch.zeros_like(values).scatter_(1, values.argmax(dim=1, keepdim=True), 1.0) if bags.shape[1] else values


def _refuse(layer: Any) -> None:
    kind = type(layer).__name__
    if layer.max_norm is not None:
        raise CaptureError(
            f"{kind} with max_norm={layer.max_norm} changes its weight in place during the forward pass, so its "
            "parameters are no free variables: use max_norm=None, and rescale the weight after the step instead"
        )
    if layer.scale_grad_by_freq:
        raise CaptureError(
            f"{kind} with scale_grad_by_freq=True has a gradient that is not that of its output, so no curvature "
            "belongs to it: use scale_grad_by_freq=False"
        )
