"""Matrix products that are not multiplied yet, for whoever can add one to something without a pass of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from curvlib.arrays.linalg import add_multiples, add_product, product
from curvlib.arrays.namespace import Array

__all__ = ["Product", "as_array", "evaluated", "lazily"]

_WORTH = 1 << 15
"""Elements from which a pass over a product takes longer than what is to be done to save it."""


@dataclass(frozen=True, eq=False)
class Product:
    """A B, or A B + c · C, for arrays that have to stay as they are until it is used.

    Parameters
    ----------
    left, right
        A, shape ``(m, k)``, and B, shape ``(k, n)``.
    shaped
        Shape that the product is brought to, ``(m, n)`` if None.
    addend, multiple
        C, of that shape, and c; None for nothing.
    """

    left: Array
    right: Array
    shaped: tuple[int, ...] | None = None
    addend: Array | None = None
    multiple: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the value."""
        return self._matrix if self.shaped is None else self.shaped

    @property
    def _matrix(self) -> tuple[int, int]:
        return int(self.left.shape[0]), int(self.right.shape[1])

    @property
    def dtype(self) -> Any:
        """That of both."""
        return self.right.dtype

    def value(self) -> Array:
        """What it stands for, a new array."""
        whole = product(self.left, self.right).reshape(self.shape)
        return whole if self.addend is None else add_multiples([whole], [self.addend], self.multiple)[0]

    def add_to(self, total: Array, decay: float) -> None:
        """Add it to ``decay · total`` in place; `total` has its shape, and its elements in a row."""
        add_product(total.reshape(self._matrix), self.left, self.right, decay)
        if self.addend is not None:
            add_multiples([total], [self.addend], self.multiple)


def lazily(left: Array, right: Array, shaped: tuple[int, ...] | None = None) -> Array | Product:
    """`Product` of two matrices, or its value where it is small."""
    one = Product(left, right, shaped)
    return one if prod(one.shape) >= _WORTH else one.value()


def as_array(one: Array | Product) -> Array:
    """An array as it is, or the value of a product."""
    return one.value() if isinstance(one, Product) else one


def evaluated(vector: Mapping[str, Array | Product]) -> dict[str, Array]:
    """Block vector with the values of its products."""
    return {name: as_array(one) for name, one in vector.items()}
