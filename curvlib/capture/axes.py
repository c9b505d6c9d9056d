"""Where a recorded call has its samples: on the first axis, on another, as the outer part of the first, or nowhere.

Sizes do not prove meaning: a table of relative positions of shape ``(T, T)`` has an axis of n when n is T. So once, at
the pass that is checked, cotangents of the first and of the last sample alone are sent back: they reach nothing but
that sample's place on the sample axis. What was found then is kept, so that a later batch in which another axis happens
to have that size is not taken for another layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["ALONE", "MERGED", "likely_axis", "possible_axes", "samples_first", "spread", "told_by"]

MERGED = -1
"""In place of an axis: samples are the outer part of the first axis."""

ALONE = -2
"""In place of an axis: there is none, all samples share the call."""


def possible_axes(x: Sequence[int], y: Sequence[int], samples: int, positionwise: bool) -> list[int]:
    """Sample axes that fit the sizes of a call's input and output, the likeliest first.

    Parameters
    ----------
    x, y
        Shapes of input and output.
    samples
        n.
    positionwise
        Whether the layer acts on the last axis alone; otherwise its samples can only be on the first.
    """
    common = min(len(x), len(y)) if positionwise else 1
    axes = [axis for axis in range(common) if axis < len(x) and axis < len(y) and x[axis] == y[axis] == samples]
    if positionwise and x and y and x[0] == y[0] and x[0] % samples == 0:
        axes.append(MERGED)
    return axes


def likely_axis(
    x: Sequence[int], y: Sequence[int], samples: int, positionwise: bool, known: int | None = None
) -> int | None:
    """Sample axis by what is known of the call and its sizes; None where nothing fits."""
    if known == 0 and x and y and x[0] == y[0] == samples:
        return 0  # it is among those that are possible
    axes = possible_axes(x, y, samples, positionwise)
    if known in axes or known == ALONE:
        return known
    if positionwise and samples not in y[:-1] and (len(y) < 2 or y[0] % samples):
        return ALONE
    return axes[0] if axes else None


def told_by(g: Tensor, axes: Sequence[int], samples: int, sample: int) -> list[int]:
    """Those of the axes on which a cotangent of one sample alone is zero everywhere but at that sample.

    Parameters
    ----------
    g
        Cotangent of a call's output, of the shape of that output.
    axes
        Candidates, as of `possible_axes`.
    samples, sample
        n, and the position of the sample.
    """
    reached = g != 0

    def apart(axis: int) -> bool:
        if axis == MERGED:
            by_sample = reached.reshape(samples, -1).any(dim=1)
        else:
            by_sample = reached.movedim(axis, 0).reshape(samples, -1).any(dim=1)
        return not bool(by_sample[:sample].any()) and not bool(by_sample[sample + 1 :].any())

    return [axis for axis in axes if apart(axis)]


def samples_first(x: Tensor, g: Tensor, samples: int, axis: int) -> tuple[Tensor, Tensor]:
    """Input, and cotangents with columns in front, with the sample axis first (behind the columns)."""
    if axis == 0:
        return x, g
    if axis == ALONE:
        return x.expand(samples, *x.shape), g
    if axis == MERGED:
        return x.unflatten(0, (samples, -1)), g.unflatten(1, (samples, -1))  # type: ignore[no-untyped-call]
    return x.movedim(axis, 0), g.movedim(axis + 1, 1)


def spread(tensor: Tensor, samples: int) -> Tensor:
    """Return a tensor whose first axis of size 1 stands for all samples with one entry a sample, in the same memory."""
    return tensor.expand(samples, *tensor.shape[1:])
