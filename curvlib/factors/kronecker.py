"""The Kronecker view of a block: rows of inputs and of cotangents apart, and the matrix form of a block vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from curvlib.arrays import Array, Vector, aligned_product, namespace, record, self_product

__all__ = ["KroneckerLayout", "KroneckerPair", "KroneckerRows", "bordered"]


@record
@dataclass(frozen=True, eq=False)
class KroneckerLayout:
    """How a block's parameters form matrices that Kronecker factors act on.

    Parameters
    ----------
    weight, bias
        Names of the parameters; None for one that is frozen or missing.
    weight_shape
        ``(groups · d_out, …)`` with ``d_in`` elements behind the first axis.
    groups
        Number of groups, each with matrices of its own.
    """

    weight: str | None
    bias: str | None
    weight_shape: tuple[int, ...]
    groups: int = 1

    def matrix(self, vector: Vector) -> Array:
        """Block vector as matrices ``[W, b]``, shape ``(groups, d_out, d)`` with d = d_in (+ 1 for a bias).

        Rows of block vectors keep their leading axes.
        """
        parts = []
        for name, shape, width in ((self.weight, self.weight_shape, -1), (self.bias, self.weight_shape[:1], 1)):
            if name is not None:
                leading = vector[name].shape[: vector[name].ndim - len(shape)]
                parts.append(vector[name].reshape(*leading, self.groups, self._d_out, width))
        return parts[0] if len(parts) == 1 else namespace(*parts).concat(parts, axis=-1)

    def vector(self, matrix: Array) -> dict[str, Array]:
        """Block vector from matrices ``[W, b]``, the inverse of `matrix`."""
        result = {}
        if self.weight is not None:
            d_in = prod(self.weight_shape[1:])
            result[self.weight] = matrix[:, :, :d_in].reshape(tuple(self.weight_shape))
        if self.bias is not None:
            result[self.bias] = matrix[:, :, -1].reshape(-1)
        return result

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter of the block."""
        weight = {} if self.weight is None else {self.weight: tuple(self.weight_shape)}
        bias = {} if self.bias is None else {self.bias: tuple(self.weight_shape[:1])}
        return weight | bias

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, d_out, d)``, that of `matrix`."""
        d_in = 0 if self.weight is None else prod(self.weight_shape[1:])
        return self.groups, self._d_out, d_in + (self.bias is not None)

    @property
    def _d_out(self) -> int:
        return self.weight_shape[0] // self.groups


@record
@dataclass(frozen=True, eq=False)
class KroneckerPair:
    """Kronecker factors of JᵀJ: ``JᵀJ ≈ A ⊗ G`` with A over inputs and G over output cotangents.

    Parameters
    ----------
    inputs
        A, shape ``(groups, d, d)``: mean of a aᵀ over the input rows; d counts the implicit 1 of a bias (last).
    cotangents
        G, shape ``(groups, d_out, d_out)``: sum of g gᵀ over all rows; divide by `Factors.normalizer` for the Fisher.
    layout
        How they relate to the block's parameters.
    """

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout


@record
@dataclass(frozen=True, eq=False)
class KroneckerRows:
    """Rows of inputs and of cotangents whose second moments are the Kronecker factors.

    Parameters
    ----------
    inputs
        a, shape ``(groups, rows, d_in)``, without the implicit 1 of a bias.
    cotangents
        g, shape ``(groups, rows, d_out)``; several columns or positions make more rows than there are inputs.
    layout
        How they relate to the block's parameters.
    """

    inputs: Array
    cotangents: Array
    layout: KroneckerLayout

    def pair(self) -> KroneckerPair:
        """Kronecker factors: mean of ``[a, 1][a, 1]ᵀ``, sum of ``g gᵀ``."""
        return KroneckerPair(self.input_moments(), _moments(self.cotangents), self.layout)

    def input_moments(self) -> Array:
        """A, shape ``(groups, d, d)``, without appending the 1 to the inputs."""
        xp = namespace(self.inputs)
        one = xp.ones_like(self.inputs[:, :1, :1])
        if self.layout.weight is None:
            return one
        rows = self.inputs.shape[1]
        second = _moments(self.inputs) / rows
        return second if self.layout.bias is None else bordered(second, self.inputs.sum(axis=1) / rows)

    def augmented_inputs(self) -> Array:
        """``[a, 1]``, shape ``(groups, rows, d)``: the inputs with the implicit 1 of a bias written out."""
        xp = namespace(self.inputs)
        ones = xp.ones_like(self.inputs[:, :, :1])
        if self.layout.weight is None:
            return ones
        return self.inputs if self.layout.bias is None else xp.concat([self.inputs, ones], axis=2)

    def project_inputs(self, basis: Array) -> Array:
        """``[a, 1] B`` for B of shape ``(groups, d, k)``, without appending the 1."""
        if self.layout.weight is None:
            return basis
        if self.layout.bias is None:
            return aligned_product(self.inputs, basis)
        projected = aligned_product(self.inputs, basis[:, :-1])
        projected += basis[:, -1:]
        return projected


def _moments(rows: Array) -> Array:
    """``Σ_r x_r x_rᵀ`` for x of shape ``(groups, rows, d)``."""
    transposed = namespace(rows).matrix_transpose(rows)
    return self_product(transposed[0])[None] if rows.shape[0] == 1 else transposed @ rows


def bordered(second: Array, mean: Array) -> Array:
    """Moments of ``[a, 1]``, shape ``(groups, d + 1, d + 1)``.

    Parameters
    ----------
    second
        Mean of a aᵀ, shape ``(groups, d, d)``.
    mean
        Mean of a, shape ``(groups, d)``.
    """
    xp = namespace(second)
    top = xp.concat([second, mean[:, :, None]], axis=2)
    bottom = xp.concat([mean[:, None, :], xp.ones_like(mean[:, None, :1])], axis=2)
    return xp.concat([top, bottom], axis=1)
