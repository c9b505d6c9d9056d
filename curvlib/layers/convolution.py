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
from curvlib.factors import Dense, Factors, KroneckerRows, Scaled, SharedOuter, cost
from curvlib.factors.base import Sharing, joint_samples
from curvlib.factors.dense import full_rows, spread
from curvlib.factors.shared import rename
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register

__all__ = ["ConvolutionFactors", "convolution"]

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True, eq=False)
class ConvolutionFactors(Factors):
    """Rows of a convolution, kept as images and cotangents; patches are made only where a route needs them.

    Parameters
    ----------
    images
        The layer's input, shape ``(n, channels, *space)``.
    cotangents
        Shape ``(n, columns, d_out, *positions)``.
    weight_shape
        ``(d_out, channels / groups, *kernel)``.
    stride, dilation, groups
        As the layer has them.
    weight, bias
        Names of the parameters, None for one that is frozen or missing.
    padding
        Zeros on both sides of each axis that `images` is still without; all other padding is in `images`. Empty for no
        zeros.
    """

    images: Tensor
    cotangents: Tensor
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    weight: str | None = "weight"
    bias: str | None = None
    padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.padding:
            object.__setattr__(self, "padding", (0,) * len(self.stride))
        for name in ("weight_shape", "stride", "dilation", "padding"):
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
        windows, dims = self._windows(), len(self.stride)
        # (n, channels, *positions, *kernel) -> (n, positions, groups, channels / groups · kernel)
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
            make = self._grouped_weight_gradient if self._groups_pay() else self._unfolded_rows
            rows = make([self.cotangents[:, column] for column in range(columns)])
            values[self.weight] = rows[0] if columns == 1 else torch.stack(rows, dim=1).flatten(0, 1)
        if self.bias is not None:
            values[self.bias] = self.cotangents.flatten(3).sum(-1).reshape(n * columns, -1)
        return Dense(values, samples=self.samples)

    def _groups_pay(self) -> bool:
        """Whether rows are made as a grouped weight gradient rather than from the unfolded input."""
        channels, kernel = self.weight_shape[1], self.weight_shape[2:]
        return cost.grouped_gradient_pays(self.sizes, channels, torch.Size(kernel).numel())

    def _grouped_weight_gradient(self, columns: Sequence[Tensor]) -> list[Tensor]:
        # Samples become groups of one big convolution, whose ordinary weight gradient holds a row for each sample.
        n, d_out = columns[0].shape[:2]
        weight = columns[0].new_empty(()).expand(n * d_out, *self.weight_shape[1:])
        images = self.images.reshape(1, -1, *self.images.shape[2:])
        return [
            self._weight_gradient(g.reshape(1, n * d_out, *g.shape[2:]), images, weight, n * self.groups).reshape(
                n, *self.weight_shape
            )
            for g in columns
        ]

    def _unfolded_rows(self, columns: Sequence[Tensor]) -> list[Tensor]:
        # A product of cotangents and patches for each sample and group; positions come last in both.
        n, d_out = columns[0].shape[:2]
        dims = len(self.stride)
        windows = self._windows()
        order = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        patches = windows.permute(order).reshape(n * self.groups, self.sizes.d_in, -1).mT
        return [
            torch.bmm(g.reshape(n * self.groups, d_out // self.groups, -1), patches).reshape(n, *self.weight_shape)
            for g in columns
        ]

    def _windows(self) -> Tensor:
        """Overlapping view of the images, shape ``(n, channels, *positions, *kernel)``."""
        windows = self._padded()
        for axis, (size, step, apart) in enumerate(
            zip(self.weight_shape[2:], self.stride, self.dilation, strict=True), start=2
        ):
            windows = windows.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        return windows

    def _weight_gradient(self, cotangents: Tensor, images: Tensor, weight: Tensor, groups: int) -> Tensor:
        _, gradient, _ = torch.ops.aten.convolution_backward(
            cotangents,
            images,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            groups,
            [False, True, False],
        )
        return gradient  # type: ignore[no-any-return]  # torch.ops is untyped

    def _padded(self) -> Tensor:
        margins = [zeros for one in reversed(self.padding) for zeros in (one, one)]
        return functional.pad(self.images, margins) if any(margins) else self.images

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
        outputs = convolve(
            self.images, vector[self.weight], bias, self.stride, self.padding, self.dilation, self.groups
        )
        return (self.cotangents * outputs[:, None]).flatten(2).sum(-1).reshape(-1)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        weighted = self._weighted(weights).cotangents.sum(dim=1)
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

    def scaled(self, scale: Array | float) -> Factors:
        if isinstance(scale, float | int):
            return Scaled(self, float(scale), samples=self.samples)
        return self._weighted(scale)

    def _weighted(self, scale: Array) -> ConvolutionFactors:
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

    def portable(self) -> SharedOuter:
        return self.patches()

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
    margins, padding = layer._reversed_padding_repeated_twice, ()
    if layer.padding_mode == "zeros" and margins[::2] == margins[1::2]:
        padding = tuple(margins[::-2])
    elif any(margins):
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
        padding=padding,
    )
