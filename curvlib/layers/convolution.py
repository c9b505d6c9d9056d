"""Adapter of `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, with everything that their constructors allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib.arrays import Array, Vector
from curvlib.factors import Dense, Factors, KroneckerRows, SharedOuter, cost
from curvlib.factors.base import Sharing, joint_samples
from curvlib.factors.dense import full_rows, spread
from curvlib.factors.shared import rename
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register

__all__ = ["ConvolutionFactors", "convolution"]

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True, eq=False)
class ConvolutionFactors(Factors):
    """Rows of a convolution, kept as padded images and cotangents; patches are made only where a route needs them.

    Parameters
    ----------
    images
        The layer's padded input, shape ``(n, channels, *space)``.
    cotangents
        Shape ``(n, columns, d_out, *positions)``.
    weight_shape
        ``(d_out, channels / groups, *kernel)``.
    stride, dilation, groups
        As the layer has them; all padding is in `images`.
    weight, bias
        Names of the parameters, None for one that is frozen or missing.
    """

    images: Tensor
    cotangents: Tensor
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    weight: str | None = "weight"
    bias: str | None = None

    def __post_init__(self) -> None:
        for name in ("weight_shape", "stride", "dilation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        weight = {} if self.weight is None else {self.weight: self.weight_shape}
        bias = {} if self.bias is None else {self.bias: self.weight_shape[:1]}
        return weight | bias

    def __len__(self) -> int:
        return int(self.cotangents.shape[0] * self.cotangents.shape[1])

    @property
    def sizes(self) -> cost.Sizes:
        """The sizes that decide which route is cheapest."""
        n, columns = self.cotangents.shape[:2]
        positions = self.cotangents[0, 0, 0].numel()
        d_in = torch.Size(self.weight_shape[1:]).numel()
        return cost.Sizes(n, columns, positions, self.groups, d_in, self.weight_shape[0] // self.groups)

    # -- routes -------------------------------------------------------------------------------------------------------

    def patches(self) -> SharedOuter:
        """Return the same rows as a sum over positions of patches (the unfolded input)."""
        n, columns, d_out = self.cotangents.shape[:3]
        kernel = self.weight_shape[2:]
        windows = self.images
        for axis, (size, step, apart) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), start=2):
            windows = windows.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        # (n, channels, *positions, *kernel) -> (n, positions, groups, channels / groups · kernel)
        dims = len(kernel)
        windows = windows.reshape(n, self.groups, -1, *windows.shape[2:])
        order = (0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
        inputs = windows.permute(order).reshape(n, -1, self.groups, self.sizes.d_in)
        cotangents = self.cotangents.reshape(n, columns, self.groups, d_out // self.groups, -1)
        return SharedOuter(
            inputs,
            cotangents.permute(0, 1, 4, 2, 3),
            weight_shape=self.weight_shape,
            weight=self.weight,
            bias=self.bias,
            samples=self.samples,
        )

    def dense(self) -> Dense:
        n, columns = self.cotangents.shape[:2]
        values = {}
        if self.weight is not None:
            rows = [self._grouped_weight_gradient(self.cotangents[:, column]) for column in range(columns)]
            values[self.weight] = rows[0] if columns == 1 else torch.stack(rows, dim=1).flatten(0, 1)
        if self.bias is not None:
            values[self.bias] = self.cotangents.flatten(3).sum(-1).reshape(n * columns, -1)
        return Dense(values, samples=self.samples)

    def _grouped_weight_gradient(self, cotangents: Tensor) -> Tensor:
        # Samples become groups of one big convolution, whose ordinary weight gradient holds a row for each sample.
        n = cotangents.shape[0]
        d_out, *kernel = self.weight_shape
        weight = cotangents.new_empty(()).expand(n * d_out, *kernel)
        rows = self._weight_gradient(
            cotangents.reshape(1, n * d_out, *cotangents.shape[2:]),
            self.images.reshape(1, -1, *self.images.shape[2:]),
            weight,
            n * self.groups,
        )
        return rows.reshape(n, *self.weight_shape)

    def _weight_gradient(self, cotangents: Tensor, images: Tensor, weight: Tensor, groups: int) -> Tensor:
        dims = len(self.stride)
        images = self._without_remainder(images)
        _, gradient, _ = torch.ops.aten.convolution_backward(
            cotangents,
            images,
            weight,
            None,
            self.stride,
            [0] * dims,
            self.dilation,
            False,
            [0] * dims,
            groups,
            [False, True, False],
        )
        return gradient  # type: ignore[no-any-return]  # torch.ops is untyped

    def _without_remainder(self, images: Tensor) -> Tensor:
        """Drop the border that the stride never reaches."""
        for axis, (size, step, apart) in enumerate(
            zip(self.weight_shape[2:], self.stride, self.dilation, strict=True), start=2
        ):
            reached = step * (self.cotangents.shape[axis + 1] - 1) + apart * (size - 1) + 1
            images = images.narrow(axis, 0, reached)
        return images

    # -- algebra ------------------------------------------------------------------------------------------------------

    def row_weights(self, value: float) -> Array:
        return full_rows(self.cotangents, len(self), value)

    def gram(self) -> Array:
        if cost.pairs_beat_rows(self.sizes, self.sizes):
            return self.patches().gram()
        return self.dense().gram()

    def cross_gram(self, other: Factors) -> Array:
        if isinstance(other, ConvolutionFactors) and cost.pairs_beat_rows(self.sizes, other.sizes):
            return self.patches().cross_gram(other.patches())
        return self.dense().cross_gram(other)

    def matvec(self, vector: Vector) -> Array:
        if self.weight is None:
            return self.dense().matvec(vector)
        bias = None if self.bias is None else vector[self.bias]
        convolve = _CONVOLUTIONS[len(self.stride)]
        outputs = convolve(self.images, vector[self.weight], bias, self.stride, 0, self.dilation, self.groups)
        return (self.cotangents * outputs[:, None]).flatten(2).sum(-1).reshape(-1)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        weighted = self.scaled(weights).cotangents.sum(dim=1)
        result = {}
        if self.weight is not None:
            weight = weighted.new_empty(()).expand(self.weight_shape)
            result[self.weight] = self._weight_gradient(weighted, self.images, weight, self.groups)
        if self.bias is not None:
            result[self.bias] = weighted.flatten(2).sum(-1).sum(0)
        return result

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        return self.patches().kronecker_rows(sharing)

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        return self.patches().rotated_squares(inputs, cotangents)

    def rows(self, index: Array) -> ConvolutionFactors:
        flat = self.cotangents.reshape(len(self), 1, *self.cotangents.shape[2:])
        images = self.images[index // self.cotangents.shape[1]]
        return dataclasses.replace(self, images=images, cotangents=flat[index], samples=None)

    def scaled(self, scale: Array | float) -> ConvolutionFactors:
        g = self.cotangents
        return dataclasses.replace(self, cotangents=g * spread(scale, g.shape[:2], g.ndim))

    def add(self, other: Factors) -> Factors:
        theirs = other.patches() if isinstance(other, ConvolutionFactors) else other
        return self.patches().add(theirs)

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[ConvolutionFactors] = [self]
        for other in others:
            fits = isinstance(other, ConvolutionFactors) and (
                other.images.shape[1:] == self.images.shape[1:]
                and other.cotangents.shape[1:] == self.cotangents.shape[1:]
            )
            if not fits:
                return super().cat(others)
            parts.append(other)  # type: ignore[arg-type]  # checked by `fits`
        return dataclasses.replace(
            self,
            images=torch.cat([part.images for part in parts]),
            cotangents=torch.cat([part.cotangents for part in parts]),
            samples=joint_samples(parts),
        )

    def compact(self) -> Factors:
        sizes = self.sizes
        if cost.rows_are_cheaper_to_keep(sizes) or not cost.pairs_beat_rows(sizes, sizes):
            return self.dense()
        return self

    def renamed(self, names: Mapping[str, str]) -> ConvolutionFactors:
        return dataclasses.replace(self, weight=rename(self.weight, names), bias=rename(self.bias, names))


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d, columns=True)
def convolution(layer: Any, x: Tensor, g: Tensor) -> Factors:
    """Rows of a convolution: for each sample the weight gradient of its own cotangent.

    Parameters
    ----------
    layer
        Any stride, dilation, groups, padding (integers, "same", "valid") and padding mode.
    x
        Shape ``(n, channels, *space)``.
    g
        Shape ``(n, columns, d_out, *positions)``.
    """
    weight, bias = trainable(layer)
    # The layer's own bookkeeping: (last axis before, last axis after, …), "same" already resolved to numbers.
    margins = layer._reversed_padding_repeated_twice
    if any(margins):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, margins, mode=mode)
    return ConvolutionFactors(
        x,
        g,
        weight_shape=tuple(layer.weight.shape),
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        weight=weight,
        bias=bias,
    )
