"""Adapter of `torch.nn.Bilinear`: a linear map of the products of two inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvlib.errors import CaptureError
from curvlib.factors import SharedOuter
from curvlib.layers.fallback import Call
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register

__all__ = ["bilinear"]


@register(nn.Bilinear, columns=True, whole_call=True)
def bilinear(layer: nn.Bilinear, call: Call, cotangents: tuple[Tensor | None, ...]) -> SharedOuter:
    """Rows ``Σ_r g_r (x1_r ⊗ x2_r)ᵀ`` over the positions r of a sample.

    Parameters
    ----------
    layer
        Weight ``(d_out, d1, d2)``.
    call
        Two inputs, shapes ``(n, *positions, d1)`` and ``(n, *positions, d2)``.
    cotangents
        One, of shape ``(columns, n, *positions, d_out)``.

    Raises
    ------
    CaptureError
        If the first axis is not the sample axis.
    """
    given = dict(zip(("input1", "input2"), call.args, strict=False)) | dict(call.kwargs)
    first, second = given["input1"], given["input2"]
    (g,) = cotangents
    assert g is not None  # an adapter is called when a cotangent has arrived
    n, columns = call.samples, g.shape[0]
    if first.ndim < 2 or first.shape[0] != n:
        raise CaptureError(
            f"Bilinear: its inputs have shapes {tuple(first.shape)} and {tuple(second.shape)}, the model's output {n} "
            "samples; the first axis must be the sample axis"
        )
    products = torch.einsum(
        "nri,nrj->nrij", first.reshape(n, -1, first.shape[-1]), second.reshape(n, -1, second.shape[-1])
    )
    weight, bias = trainable(layer)
    return SharedOuter(
        products.flatten(2)[:, :, None],
        g.reshape(columns, n, -1, 1, g.shape[-1]).transpose(0, 1),
        weight_shape=tuple(layer.weight.shape),
        weight=weight,
        bias=bias,
    )
