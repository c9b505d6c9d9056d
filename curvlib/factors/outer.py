"""One outer product a row: the Jacobian of a linear map without weight sharing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from curvlib.arrays import (
    TRANSIENT,
    Array,
    Product,
    Vector,
    contract,
    evaluated,
    hadamard_gram,
    lazily,
    matrix_vector,
    namespace,
    product,
    row_products,
    same,
    scaled_rows,
    self_product,
)
from curvlib.errors import ConfigurationError
from curvlib.factors.base import Factors, Sharing, joint_samples
from curvlib.factors.dense import Dense, spread
from curvlib.factors.kronecker import KroneckerLayout, KroneckerRows
from curvlib.factors.scaled import Scaled
from curvlib.factors.shared import SharedOuter, rename

__all__ = ["OuterProduct"]


@dataclass(frozen=True, eq=False)
class OuterProduct(Factors):
    """Row (sample i, column c) is ``g_ic [a_i, 1]ᵀ``; the 1 is the bias's and never stored.

    Parameters
    ----------
    inputs
        a, shape ``(n, d_in)``.
    cotangents
        g, shape ``(n, columns, d_out)``, or ``(n, d_out)`` for one column.
    weight
        Name of the parameter of shape ``(d_out, d_in)``; None where it is frozen.
    bias
        Name of the parameter of shape ``(d_out,)``; None where there is none.

    Notes
    -----
    ``J Jᵀ = (A Aᵀ + 1) ∘ (G Gᵀ)`` is a Hadamard product of two small Gram matrices (TENGraD, section on the
    covariance factorization; arXiv 2106.03947), so J is never formed.
    """

    inputs: Array
    cotangents: Array
    weight: str | None = "weight"
    bias: str | None = None
    memo: list[tuple[Array, Array]] | None = field(default=None, kw_only=True, repr=False, metadata=TRANSIENT)

    def __post_init__(self) -> None:
        if self.cotangents.ndim == 2:
            object.__setattr__(self, "cotangents", self.cotangents[:, None, :])
        if self.inputs.ndim != 2 or self.cotangents.ndim != 3 or self.inputs.shape[0] != self.cotangents.shape[0]:
            raise ConfigurationError(
                f"an outer product needs inputs (n, d_in) and cotangents (n, columns, d_out); got "
                f"{tuple(self.inputs.shape)} and {tuple(self.cotangents.shape)}"
            )
        if self.weight is None and self.bias is None:
            raise ConfigurationError("an outer product needs the name of a weight, of a bias, or of both")

    def dense(self) -> Dense:
        values = {}
        if self.weight is not None:
            rows = contract("nco,ni->ncoi", self.cotangents, self.inputs)
            values[self.weight] = rows.reshape(len(self), *self.shapes[self.weight])
        if self.bias is not None:
            values[self.bias] = self._flat_cotangents()
        return Dense(values, samples=self.samples)

    def _flat_cotangents(self) -> Array:
        return self.cotangents.reshape(len(self), -1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        d_out, d_in = int(self.cotangents.shape[2]), int(self.inputs.shape[1])
        shapes: dict[str, tuple[int, ...]] = {}
        if self.weight is not None:
            shapes[self.weight] = (d_out, d_in)
        if self.bias is not None:
            shapes[self.bias] = (d_out,)
        return shapes

    def __len__(self) -> int:
        return int(self.cotangents.shape[0] * self.cotangents.shape[1])

    @property
    def outer_sizes(self) -> tuple[int, int, int]:
        return len(self), int(self.inputs.shape[1]), int(self.cotangents.shape[2])

    @property
    def like(self) -> Array:
        return self.cotangents

    def gram(self) -> Array:
        if self.weight is None:
            return self_product(self._flat_cotangents())
        if self.memo is None and self.cotangents.shape[1] == 1:
            return hadamard_gram(self.inputs, self._flat_cotangents(), ones=self.bias is not None)
        inputs = self_product(self.inputs)
        if self.memo is not None:
            self.memo[:] = [(self.inputs, inputs + 0.0)]
        return self._joined(self_product(self._flat_cotangents()), inputs, self)

    def cross_gram(self, other: Factors) -> Array:
        if isinstance(other, Scaled):
            return self.cross_gram(other.base) * other.scale
        if not isinstance(other, OuterProduct):
            return self.as_shared().cross_gram(other)
        self._require_same_block(other)
        cotangents = product(self._flat_cotangents(), other._flat_cotangents().T)
        if self.weight is None:
            return cotangents
        return self._joined(cotangents, self._inputs_with(other), other)

    def _inputs_with(self, other: OuterProduct) -> Array:
        """A Bᵀ of the inputs of both, a new array: the one of the last Gram where it is that."""
        if self.memo and self.same_inputs(other) and self.memo[0][0] is self.inputs:
            return self.memo.pop()[1]
        return product(self.inputs, other.inputs.T)

    def same_inputs(self, other: Factors) -> bool:
        other = other.base if isinstance(other, Scaled) else other
        return isinstance(other, OuterProduct) and same(self.inputs, other.inputs)

    def remembering(self) -> OuterProduct:
        return dataclasses.replace(self, memo=[])

    def _joined(self, cotangents: Array, inputs: Array, other: OuterProduct) -> Array:
        """Hadamard product of two new Gram matrices, each input's for all its columns."""
        if self.bias is not None:
            inputs += 1
        (n, c), (m, d) = self.cotangents.shape[:2], other.cotangents.shape[:2]
        if c == d == 1:
            inputs *= cotangents
            return inputs
        return (cotangents.reshape(n, c, m, d) * inputs[:, None, :, None]).reshape(n * c, m * d)

    def matvec(self, vector: Vector) -> Array:
        # One product with the weight serves every column.
        if self.weight is None:
            return self.dense().matvec(vector)
        outputs = product(self.inputs, vector[self.weight].T)
        if self.cotangents.shape[1] == 1:
            products = row_products(outputs, self._flat_cotangents())
        else:
            products = (self.cotangents * outputs[:, None, :]).sum(axis=-1).reshape(-1)
        return products if self.bias is None else products + matrix_vector(self._flat_cotangents(), vector[self.bias])

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        return evaluated(self.rmatvec_lazily(weights))

    def rmatvec_lazily(self, weights: Array) -> dict[str, Array | Product]:
        result: dict[str, Array | Product] = {}
        if self.weight is not None:
            result[self.weight] = lazily(self._weighted(weights).T, self.inputs)
        if self.bias is not None:
            result[self.bias] = self._summed(weights)
        return result

    def combined(self, weights: Array, other: Factors, other_weights: Array) -> dict[str, Array]:
        return evaluated(self.combined_lazily(weights, other, other_weights))

    def combined_lazily(self, weights: Array, other: Factors, other_weights: Array) -> dict[str, Array | Product]:
        if isinstance(other, Scaled):
            return self.combined_lazily(weights, other.base, other_weights * other.scale)
        if not isinstance(other, OuterProduct):
            return dict(super().combined(weights, other, other_weights))
        self._require_same_block(other)
        result: dict[str, Array | Product] = {}
        if self.weight is not None:
            # Rows of one pass have their inputs in common, and others are put beneath: one product for both.
            weighted, theirs, inputs = self._weighted(weights), other._weighted(other_weights), self.inputs
            if self.same_inputs(other):
                weighted = weighted + theirs
            else:
                concat = namespace(weighted, theirs).concat
                weighted, inputs = concat([weighted, theirs], axis=0), concat([inputs, other.inputs], axis=0)
            result[self.weight] = lazily(weighted.T, inputs)
        if self.bias is not None:
            result[self.bias] = self._summed(weights) + other._summed(other_weights)
        return result

    def _weighted(self, weights: Array) -> Array:
        """Cotangents, each column times its row's weight, summed over columns."""
        columns = self.cotangents.shape[1]
        weighted = scaled_rows(self._flat_cotangents(), weights)
        return weighted.reshape(self.cotangents.shape).sum(axis=1) if columns > 1 else weighted

    def _summed(self, weights: Array) -> Array:
        """Sum of the cotangents, each times its row's weight."""
        return matrix_vector(self._flat_cotangents().T, weights)

    def diagonal(self) -> dict[str, Array]:
        squares = (self.cotangents * self.cotangents).sum(axis=1)
        weight = {} if self.weight is None else {self.weight: squares.T @ (self.inputs * self.inputs)}
        bias = {} if self.bias is None else {self.bias: squares.sum(axis=0)}
        return weight | bias

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        layout = KroneckerLayout(self.weight, self.bias, (self.cotangents.shape[2], self.inputs.shape[1]))
        return KroneckerRows(self.inputs[None], self._flat_cotangents()[None], layout)

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        apart = self.kronecker_rows()
        a = apart.project_inputs(inputs)[0]
        # Flat, since a stack of rows may be multiplied row by row.
        g = product(self._flat_cotangents(), cotangents[0]).reshape(self.cotangents.shape)
        squares = (g * g).sum(axis=1)
        if self.weight is None:
            return squares.sum(axis=0)[None, :, None]
        return (squares.T @ (a * a))[None]

    def rows(self, index: Array) -> OuterProduct:
        return dataclasses.replace(
            self,
            inputs=self.inputs[index // self.cotangents.shape[1]],
            cotangents=self._flat_cotangents()[index][:, None, :],
            samples=None,
        )

    def restricted(self, names: Collection[str]) -> OuterProduct:
        weight, bias = (name if name in names else None for name in (self.weight, self.bias))
        return dataclasses.replace(self, weight=weight, bias=bias)

    def scaled(self, scale: Array | float) -> Factors:
        if isinstance(scale, float | int):
            return Scaled(self, float(scale), samples=self.samples)
        return dataclasses.replace(self, cotangents=self.cotangents * spread(scale, self.cotangents.shape[:2], 3))

    def as_shared(self) -> SharedOuter:
        """Return the same rows as a sum over one position."""
        return SharedOuter(
            inputs=self.inputs[:, None, None, :],
            cotangents=self.cotangents[:, :, None, None, :],
            weight_shape=(int(self.cotangents.shape[2]), int(self.inputs.shape[1])),
            weight=self.weight,
            bias=self.bias,
            samples=self.samples,
        )

    def add(self, other: Factors) -> Factors:
        if isinstance(other, OuterProduct):
            other = other.as_shared()
        return self.as_shared().add(other)

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[OuterProduct] = [self]
        for other in others:
            if isinstance(other, Scaled):
                other = other.applied()
            if not isinstance(other, OuterProduct) or other.cotangents.shape[1] != self.cotangents.shape[1]:
                return super().cat(others)
            self._require_same_block(other)
            parts.append(other)
        xp = namespace(self.inputs)
        return dataclasses.replace(
            self,
            inputs=xp.concat([part.inputs for part in parts], axis=0),
            cotangents=xp.concat([part.cotangents for part in parts], axis=0),
            samples=joint_samples(parts),
        )

    def portable(self) -> OuterProduct:
        return self

    def renamed(self, names: Mapping[str, str]) -> OuterProduct:
        return dataclasses.replace(self, weight=rename(self.weight, names), bias=rename(self.bias, names))
