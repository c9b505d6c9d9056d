"""Weight gradients of a convolution: of a batch, and of each sample of it in two ways that differ in what they move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from curvlib.layers.autocorrelation import Kernel, windows

__all__ = ["grouped_gradients", "unfolded_gradients", "weight_gradient"]


def weight_gradient(cotangents: Tensor, images: Tensor, shape: Sequence[int], kernel: Kernel, groups: int) -> Tensor:
    """Weight gradient of a convolution, summed over the samples.

    Parameters
    ----------
    cotangents
        Shape ``(n, d_out, *positions)``.
    images
        Shape ``(n, channels, *space)``.
    shape
        Of the weight, ``(d_out, channels / groups, *size)``.
    kernel, groups
        As the convolution has them.
    """
    weight = cotangents.new_empty(shape)  # never read, but copied if it had no memory
    _, gradient, _ = torch.ops.aten.convolution_backward(
        cotangents,
        images,
        weight,
        None,
        kernel.stride,
        kernel.padding,
        kernel.dilation,
        False,
        [0] * len(kernel.size),
        groups,
        [False, True, False],
    )
    return gradient  # type: ignore[no-any-return]  # torch.ops is untyped


Empty = Callable[[Tensor, Sequence[int]], Tensor]
"""Memory with the dtype and on the device of a tensor, of some shape."""


def grouped_gradients(
    columns: Sequence[Tensor],
    images: Tensor,
    shape: Sequence[int],
    kernel: Kernel,
    groups: int,
    step: int,
    empty: Empty = Tensor.new_empty,
) -> list[Tensor]:
    """Weight gradient of each sample, from one big convolution in which samples are groups.

    Parameters
    ----------
    columns
        Cotangents of each column, of the shape as in `weight_gradient`.
    images, shape, kernel, groups
        As in `weight_gradient`.
    step
        Samples to take at a time on a CPU.
    empty
        Gives memory for what is put together of parts.

    Returns
    -------
    list
        For each column ``(n, *shape)``.
    """

    def some(g: Tensor, x: Tensor) -> Tensor:
        n, d_out = g.shape[:2]
        merged = g.reshape(1, n * d_out, *g.shape[2:]), x.reshape(1, -1, *x.shape[2:])
        return weight_gradient(*merged, (n * d_out, *shape[1:]), kernel, n * groups).reshape(n, *shape)

    n = len(images)
    if step >= n or images.device.type != "cpu":
        return [some(g, images) for g in columns]
    result = [empty(g, (n, *shape)) for g in columns]
    for start in range(0, n, step):
        for whole, g in zip(result, columns, strict=True):
            whole[start : start + step] = some(g[start : start + step], images[start : start + step])
    return result


def unfolded_gradients(
    columns: Sequence[Tensor],
    images: Tensor,
    shape: Sequence[int],
    kernel: Kernel,
    groups: int,
    step: int,
    empty: Empty = Tensor.new_empty,
) -> list[Tensor]:
    """Weight gradient of each sample, as a product of its cotangents and patches; as of `grouped_gradients`."""
    n, d_out = len(images), shape[0] // groups

    def patches(x: Tensor) -> Tensor:
        """Shape ``(samples · groups, positions, d_in)``, laid out with positions last."""
        dims = len(kernel.size)
        order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        unfolded = windows(x, kernel).permute(order)
        return unfolded.reshape(len(x) * groups, x.shape[1] // groups * kernel.taps, -1).mT

    def by_group(g: Tensor) -> Tensor:
        return g.reshape(len(g) * groups, d_out, -1)

    differentiated = any(one.requires_grad for one in (images, *columns))  # a product into given memory cannot be
    if step >= n or images.device.type != "cpu" or is_dynamo_compiling() or differentiated:
        whole = patches(images)
        return [torch.bmm(by_group(g), whole).reshape(n, *shape) for g in columns]
    result = [empty(g, (n * groups, d_out, shape[1] * kernel.taps)) for g in columns]
    for start in range(0, n, step):
        part = patches(images[start : start + step])
        for rows, g in zip(result, columns, strict=True):
            own = slice(start * groups, start * groups + len(part))
            torch.bmm(by_group(g[start : start + step]), part, out=rows[own])
    return [rows.view(n, *shape) for rows in result]
