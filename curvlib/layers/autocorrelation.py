"""Second moments of a convolution's patches from the autocorrelation of its input, without unfolding it.

Two taps a and a' of a kernel see the same input, one of them `a' − a` further on: their block of ``Σ patch patchᵀ`` is
a sum over ``X[u] X[u + a' − a]ᵀ``, and pairs of taps that lie equally far apart differ by lines at the border alone. So
along one axis, lines of input stay as they are and each product of lines is taken once; along the other axes the input
is unfolded. A kernel of 3 × 3 takes a third of the arithmetic of unfolded patches and a third of their memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from curvlib.arrays import self_product
from curvlib.factors import cost

__all__ = ["Kernel", "patch_moments", "patch_sums", "position_moments", "windows"]


class Kernel(NamedTuple):
    """How a kernel moves over images, one number for each axis of space.

    Parameters
    ----------
    size, stride, dilation
        As a convolution has them.
    padding
        Zeros on both sides that the images are without.
    """

    size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[int]

    @property
    def taps(self) -> int:
        """Number of its elements."""
        return prod(self.size)

    @property
    def line_axis(self) -> int:
        """Axis whose lines are kept: the longest of the kernel, which saves most."""
        # Of equals the first: then what lies behind each other in memory stays so.
        return max(range(len(self.size)), key=lambda axis: (self.size[axis], -axis))

    def along(self, axis: int, size: int) -> _Axis:
        """How it moves along one axis, of images so large."""
        return _Axis(size, self.size[axis], self.stride[axis], self.dilation[axis], self.padding[axis])


class _Axis(NamedTuple):
    """One axis of images and of the kernel that moves along it."""

    size: int
    taps: int
    stride: int
    dilation: int
    padding: int

    @property
    def positions(self) -> int:
        return (self.size + 2 * self.padding - self.dilation * (self.taps - 1) - 1) // self.stride + 1


class _Tap(NamedTuple):
    """A kernel element along the axis of lines.

    With stride s, every s-th line makes a phase. Line `begin` of the phase is the first window's, before the stored
    lines where it is one of zeros; the stored lines that windows see are ``first ≤ m < last``.
    """

    phase: int
    begin: int
    first: int
    last: int


def patch_moments(images: Tensor, kernel: Kernel, groups: int = 1, limit: int | None = None) -> Tensor:
    """Sum over samples and positions of patch · patchᵀ.

    Parameters
    ----------
    images
        Shape ``(n, channels, *space)``.
    kernel
        How patches are taken.
    groups
        Groups of channels, each with patches of its own.
    limit
        Elements that lines of several samples may have at a time, besides what is fast.

    Returns
    -------
    Tensor
        Shape ``(groups, d_in, d_in)`` with ``d_in = channels / groups · kernel elements``, ordered as a weight is.
    """
    if _product(kernel.size) == 1:
        return position_moments(windows(images, kernel), groups)
    n, channels = images.shape[:2]
    dims, chosen = len(kernel.size), kernel.line_axis
    axes = [kernel.along(axis, images.shape[2 + axis]) for axis in range(dims)]
    line = axes.pop(chosen)
    columns = [axis.positions for axis in axes]
    step = cost.sample_chunk(channels * line.size * _product(columns) * _product([axis.taps for axis in axes]), limit)
    if step < n:
        parts = (patch_moments(images[start : start + step], kernel, groups, limit) for start in range(0, n, step))
        return functools.reduce(torch.add, parts)

    # (channels, lines, n, *columns): the axes that products sum over come last, lines first among them.
    ordered = images.movedim((1, 2 + chosen, 0), (0, 1, 2))
    taps = _taps(line)
    d_in = channels // groups * _product(kernel.size)
    unfolded = {}
    for phase in {tap.phase for tap in taps}:
        lines = ordered[:, (phase - line.padding) % line.stride :: line.stride]
        unfolded[phase] = _unfold(lines, axes).reshape(groups, d_in // line.taps, lines.shape[1], n * _product(columns))

    moments = images.new_empty((groups, d_in, d_in))
    width = [channels // groups, *kernel.size]
    blocks = moments.view(groups, *width, *width)
    # The axis of lines among those of the first factor, and among all.
    here, there = 2 + chosen, 3 + dims + chosen
    shape = [*blocks.shape[:here], *blocks.shape[here + 1 : there], *blocks.shape[there + 1 :]]
    for (left, right), block in _blocks(taps, unfolded):
        blocks.select(there, right).select(here, left).copy_(block.view(shape))
        if left != right:
            blocks.select(there, left).select(here, right).copy_(block.mT.reshape(shape))
    return moments


def windows(images: Tensor, kernel: Kernel) -> Tensor:
    """Patches as an overlapping view, shape ``(n, channels, *positions, *kernel)``."""
    margins = [zeros for one in reversed(kernel.padding) for zeros in (one, one)]
    result = functional.pad(images, margins) if any(margins) else images
    for axis, (size, stride, dilation) in enumerate(zip(*kernel[:3], strict=True), start=2):
        result = result.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return result


def patch_sums(images: Tensor, kernel: Kernel) -> Tensor:
    """Each sample's sum of patches, shape ``(n, channels, *kernel)``."""
    return windows(images, kernel).sum(dim=tuple(range(2, 2 + len(kernel.size))))


def position_moments(images: Tensor, groups: int = 1) -> Tensor:
    """Sum over samples and positions of the products of channels.

    Parameters
    ----------
    images
        Shape ``(n, channels, *space)``.
    groups
        Groups of channels.

    Returns
    -------
    Tensor
        Shape ``(groups, channels / groups, channels / groups)``.
    """
    n, width = images.shape[0], images.shape[1] // groups
    rows = images.reshape(n, groups, width, -1)
    if rows.shape[3] >= width:
        # A product for each sample needs no copy, and writes no more than it reads.
        rows = rows.reshape(n * groups, width, -1)
        return torch.bmm(rows, rows.mT).reshape(n, groups, width, width).sum(0)
    rows = rows.permute(1, 2, 0, 3).reshape(groups, width, -1)
    return self_product(rows[0])[None] if groups == 1 else rows @ rows.mT


def _product(sizes: Sequence[int]) -> int:
    return torch.Size(sizes).numel()


def _taps(axis: _Axis) -> list[_Tap]:
    """Where in the stored lines each tap's windows begin, and which of them they cover."""
    taps = []
    for tap in range(axis.taps):
        shift, phase = divmod(axis.dilation * tap, axis.stride)
        # Line m of the phase is line stride · m + phase of the padded image; the stored ones begin behind the zeros.
        zeros = -((phase - axis.padding) // axis.stride)
        stored = -((phase - axis.padding - axis.size) // axis.stride) - zeros
        begin = shift - zeros
        taps.append(_Tap(phase, begin, min(max(begin, 0), stored), max(min(begin + axis.positions, stored), 0)))
    return taps


def _columns(axis: _Axis) -> Iterator[tuple[slice, slice]]:
    """For each tap, which positions see the image rather than zeros, and what of the image they see."""
    for tap in range(axis.taps):
        begin = axis.dilation * tap - axis.padding
        first = max(0, -(begin // axis.stride))
        last = max(first, min(axis.positions, -((begin - axis.size) // axis.stride)))
        start = begin + first * axis.stride
        end = start + max(0, (last - first - 1) * axis.stride + 1)
        yield slice(first, last), slice(start, end, axis.stride)


def _unfold(lines: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Unfold the axes behind the first three of ``(channels, lines, n, *space)``.

    Returns
    -------
    Tensor
        Shape ``(channels, taps, lines, n, *positions)``.
    """
    choices = list(itertools.product(*(list(_columns(axis)) for axis in axes)))
    channels, count, n = lines.shape[:3]
    result = lines.new_zeros((channels, len(choices), count, n, *(axis.positions for axis in axes)))
    for tap, choice in enumerate(choices):
        into, of = (tuple([slice(None)] * 3 + [place[side] for place in choice]) for side in (0, 1))
        result[:, tap][into] = lines[of]
    return result


def _blocks(taps: Sequence[_Tap], unfolded: Mapping[int, Tensor]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Sums of products of two taps' lines, for each pair of taps left ≤ right."""
    alike: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for left, right in itertools.combinations_with_replacement(range(len(taps)), 2):
        apart = (taps[left].phase, taps[right].phase, taps[right].begin - taps[left].begin)
        alike.setdefault(apart, []).append((left, right))
    for (phase, other, shift), pairs in alike.items():
        seen = {}
        for left, right in pairs:
            # Lines that both taps see; the rest are zeros for one of them.
            first = max(taps[left].first, taps[right].first - shift)
            seen[left, right] = first, max(first, min(taps[left].last, taps[right].last - shift))
        yield from _summed(unfolded[phase], unfolded[other], shift, seen)


def _summed(
    left: Tensor, right: Tensor, shift: int, seen: Mapping[tuple[int, int], tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """``Σ_{first ≤ m < last} left[m] right[m + shift]ᵀ`` for several pairs, each line multiplied once.

    What lines have in common is added up, never subtracted, so nothing cancels.
    """
    breaks = sorted({edge for lines in seen.values() for edge in lines})
    segments = {
        (first, last): _products(left, right, first, last, shift)
        for first, last in itertools.pairwise(breaks)
        if any(start <= first and last <= end for start, end in seen.values())
    }
    for pair, (start, end) in seen.items():
        parts = [block for (first, last), block in segments.items() if start <= first and last <= end]
        nothing = left.new_zeros((left.shape[0], left.shape[1], right.shape[1]))
        yield pair, functools.reduce(torch.add, parts) if parts else nothing


def _products(left: Tensor, right: Tensor, first: int, last: int, shift: int) -> Tensor:
    a = left[:, :, first:last].flatten(2)
    if left is right and shift == 0:
        return self_product(a[0])[None] if len(a) == 1 else a @ a.mT
    b = right[:, :, first + shift : last + shift].flatten(2)
    return (a[0] @ b[0].T)[None] if len(a) == 1 else a @ b.mT
