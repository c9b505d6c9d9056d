"""Adapter of `torch.nn.MultiheadAttention`.

The encoder and decoder layers of `torch.nn` need none of their own: they are attention, linear and norm modules inside
a container. Their fused inference path, which calls no submodule, is taken by torch only where nothing requires a
gradient, so never where there are rows to form.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib.factors import Dense, Factors, Sum
from curvlib.layers.fallback import Call
from curvlib.layers.registry import register
from curvlib.layers.replay import linear_rows, names_of, pull_back, refuse, replaying
from curvlib.layers.tree import wide

__all__ = ["multihead_attention"]


@dataclass(frozen=True)
class _Attention:
    """A call of an attention: everything with the sequence in front of the batch.

    Parameters
    ----------
    query, key, value
        Shape ``(positions, batch, features)``.
    blocked
        What is added to the scores, −∞ where a pair may not meet; broadcasts to ``(batch, heads, queries, keys)``.
    """

    layer: Any
    query: Tensor
    key: Tensor
    value: Tensor
    blocked: Tensor | None

    @property
    def batch(self) -> int:
        return int(self.query.shape[1])

    def projections(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Projected query, key and value."""
        if self.layer._qkv_same_embed_dim:
            matrices = weights["in_proj_weight"].chunk(3)
        else:
            matrices = tuple(weights[f"{which}_proj_weight"] for which in "qkv")
        bias = weights.get("in_proj_bias")
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = (self.query, self.key, self.value)
        return [functional.linear(x, w, b) for x, w, b in zip(given, matrices, biases, strict=True)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attended values ``(queries, batch, embedding)`` and weights ``(batch, heads, queries, keys)``."""
        q, k, v = (x.unflatten(-1, (self.layer.num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))  # type: ignore[no-untyped-call]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.blocked is None:
            weights = scores.softmax(-1)
        else:
            # A query that may meet no key at all attends to nothing; a softmax over −∞ alone would be NaN.
            shut = self.blocked == -math.inf
            scores = (scores + self.blocked.masked_fill(shut, 0)).masked_fill(shut, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1) * ~shut.all(-1, keepdim=True)
        return (weights @ v).permute(2, 0, 1, 3).flatten(2), weights


@register(nn.MultiheadAttention, columns=True, whole_call=True)
def multihead_attention(layer: Any, call: Call, cotangents: tuple[Tensor | None, ...]) -> Factors:
    """Rows of all projections of an attention, self or cross, with any masks.

    Parameters
    ----------
    layer
        Joint or separate projections, with or without `bias_k`, `bias_v`, `add_zero_attn` and `batch_first`.
    call
        Query, key, value and the options of `torch.nn.MultiheadAttention.forward`.
    cotangents
        Of the output and, where they are used, of the attention weights, each behind an axis of columns.

    Raises
    ------
    CaptureError
        If the input is not batched or is nested, or dropout was active.
    """
    if layer.training and layer.dropout:
        raise refuse(layer, "its dropout draws numbers that cannot be drawn again; set dropout=0 or use eval mode")
    given = inspect.signature(nn.MultiheadAttention.forward).bind(layer, *call.args, **call.kwargs)
    given.apply_defaults()
    options = given.arguments
    if any(options[which].is_nested or options[which].ndim != 3 for which in ("query", "key", "value")):
        raise refuse(layer, "its inputs must be ordinary tensors of three axes, batch and sequence among them")
    query, key, value = (
        options[which].transpose(0, 1) if layer.batch_first else options[which] for which in ("query", "key", "value")
    )
    samples = call.samples
    if query.shape[1] % samples:
        raise refuse(
            layer,
            f"it was called with a batch of {query.shape[1]} (batch_first={layer.batch_first}), and the model's "
            f"output has {samples} samples",
        )
    weights = {name: wide(p.detach()) for name, p in layer.named_parameters(remove_duplicate=False)}
    extra = int(layer.bias_k is not None) + int(layer.add_zero_attn)
    blocked = _blocked(layer, options, query, key.shape[0], extra)
    attention = _Attention(layer, query, key, value, blocked)
    names = names_of(layer)
    with replaying(query):
        projected = [x.requires_grad_() for x in attention.projections(weights)]
        appended = [
            weights[which].expand(1, attention.batch, -1).clone().requires_grad_()
            for which in ("bias_k", "bias_v")
            if which in weights
        ]
        q, k, v = projected
        if appended:
            k, v = torch.cat([k, appended[0]]), torch.cat([v, appended[1]])
        if layer.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
        attended, table = attention.attend(q, k, v)
        output = functional.linear(attended, weights["out_proj.weight"], weights.get("out_proj.bias"))
        outputs = [output.transpose(0, 1) if layer.batch_first else output]
        if options["need_weights"]:
            outputs.append(table.mean(1) if options["average_attn_weights"] else table)
        arrived = pull_back(outputs[: len(cotangents)], cotangents, [*projected, *appended])
    g_out = cotangents[0]
    if g_out is None:
        g_out = arrived[0].new_zeros(arrived[0].shape[0], *outputs[0].shape)
    if layer.batch_first:
        g_out = g_out.transpose(1, 2)
    terms = _projection_rows(attention, arrived[:3], samples, names)
    for which, g in zip(("bias_k", "bias_v"), arrived[3:], strict=False):
        if which in names:
            terms.append(Dense({names[which]: _per_sample(g, samples)[:, None, None]}))
    terms += linear_rows(attended, g_out, samples, names, "out_proj.weight", "out_proj.bias")
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _projection_rows(
    attention: _Attention, cotangents: list[Tensor], samples: int, names: Mapping[str, str]
) -> list[Factors]:
    """Rows of the projections of query, key and value; cotangents have shape ``(columns, positions, batch, d)``."""
    given = (attention.query, attention.key, attention.value)
    weight, bias = "in_proj_weight", "in_proj_bias"
    if not attention.layer._qkv_same_embed_dim:
        terms = []
        for which, x, g in zip("qkv", given, cotangents, strict=True):
            terms += linear_rows(x, g, samples, names, f"{which}_proj_weight")
        if bias in names:
            rows = [_per_sample(g, samples) for g in cotangents]
            terms.append(Dense({names[bias]: torch.cat(rows, dim=-1)}))
        return terms
    if attention.query.data_ptr() == attention.key.data_ptr() == attention.value.data_ptr() and _alike(given):
        return linear_rows(attention.query, torch.cat(cotangents, dim=-1), samples, names, weight, bias)
    # Three blocks of rows of one weight, each with an input of its own: groups, as long as the longest sequence.
    longest = max(x.shape[0] for x in given)
    inputs = [functional.pad(x, (0, 0, 0, 0, 0, longest - x.shape[0])) for x in given]
    padded = [functional.pad(g, (0, 0, 0, 0, 0, longest - g.shape[1])) for g in cotangents]
    return linear_rows(torch.stack(inputs, 2), torch.stack(padded, 3), samples, names, weight, bias)


def _alike(given: tuple[Tensor, ...]) -> bool:
    return len({(tuple(x.shape), x.stride()) for x in given}) == 1


def _per_sample(cotangents: Tensor, samples: int) -> Tensor:
    """Sum over positions: from ``(columns, positions, batch, d)`` to rows ``(n · columns, d)``."""
    columns, _, _, width = cotangents.shape
    return cotangents.sum(1).reshape(columns, samples, -1, width).sum(2).transpose(0, 1).reshape(-1, width)


def _blocked(layer: Any, options: Mapping[str, Any], query: Tensor, keys: int, extra: int) -> Tensor | None:
    """Both masks in one, with room for the keys that the layer appends."""
    if options["is_causal"] and options["key_padding_mask"] is None and not options["need_weights"]:
        # torch takes the hint for the mask then, and it counts the appended keys as the latest ones.
        ones = query.new_ones(query.shape[0], keys + extra, dtype=torch.bool).triu(1)
        return torch.zeros_like(ones, dtype=query.dtype).masked_fill(ones, -math.inf)
    total: Tensor | None = None
    for name in ("attn_mask", "key_padding_mask"):
        mask = options[name]
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(mask, -math.inf)
        if name == "key_padding_mask":
            mask = mask.reshape(query.shape[1], 1, 1, keys)
        elif mask.ndim == 3:
            mask = mask.unflatten(0, (query.shape[1], -1)) if mask.shape[0] > 1 else mask
        mask = functional.pad(mask.to(query.dtype), (0, extra))
        total = mask if total is None else total + mask
    return total
