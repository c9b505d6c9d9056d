"""Adapter of `torch.nn.ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from curvlib.factors import Dense, Factors, Sum
from curvlib.layers.convolution import ConvolutionFactors
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register

__all__ = ["transposed_convolution"]


def has_no_bias(layer: Any) -> bool:
    """Whether the weight alone is trained; in its matrix, transposed, there is no column for a bias."""
    weight, bias = trainable(layer)
    return weight is not None and bias is None


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, columns=True, kronecker=has_no_bias)
def transposed_convolution(layer: Any, x: Tensor, g: Tensor) -> Factors:
    """Rows of a transposed convolution: those of the convolution that it is the transpose of, with the roles exchanged.

    ``⟨g, Kᵀx⟩ = ⟨K g, x⟩``: in the rows of the convolution K the cotangent g is the image and the input x the
    cotangent.

    Parameters
    ----------
    layer
        Weight ``(channels, d_out / groups, *kernel)``; any stride, padding, output padding, dilation, groups.
    x
        Shape ``(n, channels, *positions)``.
    g
        Shape ``(n, columns, d_out, *space)``.
    """
    weight, bias = trainable(layer)
    n, columns = g.shape[:2]
    space = x.ndim - 2
    images = g.flatten(0, 1)
    terms: list[Factors] = []
    if weight is not None:
        images = functional.pad(images, [margin for margin in reversed(layer.padding) for _ in range(2)])
        for axis in range(2, 2 + space):
            # What output_padding (or output_size) added lies beyond the reach of every position of x.
            step, apart, size = layer.stride[axis - 2], layer.dilation[axis - 2], layer.kernel_size[axis - 2]
            images = images.narrow(axis, 0, step * (x.shape[axis] - 1) + apart * (size - 1) + 1)
        rows = ConvolutionFactors(
            images,
            x[:, None].expand(n, columns, *x.shape[1:]).reshape(n * columns, 1, *x.shape[1:]),
            weight_shape=tuple(layer.weight.shape),
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            weight=weight,
        )
        terms.append(rows)
    if bias is not None:
        terms.append(Dense({bias: g.flatten(3).sum(dim=3).flatten(0, 1)}))
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))
