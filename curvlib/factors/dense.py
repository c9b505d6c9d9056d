"""Explicit rows: the kind that every other kind reduces to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from curvlib.arrays import Array, Vector, matrix_vector, namespace, product, self_product
from curvlib.errors import ConfigurationError
from curvlib.factors.base import Factors, joint_samples

__all__ = ["Dense"]


@dataclass(frozen=True, eq=False, init=False)
class Dense(Factors):
    """Explicit rows, one array a parameter.

    Parameters
    ----------
    values
        Parameter name to rows, shape ``(rows, *parameter shape)``.
    samples
        Observations that the rows stand for; None means one row each.
    **named
        The same as `values`, written as keywords: ``Dense(weight=rows)``.

    Raises
    ------
    ConfigurationError
        If there are no rows, or parameters disagree on their number.

    Examples
    --------
    >>> import torch
    >>> Dense(weight=torch.ones(3, 2)).gram().shape
    torch.Size([3, 3])
    """

    values: dict[str, Array]

    def __init__(self, values: Mapping[str, Array] | None = None, samples: int | None = None, **named: Array) -> None:
        merged = {**(values or {}), **named}
        lengths = [int(array.shape[0]) if array.ndim else -1 for array in merged.values()]
        if not lengths or lengths.count(lengths[0]) != len(lengths) or lengths[0] < 0:
            raise ConfigurationError(
                f"Dense needs one array of shape (rows, *parameter shape) for each parameter, all with the same number "
                f"of rows; the leading sizes given are {dict(zip(merged, lengths, strict=True))}"
            )
        object.__setattr__(self, "values", merged)
        object.__setattr__(self, "samples", samples)

    def dense(self) -> Dense:
        return self

    def matrix(self) -> Array:
        """J itself, shape ``(rows, parameters)``."""
        flat = [array.reshape(len(self), -1) for array in self.values.values()]
        return flat[0] if len(flat) == 1 else namespace(*flat).concat(flat, axis=1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(array.shape[1:]) for name, array in self.values.items()}

    def __len__(self) -> int:
        return int(next(iter(self.values.values())).shape[0])

    @property
    def like(self) -> Array:
        return next(iter(self.values.values()))

    def gram(self) -> Array:
        total = None
        for array in self.values.values():
            own = self_product(array.reshape(array.shape[0], -1))
            total = own if total is None else total + own
        return total

    def cross_gram(self, other: Factors) -> Array:
        self._require_same_block(other)
        if other.exceeds:
            return other.cross_gram(self).T
        theirs = other.dense()
        total = None
        for name, array in self.values.items():
            own = product(array.reshape(len(self), -1), theirs.values[name].reshape(len(theirs), -1).T)
            total = own if total is None else total + own
        return total

    def matvec(self, vector: Vector) -> Array:
        total = None
        for name, array in self.values.items():
            own = matrix_vector(array.reshape(array.shape[0], -1), vector[name].reshape(-1))
            total = own if total is None else total + own
        return total

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        return {
            name: matrix_vector(array.reshape(array.shape[0], -1).T, weights).reshape(array.shape[1:])
            for name, array in self.values.items()
        }

    def covariance(self) -> Array:
        rows = self.matrix()
        return rows.T @ rows

    def diagonal(self) -> dict[str, Array]:
        return {name: (array * array).sum(axis=0) for name, array in self.values.items()}

    def rows(self, index: Array) -> Dense:
        return Dense({name: array[index] for name, array in self.values.items()})

    def restricted(self, names: Collection[str]) -> Dense:
        return Dense({name: array for name, array in self.values.items() if name in names}, samples=self.samples)

    def scaled(self, scale: Array | float) -> Factors:
        from curvlib.factors.scaled import Scaled

        if isinstance(scale, float | int):
            return Scaled(self, float(scale), samples=self.samples)
        return self.weighted(scale)

    def weighted(self, scale: Array | float) -> Dense:
        """Return what `scaled` does, multiplied out."""
        rows = (len(self),)
        values = {name: array * spread(scale, rows, array.ndim) for name, array in self.values.items()}
        return Dense(values, samples=self.samples)

    def add(self, other: Factors) -> Factors:
        if self.shapes != other.shapes:
            return super().add(other)
        theirs = other.dense().values
        return Dense({name: array + theirs[name] for name, array in self.values.items()}, samples=self.samples)

    def cat(self, others: Sequence[Factors]) -> Dense:
        parts = [self, *(other.dense() for other in others)]
        for part in parts:
            self._require_same_block(part)
        xp = namespace(*self.values.values())
        values = {name: xp.concat([part.values[name] for part in parts], axis=0) for name in self.values}
        return Dense(values, samples=joint_samples([self, *others]))

    def portable(self) -> Dense:
        return self

    def renamed(self, names: Mapping[str, str]) -> Dense:
        return Dense({names.get(name, name): array for name, array in self.values.items()}, samples=self.samples)


def spread(scale: Array | float, shape: tuple[int, ...], ndim: int) -> Array | float:
    """Row weights reshaped to `shape` followed by axes of size one, `ndim` axes in all; a scalar stays as it is."""
    if isinstance(scale, float | int) or scale.ndim == 0:
        return scale
    return scale.reshape(*shape, *([1] * (ndim - len(shape))))
