"""Grams and rows of convolutions by parts of samples and of parameters, so that a plan's limit on memory holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from curvlib.arrays import Array
from curvlib.factors import Dense
from curvlib.factors.planned import blocks, slices, total

if TYPE_CHECKING:
    from curvlib.layers.convolution import ConvolutionFactors

__all__ = ["gram_in_parts", "pair_gram", "rows_in_parts"]


def pair_gram(left: ConvolutionFactors, right: ConvolutionFactors) -> Array:
    """Cross-Gram over pairs of positions, of patches of as many samples at a time as the limit allows."""
    left, right = left.sharing_plan(right), right.sharing_plan(left)
    limit = left.gram_limit(right)
    mine, theirs = left.unfolded_parts(limit), right.unfolded_parts(limit)
    strips = []
    for part in mine:
        patches = part.patches()
        strips.append(blocks([patches], theirs, lambda one, other: one.pair_gram(other.patches())))
    return strips[0] if len(strips) == 1 else torch.cat(strips)


def gram_in_parts(left: ConvolutionFactors, right: ConvolutionFactors) -> Array:
    """Cross-Gram summed over parts of the parameters, so that explicit rows of neither exceed the limit."""
    same, left, right = right is left, left.sharing_plan(right), right.sharing_plan(left)
    sizes = left.sizes
    taps = prod(left.weight_shape[2:])
    channels = 1 if left.weight is None else left.weight_shape[1]
    elements = (left.gram_limit(right) or 1) // (max(len(left), len(right)) * taps)

    def product(part: tuple[slice, ...]) -> Array:
        mine = _of_parameters(left, *part).dense()
        return mine.gram() if same else mine.cross_gram(_of_parameters(right, *part).dense())

    # All outputs with some channels, whose patches are then made once.
    return total(map(product, slices(elements, sizes.groups, channels, sizes.d_out)))


def _of_parameters(factors: ConvolutionFactors, groups: slice, channels: slice, outputs: slice) -> ConvolutionFactors:
    """Columns of J that belong to a part of the weight, and to that of the bias with the first channels."""
    x, g = factors.images, factors.cotangents
    x = x.reshape(len(x), factors.groups, -1, *x.shape[2:])[:, groups, channels]
    g = g.reshape(*g.shape[:2], factors.groups, -1, *g.shape[3:])[:, :, groups, outputs]
    return dataclasses.replace(
        factors,
        images=x.flatten(1, 2),
        cotangents=g.flatten(2, 3),
        weight_shape=(g.shape[2] * g.shape[3], x.shape[2], *factors.weight_shape[2:]),
        groups=x.shape[1],
        bias=None if channels.start else factors.bias,
        plan=None if factors.plan is None else factors.plan.apart(),
    )


def rows_in_parts(parts: Sequence[ConvolutionFactors], samples: int | None) -> Dense:
    """Explicit rows of parts of the samples, one after the other."""
    made = [part.dense().values for part in parts]
    return Dense({name: torch.cat([values[name] for values in made]) for name in made[0]}, samples=samples)
