"""Matrix products that are not multiplied yet, for whoever can add one to something without a pass of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvlib.arrays.linalg import add_product, product
from curvlib.arrays.namespace import Array

__all__ = ["Product", "as_array", "evaluated"]


@dataclass(frozen=True, eq=False)
class Product:
    """A B for matrices A and B, which have to stay as they are until it is used.

    Parameters
    ----------
    left, right
        A, shape ``(m, k)``, and B, shape ``(k, n)``.
    shaped
        Shape that the product is brought to, ``(m, n)`` if None.
    """

    left: Array
    right: Array
    shaped: tuple[int, ...] | None = None

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
        return product(self.left, self.right).reshape(self.shape)

    def add_to(self, total: Array, decay: float) -> None:
        """``total ← decay · total + A B`` in place; `total` has as many elements, in a row."""
        add_product(total.reshape(self._matrix), self.left, self.right, decay)


def as_array(one: Array | Product) -> Array:
    """An array as it is, or the value of a product."""
    return one.value() if isinstance(one, Product) else one


def evaluated(vector: Mapping[str, Array | Product]) -> dict[str, Array]:
    """Block vector with the values of its products."""
    return {name: as_array(one) for name, one in vector.items()}
