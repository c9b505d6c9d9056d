"""Which exact route is cheapest, from the sizes alone: a small cost model, the same on every machine.

Costs are in multiply-adds. A pass over memory is charged at what it costs against arithmetic on common hardware, where
matrix products run tens of times faster than an elementwise pass over their result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "PositionsFirst",
    "Sizes",
    "chunk",
    "grouped_chunk",
    "grouped_gradient_pays",
    "lines_beat_patches",
    "list_chunk",
    "pair_table",
    "pairs_beat_rows",
    "pairs_worth_a_table",
    "rotated_chunk",
    "rotated_sample",
    "rotates_positions",
    "rows_are_cheaper_to_keep",
    "sample_chunk",
    "steps",
    "table_chunk",
    "table_is_cheaper_to_keep",
    "unfold_chunk",
]

_PASS = 16
"""Multiply-adds that take as long as reading or writing one element."""

_SMALL = 24
"""What the width of a matrix is short of for products at full speed."""

_UNFOLD = 80
"""Multiply-adds that take as long as one element of a patch in an order that its images are not in."""

_CALL = 1 << 20
"""Multiply-adds that take as long as handing over a small product."""

_TEMPORARY = 1 << 24
"""Elements that a temporary may hold before work is split into chunks (64 MiB in float32)."""

_GROUPED = 5 << 19
"""Elements of rows up to which one grouped weight gradient is fast (10 MiB in float32; 20 take seven times as long)."""

_UNFOLDED = 1 << 20
"""Elements of patches up to which they are made for all samples at once (4 MiB in float32)."""

_ROTATED = 5 << 19
"""Elements of rows up to which they are still in the cache when they are squared (10 MiB in float32)."""

_KEEP = 24
"""Positions from which explicit rows, read once, beat factored products that touch every position."""


class Sizes(NamedTuple):
    """Sizes of a shared outer product: ``(n, columns, positions, groups, d_in, d_out)``, widths per group."""

    n: int
    columns: int
    positions: int
    groups: int
    d_in: int
    d_out: int

    @property
    def rows(self) -> int:
        """Rows of J."""
        return self.n * self.columns

    @property
    def row_size(self) -> int:
        """Elements of the explicit rows of one sample."""
        return self.columns * self.groups * self.d_in * self.d_out

    @property
    def row_cost(self) -> int:
        """Cost of making all explicit rows."""
        product = self.rows * self.positions * self.groups * self.d_in * self.d_out
        return product + _PASS * self.rows * self.groups * self.d_in * self.d_out


def pairs_beat_rows(left: Sizes, right: Sizes) -> bool:
    """Whether the cross-Gram over pairs of positions is cheaper than making explicit rows and multiplying them."""
    pairs = left.positions * right.positions * left.groups
    inputs = left.n * right.n * pairs * (left.d_in + _PASS)
    cotangents = left.rows * right.rows * pairs * (left.d_out + 2 * _PASS)
    products = left.rows * right.rows * left.groups * left.d_in * left.d_out
    making = left.row_cost + (0 if left is right else right.row_cost)
    return inputs + cotangents < products + making


def chunk(left: Sizes, right: Sizes, limit: int | None = None) -> int:
    """Samples of `left` to take at a time so that a table of position pairs stays small.

    Parameters
    ----------
    left, right
        Sizes of both sides.
    limit
        Elements that a plan allows a temporary, None where it has no limit; as everywhere in this module.
    """
    a_sample = left.columns * left.positions * right.rows * right.positions
    return max(1, _small(limit) // max(1, a_sample))


def pair_table(left: Sizes, right: Sizes) -> int:
    """Elements of the table of position pairs of one sample with one sample."""
    return left.columns * left.positions * right.columns * right.positions


def _small(limit: int | None) -> int:
    """Elements of a temporary that is small, and within the limit of a plan."""
    return _TEMPORARY if limit is None else min(limit, _TEMPORARY)


def steps(elements: int, axes: Sequence[int]) -> list[int]:
    """How much of each axis to take at a time, all of the first ones if that is no more than `elements`, but some."""
    taken = []
    for size in axes:
        taken.append(max(1, min(size, elements)))
        elements //= taken[-1]
    return taken


def rows_are_cheaper_to_keep(sizes: Sizes) -> bool:
    """Whether explicit rows are cheaper to multiply with than the factored form, and no more than a little larger."""
    explicit = sizes.rows * sizes.groups * sizes.d_in * sizes.d_out
    factored = sizes.n * sizes.positions * sizes.groups * (sizes.d_in + sizes.columns * sizes.d_out)
    return explicit <= factored or (sizes.positions >= _KEEP and explicit <= 4 * factored)


def grouped_gradient_pays(sizes: Sizes, channels: int, taps: int) -> bool:
    """Whether a convolution's rows are cheaper as one grouped weight gradient than as products with unfolded patches.

    Unfolding writes every patch, the grouped gradient reorders every row, so the smaller of the two decides (measured:
    up to 2.7 times either way). Kernels of one tap need no unfolding; few or odd channels fall off the fast path of a
    weight gradient.

    A forward convolution and shifted views (`Route`) are chosen by timing alone. Of fifty shapes at batches of 32 and
    128 the first gained repeatedly only with one channel along an axis of thousands, by 1.0 to 1.35 on a quiet machine;
    shifted views were ahead once, by 1.2.

    Parameters
    ----------
    sizes
        Of the convolution.
    channels
        Input channels of a group.
    taps
        Elements of the kernel.
    """
    if sizes.groups > 1:
        return True
    return taps > 1 and channels % 8 == 0 and sizes.d_out < sizes.positions


def grouped_chunk(sizes: Sizes) -> int:
    """Samples whose rows are taken in one grouped weight gradient, so that they stay in the cache while reordered."""
    a_sample = sizes.groups * sizes.d_in * sizes.d_out
    return max(1, sizes.n if sizes.n * a_sample <= _GROUPED else _GROUPED // a_sample)


def unfold_chunk(sizes: Sizes) -> int:
    """Samples whose patches are unfolded at a time, so that they are still in the cache when they are multiplied."""
    a_sample = sizes.groups * sizes.d_in * sizes.positions
    parts = -(-sizes.n * a_sample // _UNFOLDED)
    return -(-sizes.n // min(parts, sizes.n))


class PositionsFirst(NamedTuple):
    """Whether a basis of the inputs, and one of the cotangents, is applied to positions; to explicit rows otherwise."""

    inputs: bool
    cotangents: bool


def rotates_positions(sizes: Sizes) -> PositionsFirst:
    """Where the two bases of rotated rows are applied: to positions or to rows, whichever have fewer vectors."""
    return PositionsFirst(sizes.positions < sizes.columns * sizes.d_out, sizes.positions < sizes.d_in)


def rotated_chunk(elements: int, n: int) -> int:
    """Samples whose rows, of so many elements each, are made and squared at a time; n of them in even parts."""
    parts = -(-n * elements // _ROTATED)
    return -(-n // min(max(parts, 1), n))


def rotated_sample(sizes: Sizes, d: int) -> int:
    """Elements of the largest array that one sample adds on the way to its squares in a basis of inputs of width d."""
    rows = sizes.columns * sizes.d_out * d
    # Products with a basis for each group copy it for every sample.
    bases = max(d * d, sizes.columns * sizes.d_out**2) if sizes.groups > 1 else 0
    return sizes.groups * max(rows, sizes.positions * d, bases)


def sample_chunk(elements: int, limit: int | None = None) -> int:
    """Samples to take at a time so that a temporary with so many elements for each stays small."""
    return max(1, _small(limit) // max(1, elements))


def lines_beat_patches(sizes: Sizes, along: int, stride: int) -> bool:
    """Whether second moments of a convolution's patches are cheaper from lines of its input than by unfolding it.

    Parameters
    ----------
    sizes
        Of the convolution.
    along, stride
        Elements of the kernel, and stride, along the axis of the lines.
    """
    rows = sizes.n * sizes.positions * sizes.groups
    wide, narrow = sizes.d_in, sizes.d_in // along
    patches = rows * wide * (wide + _SMALL + _UNFOLD)
    # Products of lines that lie equally far apart, and equally with respect to the stride, are taken once.
    products = sum(min(stride, along - apart) for apart in range(along))
    lines = products * rows * narrow * (narrow + _SMALL) + stride * rows * narrow * _PASS
    placing = along * along * _CALL + sizes.groups * wide * wide * _PASS
    return lines + placing < patches


def pairs_worth_a_table(left: Sizes, right: Sizes) -> float:
    """Pairs of lookups of one entry from which rows over that entry are cheaper than a product for each pair."""
    table = left.rows * right.rows + _PASS * (left.rows + right.rows)
    a_pair = left.columns * right.columns + 2 * _PASS * (left.columns + right.columns)
    return table / a_pair


def table_chunk(left: Sizes, right: Sizes, limit: int | None = None) -> int:
    """Entries of a table to take at a time so that rows over them stay small."""
    return max(1, _small(limit) // max(1, (left.rows + right.rows) * left.d_out))


def list_chunk(left: Sizes, right: Sizes, limit: int | None = None) -> int:
    """Lookups of `left` to take at a time so that a list of their pairs stays small, however they are distributed."""
    a_pair = (left.columns + right.columns) * left.d_out + left.columns * right.columns
    # A listed entry has fewer pairs than a table is worth, so none of its lookups has more than that.
    return max(1, int(_small(limit) / max(1.0, a_pair * pairs_worth_a_table(left, right))))


def table_is_cheaper_to_keep(sizes: Sizes, vocabulary: int) -> bool:
    """Whether explicit rows as long as a table of `vocabulary` entries are no larger than lookups in it."""
    return vocabulary <= sizes.positions
