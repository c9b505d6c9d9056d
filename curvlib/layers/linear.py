"""Adapter of `torch.nn.Linear`, for inputs with any leading dimensions."""

from __future__ import annotations

from torch import Tensor, nn

from curvlib.factors import Factors, OuterProduct, SharedOuter
from curvlib.layers.registry import register

__all__ = ["linear"]


@register(nn.Linear, columns=True, positionwise=True)
def linear(layer: nn.Linear, x: Tensor, g: Tensor) -> Factors:
    """Rows ``g [x, 1]ᵀ``, summed over the positions between the sample axis and the features.

    Parameters
    ----------
    layer
        Weight ``(d_out, d_in)``.
    x
        Shape ``(n, *positions, d_in)``.
    g
        Shape ``(n, columns, *positions, d_out)``.
    """
    weight, bias = trainable(layer)
    if x.ndim == 2:
        return OuterProduct(x, g, weight=weight, bias=bias)
    n, columns = g.shape[:2]
    return SharedOuter(
        x.reshape(n, -1, 1, x.shape[-1]),
        g.reshape(n, columns, -1, 1, g.shape[-1]),
        weight_shape=tuple(layer.weight.shape),
        weight=weight,
        bias=bias,
    )


def trainable(layer: nn.Module) -> tuple[str | None, str | None]:
    """Names of the weight and the bias, None for one that is frozen or missing."""
    weight, bias = layer.weight, layer.bias
    return (
        "weight" if weight is not None and weight.requires_grad else None,
        "bias" if bias is not None and bias.requires_grad else None,
    )
