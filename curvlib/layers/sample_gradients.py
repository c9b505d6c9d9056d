"""Weight gradients of a convolution: of a batch, and of each sample in four ways, which differ in what they move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional

from curvlib.factors import cost
from curvlib.layers.autocorrelation import Kernel, windows

__all__ = ["CONVOLUTIONS", "SAMPLE_GRADIENTS", "weight_gradient"]

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


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

    def some(columns: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        n, d_out = columns[0].shape[:2]
        merged, whole = x.reshape(1, -1, *x.shape[2:]), (n * d_out, *shape[1:])
        return [
            weight_gradient(g.reshape(1, n * d_out, *g.shape[2:]), merged, whole, kernel, n * groups).reshape(n, *shape)
            for g in columns
        ]

    if step >= len(images) or images.device.type != "cpu":
        return some(columns, images)  # laid out as rows are, which need no copy
    return _by_parts(some, columns, images, shape, step, empty)


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
        unfolded = unfolded.reshape(len(x) * groups, x.shape[1] // groups * kernel.taps, -1)
        # Of one channel along one axis they are still a view, whose rows overlap: no matrix for a product.
        overlap = unfolded.stride(1) < unfolded.shape[2] and unfolded.stride(2) < unfolded.shape[1]
        return (unfolded.contiguous() if overlap else unfolded).mT

    def by_group(g: Tensor) -> Tensor:
        return g.reshape(len(g) * groups, d_out, -1)

    if step >= n or images.device.type != "cpu" or not _may_be_given_memory(images, *columns):
        whole = patches(images)
        return [torch.bmm(by_group(g), whole).reshape(n, *shape) for g in columns]
    result = [empty(g, (n * groups, d_out, shape[1] * kernel.taps)) for g in columns]
    for start in range(0, n, step):
        part = patches(images[start : start + step])
        for rows, g in zip(result, columns, strict=True):
            own = slice(start * groups, start * groups + len(part))
            torch.bmm(by_group(g[start : start + step]), part, out=rows[own])
    return [rows.view(n, *shape) for rows in result]


def forward_gradients(
    columns: Sequence[Tensor],
    images: Tensor,
    shape: Sequence[int],
    kernel: Kernel,
    groups: int,
    step: int,
    empty: Empty = Tensor.new_empty,
) -> list[Tensor]:
    """Weight gradient of each sample, from a forward convolution with cotangents as kernels; as of `grouped_gradients`.

    A tap sees the image at positions `stride` apart, and the next tap `dilation` further on: the two change places.
    """
    convolve = CONVOLUTIONS[len(kernel.size)]
    taps = (slice(None), slice(None), *map(slice, kernel.size))

    def some(columns: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        rows, inner, filtered = [], x.shape[1] // groups, len(x) * groups
        # Samples and groups are groups of one channel each, and the channels of a group a batch.
        x = x.reshape(filtered, inner, *x.shape[2:]).transpose(0, 1)
        for g in columns:
            kernels = g.reshape(filtered * (shape[0] // groups), 1, *g.shape[2:])
            result = convolve(x, kernels, None, kernel.dilation, kernel.padding, kernel.stride, filtered)
            # Where a stride leaves a remainder, the cotangents fit in more places than there are taps.
            rows.append(result[taps].reshape(inner, len(g), shape[0], *kernel.size).movedim(0, 2))
        return rows

    return _by_parts(some, columns, images, shape, step, empty)


def shifted_gradients(
    columns: Sequence[Tensor],
    images: Tensor,
    shape: Sequence[int],
    kernel: Kernel,
    groups: int,
    step: int,
    empty: Empty = Tensor.new_empty,
) -> list[Tensor]:
    """Weight gradient of each sample, tap by tap, from shifted views of its image; as of `grouped_gradients`.

    Cotangents are laid on a grid as wide as the image, zeros between its positions and the next line: then what a tap
    sees is a stretch of the flat image, and nothing is unfolded. A stride s makes sˡ images of every s-th pixel.
    """
    positions, dims = columns[0].shape[2:], len(kernel.size)
    padded = [size + 2 * zeros for size, zeros in zip(images.shape[2:], kernel.padding, strict=True)]
    grid = [-(-size // stride) for size, stride in zip(padded, kernel.stride, strict=True)]
    jumps = [prod(grid[axis + 1 :]) for axis in range(dims)]
    length = 1 + sum((number - 1) * jump for number, jump in zip(positions, jumps, strict=True))
    rest = [kernel.stride[axis] * grid[axis] - padded[axis] for axis in range(dims)]
    around = [
        zeros for axis in reversed(range(dims)) for zeros in (kernel.padding[axis], kernel.padding[axis] + rest[axis])
    ]
    between = [zeros for axis in reversed(range(1, dims)) for zeros in (0, grid[axis] - positions[axis])]

    def seen(x: Tensor) -> list[Tensor]:
        """What each tap sees, shape ``(samples · groups, length, channels / groups)``."""
        x = functional.pad(x, around) if any(around) else x
        phases: dict[tuple[int, ...], Tensor] = {}
        views = []
        for tap in itertools.product(*map(range, kernel.size)):
            moved = [divmod(kernel.dilation[axis] * tap[axis], kernel.stride[axis]) for axis in range(dims)]
            phase = tuple(first for _, first in moved)
            if phase not in phases:
                lines = x
                for axis in range(dims):
                    lines = lines[(slice(None),) * (2 + axis) + (slice(phase[axis], None, kernel.stride[axis]),)]
                phases[phase] = lines.reshape(len(x) * groups, x.shape[1] // groups, -1)
            shift = sum(lines * jump for (lines, _), jump in zip(moved, jumps, strict=True))
            views.append(phases[phase].narrow(2, shift, length).mT)
        return views

    def some(columns: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        views, rows = seen(x), []
        for g in columns:
            flat = functional.pad(g, between).reshape(len(x) * groups, shape[0] // groups, -1)[..., :length]
            if _may_be_given_memory(g, x):
                products = g.new_empty((len(views), *flat.shape[:2], shape[1]))
                for view, product in zip(views, products, strict=True):
                    torch.bmm(flat, view, out=product)
            else:
                products = torch.stack([torch.bmm(flat, view) for view in views])
            rows.append(products.view(*kernel.size, len(x), *shape[:2]).movedim((-3, -2, -1), (0, 1, 2)))
        return rows

    return _by_parts(some, columns, images, shape, step, empty)


def _by_parts(
    some: Callable[[Sequence[Tensor], Tensor], list[Tensor]],
    columns: Sequence[Tensor],
    images: Tensor,
    shape: Sequence[int],
    step: int,
    empty: Empty,
) -> list[Tensor]:
    """Put together the rows of so many samples at a time, which `some` gives for each column in any layout."""
    n = len(images)
    if images.device.type != "cpu":
        step = n
    result = [empty(g, (n, *shape)) for g in columns]
    for start in range(0, n, max(step, 1)):
        part = slice(start, start + step)
        for whole, rows in zip(result, some([g[part] for g in columns], images[part]), strict=True):
            whole[part] = rows
    return result


def _may_be_given_memory(*tensors: Tensor) -> bool:
    """Whether products of these may be written into memory that is there: not to be differentiated, nor traced."""
    return not (is_dynamo_compiling() or any(one.requires_grad for one in tensors))


SAMPLE_GRADIENTS = {
    "grouped": (grouped_gradients, cost.grouped_chunk),
    "unfold": (unfolded_gradients, cost.unfold_chunk),
    "forward": (forward_gradients, cost.grouped_chunk),
    "shifted": (shifted_gradients, cost.grouped_chunk),
}
"""The routes to rows by name, and how many samples each takes at a time."""
