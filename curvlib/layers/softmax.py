"""Adapters of the losses that hold a softmax layer: `torch.nn.AdaptiveLogSoftmaxWithLoss`, `LinearCrossEntropyLoss`.

Both apply linear maps that no hook sees, or for some of the samples only. The call is repeated for all samples, and the
cotangents of the maps' outputs give the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib.factors import Factors, Sum
from curvlib.layers.fallback import Call
from curvlib.layers.registry import register
from curvlib.layers.replay import linear_rows, names_of, pull_back, refuse, replaying
from curvlib.layers.tree import wide

__all__ = ["adaptive_softmax", "linear_cross_entropy"]


class _Maps:
    """Linear maps of a module in the course of being run again, with a probe at the output of each."""

    def __init__(self, layer: nn.Module) -> None:
        self._names = names_of(layer)
        self._weights = {name: wide(p.detach()) for name, p in layer.named_parameters(remove_duplicate=False)}
        self._made: list[tuple[str, Tensor, Tensor]] = []

    def apply(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        probe = x.new_zeros(x.shape[0], weight.shape[0], requires_grad=True)
        self._made.append((name, x, probe))
        return functional.linear(x, weight, bias) + probe

    def rows(self, outputs: list[Tensor], cotangents: tuple[Tensor | None, ...], samples: int) -> Factors:
        arrived = pull_back(outputs, cotangents, [probe for _, _, probe in self._made])
        terms: list[Factors] = []
        for (name, x, _), g in zip(self._made, arrived, strict=True):
            terms += linear_rows(x[None], g[:, None], samples, self._names, f"{name}.weight", f"{name}.bias")
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _arguments(layer: nn.Module, call: Call, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    x, target = (*call.args, *(call.kwargs[name] for name in names[len(call.args) :]))
    if x.ndim != 2 or x.shape[0] != call.samples:
        raise refuse(layer, f"its input has shape {tuple(x.shape)}; it needs ({call.samples}, features)")
    return x, target


@register(nn.AdaptiveLogSoftmaxWithLoss, columns=True, whole_call=True)
def adaptive_softmax(layer: Any, call: Call, cotangents: tuple[Tensor | None, ...]) -> Factors:
    """Rows of the head and of every cluster; those of a cluster are zero for samples whose target lies elsewhere.

    Parameters
    ----------
    layer
        Any cutoffs, `div_value` and `head_bias`.
    call
        Input, shape ``(n, features)``, and target, shape ``(n,)``.
    cotangents
        Of the log-probabilities, shape ``(columns, n)``, and of the mean loss, shape ``(columns,)``.

    Raises
    ------
    CaptureError
        If the input is not batched.
    """
    x, target = _arguments(layer, call, ("input_", "target_"))
    maps = _Maps(layer)
    with replaying(x):
        head = maps.apply("head", x).log_softmax(1)
        picked = target
        inside = x.new_zeros(call.samples)
        for cluster, (low, high) in enumerate(zip(layer.cutoffs[:-1], layer.cutoffs[1:], strict=True)):
            belongs = (target >= low) & (target < high)
            scores = maps.apply(f"tail.{cluster}.1", maps.apply(f"tail.{cluster}.0", x)).log_softmax(1)
            local = scores.gather(1, (target - low).clamp(0, high - low - 1)[:, None])[:, 0]
            inside = inside + torch.where(belongs, local, torch.zeros_like(local))
            picked = torch.where(belongs, layer.shortlist_size + cluster, picked)
        output = inside + head.gather(1, picked[:, None])[:, 0]
        return maps.rows([output, -output.mean()], cotangents, call.samples)


def linear_cross_entropy(layer: Any, call: Call, cotangents: tuple[Tensor | None, ...]) -> Factors:
    """Rows of the linear map; of a mean or summed loss, each sample's share.

    Parameters
    ----------
    layer
        Any reduction, class weights, label smoothing and `out_features`.
    call
        Input, shape ``(n, features)``, and target.
    cotangents
        Of the loss, behind an axis of columns.

    Raises
    ------
    CaptureError
        If the input is not batched.
    """
    x, target = _arguments(layer, call, ("input", "target"))
    maps = _Maps(layer)
    with replaying(x):
        logits = maps.apply("linear", x).reshape(call.samples, layer.num_classes, *layer.out_features)
        loss = functional.cross_entropy(
            logits,
            target,
            None if layer.weight is None else layer.weight.to(logits),
            ignore_index=-100 if layer.ignore_index is None else layer.ignore_index,
            reduction=layer.reduction,
            label_smoothing=layer.label_smoothing,
        )
        return maps.rows([loss], cotangents, call.samples)


if hasattr(nn, "LinearCrossEntropyLoss"):  # new in torch 2.13
    register(nn.LinearCrossEntropyLoss, columns=True, whole_call=True)(linear_cross_entropy)
