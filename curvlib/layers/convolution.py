"""Adapter of `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, with everything that their constructors allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlib.arrays import Array, Vector
from curvlib.factors import Dense, Factors, KroneckerLayout, KroneckerPair, KroneckerRows, Scaled, SharedOuter, cost
from curvlib.factors.base import Sharing, joint_samples
from curvlib.factors.dense import spread
from curvlib.factors.kronecker import bordered
from curvlib.factors.planned import Planned, blocks, joint_pair, total
from curvlib.factors.rotation import rotated_product_squares, rotated_row_squares
from curvlib.factors.scaled import unscaled
from curvlib.factors.shared import rename
from curvlib.layers.autocorrelation import Kernel, patch_moments, patch_sums, position_moments, windows
from curvlib.layers.convolution_parts import gram_in_parts, pair_gram, rows_in_parts
from curvlib.layers.linear import trainable
from curvlib.layers.registry import register
from curvlib.layers.sample_gradients import CONVOLUTIONS, SAMPLE_GRADIENTS, weight_gradient

__all__ = ["ConvolutionFactors", "convolution"]


@dataclass(frozen=True, eq=False)
class ConvolutionFactors(Planned):
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
        n, columns, _, *positions = self.cotangents.shape
        d_out, d_in = self.weight_shape[0] // self.groups, prod(self.weight_shape[1:])
        return cost.Sizes(n, columns, prod(positions), self.groups, d_in, d_out)

    # -- routes -------------------------------------------------------------------------------------------------------

    def patches(self) -> SharedOuter:
        """Return the same rows as a sum over positions of patches (the unfolded input)."""
        n, columns, d_out = self.cotangents.shape[:3]
        overlapping, dims = windows(self.images, self._kernel), len(self.stride)
        # (n, channels, *positions, *kernel) -> (n, positions, groups, channels / groups · kernel)
        overlapping = overlapping.reshape(n, self.groups, -1, *overlapping.shape[2:])
        order = (0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
        inputs = overlapping.permute(order).reshape(n, -1, self.groups, self.sizes.d_in)
        cotangents = self.cotangents.reshape(n, columns, self.groups, d_out // self.groups, -1)
        return SharedOuter(
            inputs,
            cotangents.permute(0, 1, 4, 2, 3),
            weight_shape=self.weight_shape,
            weight=self.weight,
            bias=self.bias,
            samples=self.samples,
            plan=self.plan,
        )

    def dense(self) -> Dense:
        n, columns = self.cotangents.shape[:2]
        values = {}
        if self.weight is not None:
            parts = self.unfolded_parts(self.limit())
            route = parts[0]._rows_route()
            if route == "unfold" and len(parts) > 1:
                return rows_in_parts(parts, self.samples)
            g = [self.cotangents[:, column] for column in range(columns)]
            rows = self._weight_rows(route, g)
            values[self.weight] = rows[0] if columns == 1 else torch.stack(rows, dim=1).flatten(0, 1)
        if self.bias is not None:
            values[self.bias] = self.cotangents.flatten(3).sum(-1).reshape(n * columns, -1)
        return Dense(values, samples=self.samples)

    def _weight_rows(self, route: str, columns: Sequence[Tensor]) -> list[Tensor]:
        gradients, chunk = SAMPLE_GRADIENTS[route]
        step = chunk(self.sizes)
        return gradients(columns, self.images, self.weight_shape, self._kernel, self.groups, step, self._empty)

    def _rows_route(self, foreseen: bool = False) -> str:
        pays = cost.grouped_gradient_pays(self.sizes, self.weight_shape[1], self._kernel.taps)
        default = "grouped" if pays else "unfold"
        if self.plan is None:
            return default
        if foreseen:
            return self.plan.foreseen("rows", self.sizes, default, self._what)
        g = [self.cotangents[:, 0]]
        candidates = {route: lambda route=route: self._weight_rows(route, g)[0] for route in SAMPLE_GRADIENTS}
        return self.plan.choose("rows", self.sizes, default, candidates, self._what)

    def _empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Memory for rows."""
        return like.new_empty(tuple(shape)) if self.plan is None else self.plan.plan.buffers.empty(like, shape)

    @property
    def _kernel(self) -> Kernel:
        return Kernel(self.weight_shape[2:], self.stride, self.dilation, self.padding)

    def _what(self) -> Hashable:
        """What times depend on besides sizes."""
        names, images = (self.weight is None, self.bias is None), self.images
        return ConvolutionFactors, self._kernel, tuple(images.shape[2:]), *names, images.dtype, str(images.device)

    # -- algebra ------------------------------------------------------------------------------------------------------

    @property
    def like(self) -> Array:
        return self.cotangents

    def gram(self) -> Array:
        if self._gram_route() == "pairs":
            return pair_gram(self, self)
        return gram_in_parts(self, self) if self.exceeds else self.dense().gram()

    def _gram_route(self, foreseen: bool = False) -> str:
        default = "pairs" if cost.pairs_beat_rows(self.sizes, self.sizes) else "rows"
        if self.plan is None:
            return default
        if foreseen and not self.exceeds:
            return self.plan.foreseen("gram", self.sizes, default, self._what)
        candidates = {
            "pairs": lambda: pair_gram(self, self),
            "rows": lambda: self.dense().gram(),
        }
        return self.plan.choose("gram", self.sizes, default, None if self.exceeds else candidates, self._what)

    def cross_gram(self, other: Factors) -> Array:
        self._require_same_block(other)
        limit = self.gram_limit(unscaled(other)[0])
        if isinstance(other, ConvolutionFactors) and other.groups == self.groups:
            default = "pairs" if cost.pairs_beat_rows(self.sizes, other.sizes) else "rows"
            plan = self.plan_with(other)
            if (default if plan is None else plan.choose("gram", self.sizes, default)) == "pairs":
                return pair_gram(self, other)
            if self.exceeds_with(other):
                return gram_in_parts(self, other)
        elif limit is not None and isinstance(other, Scaled):
            return self.cross_gram(other.base) * other.scale
        elif limit is not None and isinstance(other, SharedOuter):
            return blocks(self.unfolded_parts(limit), [other], lambda one, other: one.patches().cross_gram(other))
        elif self.exceeds:
            return blocks(self.explicit_parts(limit), [other], lambda one, other: one.dense().cross_gram(other))
        return self.dense().cross_gram(other)

    def of_samples(self, samples: slice) -> ConvolutionFactors:
        images, cotangents = self.images[samples], self.cotangents[samples]
        return dataclasses.replace(self, images=images, cotangents=cotangents, samples=None)

    def unfolded_parts(self, limit: int | None) -> list[ConvolutionFactors]:
        """These rows, or parts of their samples whose patches are within a limit."""
        sizes = self.sizes
        return self.in_parts(sizes.positions * sizes.groups * sizes.d_in, limit)

    def matvec(self, vector: Vector) -> Array:
        if self.weight is None:
            return self.dense().matvec(vector)
        bias = None if self.bias is None else vector[self.bias]
        outputs = self._convolved(self.images, vector[self.weight], bias)
        return (self.cotangents * outputs[:, None]).flatten(2).sum(-1).reshape(-1)

    def _convolved(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = CONVOLUTIONS[len(self.stride)]
        return convolve(images, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        weighted = self._weighted(weights).cotangents.sum(dim=1)
        result = {}
        if self.weight is not None:
            result[self.weight] = weight_gradient(weighted, self.images, self.weight_shape, self._kernel, self.groups)
        if self.bias is not None:
            result[self.bias] = weighted.flatten(2).sum(-1).sum(0)
        return result

    def restricted(self, names: Collection[str]) -> Factors:
        if not self.exceeds:
            return super().restricted(names)
        weight, bias = (name if name in names else None for name in (self.weight, self.bias))
        return dataclasses.replace(self, weight=weight, bias=bias)

    def _layout(self) -> KroneckerLayout:
        return KroneckerLayout(self.weight, self.bias, self.weight_shape, self.groups)

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        if sharing == "expand":
            return self.patches().kronecker_rows(sharing)
        sizes = self.sizes
        inputs = patch_sums(self.images, self._kernel).reshape(sizes.n, self.groups, -1) / sizes.positions
        cotangents = self.cotangents.flatten(3).sum(-1).reshape(sizes.rows, self.groups, -1)
        return KroneckerRows(inputs.transpose(0, 1), cotangents.transpose(0, 1), self._layout())

    def kronecker_means(self) -> tuple[Array, Array, KroneckerLayout]:
        # Patches of the mean image are the mean patches: one image to unfold instead of all.
        mean = dataclasses.replace(self, images=self.images.mean(0, keepdim=True), cotangents=self.cotangents[:1])
        inputs, _, layout = mean.patches().kronecker_means()
        return inputs, self.cotangents.flatten(3).sum(-1).sum((0, 1)).reshape(self.groups, -1), layout

    def kronecker(self, sharing: Sharing = "expand") -> KroneckerPair:
        parts = self.unfolded_parts(self.limit())
        if sharing == "expand" and len(parts) > 1 and (self.weight is None or not self._has_lines()):
            return joint_pair(parts, sharing)
        if sharing == "reduce" or self.weight is None:
            return super().kronecker(sharing)
        cotangents = position_moments(self.cotangents.flatten(0, 1), self.groups)
        return KroneckerPair(self._input_moments(), cotangents, self._layout())

    def _has_lines(self) -> bool:
        kernel, axis = self._kernel, self._kernel.line_axis
        return cost.lines_beat_patches(self.sizes, kernel.size[axis], kernel.stride[axis])

    def _input_moments(self) -> Array:
        sizes, kernel = self.sizes, self._kernel
        if not self._has_lines():
            return self.patches().kronecker_rows().input_moments()
        rows = sizes.n * sizes.positions
        moments = patch_moments(self.images, kernel, self.groups, self.limit()) / rows
        if self.bias is None:
            return moments
        total = patch_sums(self.images.sum(0, keepdim=True), kernel)
        return bordered(moments, total.reshape(self.groups, -1) / rows)

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        if self.weight is None:
            parts = self.unfolded_parts(self.limit())
            return total(part.patches().rotated_squares(inputs, cotangents) for part in parts)
        sizes, limit = self.sizes, self.limit()
        positions_first = cost.rotates_positions(sizes)
        # Samples whose rows, or whose positions in the basis of the inputs, are made at a time.
        elements = sizes.positions * inputs[..., 0].numel() if positions_first.inputs else sizes.row_size
        step = cost.sample_chunk(elements if limit is None else cost.rotated_sample(sizes, inputs.shape[2]), limit)
        squares: Array = 0
        for start in range(0, sizes.n, step):
            images, g = self.images[start : start + step], self.cotangents[start : start + step]
            g = g.reshape(*g.shape[:2], self.groups, sizes.d_out, -1)
            if positions_first.cotangents:
                g = cotangents.mT @ g
            then = None if positions_first.cotangents else cotangents
            if positions_first.inputs:
                rotated = self._rotated_inputs(images, inputs)
                squares = squares + rotated_product_squares(g, rotated, then)
            else:
                part = dataclasses.replace(
                    self, images=images, cotangents=g.reshape(len(g), -1, *self.cotangents.shape[2:])
                )
                matrix = self._layout().matrix(part.dense().values)
                squares = squares + rotated_row_squares(matrix, inputs, then)
        return squares

    def _rotated_inputs(self, images: Tensor, basis: Tensor) -> Tensor:
        """Patches in a basis, shape ``(n, groups, positions, d)``: what its vectors respond with, as filters."""
        d, d_in = basis.shape[2], self.sizes.d_in
        filters = basis[:, :d_in].mT.reshape(-1, *self.weight_shape[1:])
        bias = None if self.bias is None else basis[:, d_in].reshape(-1)
        return self._convolved(images, filters, bias).reshape(len(images), self.groups, d, -1).mT

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
        return self.dense() if self._keeps() == "rows" else self

    def _keeps(self) -> str:
        sizes = self.sizes
        pays = cost.rows_are_cheaper_to_keep(sizes) or not cost.pairs_beat_rows(sizes, sizes)
        default = "rows" if pays else "factored"
        if self.plan is None:
            return default
        return "factored" if self.exceeds else self.plan.choose("keep", sizes, default)

    @property
    def route(self) -> str:
        rows, gram = self._rows_route(foreseen=True), self._gram_route(foreseen=True)
        return f"rows by {rows}, Gram over {gram}, keeps {self._keeps()}"

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
