"""What every kind of Factors offers: one required method, everything else derived from it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Literal

from typing_extensions import Self

from curvlib.arrays import Array, Product, Vector, altered, device, map_arrays, namespace, nbytes, record
from curvlib.errors import ConfigurationError
from curvlib.factors.kronecker import KroneckerLayout, KroneckerPair, KroneckerRows
from curvlib.factors.rotation import rotated_row_squares

if TYPE_CHECKING:
    from curvlib.factors.dense import Dense
    from curvlib.factors.plan import BlockPlan

__all__ = ["Factors", "Sharing"]

Sharing = Literal["expand", "reduce"]
"""How positions that share a weight enter Kronecker factors: each a row of its own, or summed to one row a sample."""


@dataclass(frozen=True, eq=False)
class Factors(ABC):
    """Rows of one block's Jacobian J, shape ``(rows, parameters)``, in a structured form.

    A row belongs to one sample and one output cotangent; rows are ordered sample-major, ``(sample, column)``. The
    curvature of the block is ``JᵀJ / normalizer``; nothing else rescales.

    A new kind implements `dense` alone. Every other method has a correct default derived from it, to be overridden
    where the structure allows something faster. Subclasses are frozen dataclasses.

    Parameters
    ----------
    samples
        Number of observations that the rows stand for; None means one row each.
    """

    samples: int | None = field(default=None, kw_only=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        record(cls)

    # -- required -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def dense(self) -> Dense:
        """Return the explicit rows: for each parameter an array of shape ``(rows, *parameter shape)``."""

    # -- shape --------------------------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the block, in order."""
        return self.dense().shapes

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dense())

    @property
    def size(self) -> int:
        """Number of parameters (columns of J)."""
        return sum(map(prod, self.shapes.values()))

    @property
    def normalizer(self) -> int:
        """What JᵀJ is divided by to give the curvature."""
        return len(self) if self.samples is None else self.samples

    @property
    def like(self) -> Array:
        """One of the arrays, any that tells the factors' library, dtype and device."""
        return self.dense().like

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held."""
        total = 0

        def count(array: Array) -> Array:
            nonlocal total
            total += nbytes(array)
            return array

        map_arrays(count, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return total

    @property
    def outer_sizes(self) -> tuple[int, int, int] | None:
        """``(rows, d_in, d_out)`` where every row is a single outer product; None otherwise."""
        return None

    def row_weights(self, value: float) -> Array:
        """Row weights that are all `value`, shape ``(rows,)``, of the factors' library, dtype and device."""
        like = self.like
        return namespace(like).full((len(self),), value, dtype=like.dtype, device=device(like))

    # -- algebra ------------------------------------------------------------------------------------------------------

    def gram(self) -> Array:
        """J Jᵀ, shape ``(rows, rows)``, a new array."""
        return self.dense().gram()

    def cross_gram(self, other: Factors) -> Array:
        """J Oᵀ for other Factors O of the same block, shape ``(rows, other rows)``."""
        return self.dense().cross_gram(other)

    def matvec(self, vector: Vector) -> Array:
        """J v, shape ``(rows,)``, for a block vector v."""
        return self.dense().matvec(vector)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        """Jᵀ w, a block vector of new arrays, for row weights w of shape ``(rows,)``."""
        return self.dense().rmatvec(weights)

    def rmatvec_lazily(self, weights: Array) -> dict[str, Array | Product]:
        """`rmatvec`, a parameter's part of which may be left as a product of two matrices."""
        return self.rmatvec(weights)

    def combined(self, weights: Array, other: Factors, other_weights: Array) -> dict[str, Array]:
        """Jᵀ w + Oᵀ u for other Factors O of the same block and their row weights u."""
        result, theirs = self.rmatvec(weights), other.rmatvec(other_weights)
        return {name: result[name] + theirs[name] for name in result}

    def combined_lazily(self, weights: Array, other: Factors, other_weights: Array) -> dict[str, Array | Product]:
        """`combined`, a parameter's part of which may be left as a product of two matrices."""
        return dict(self.combined(weights, other, other_weights))

    def same_inputs(self, other: Factors) -> bool:
        """Whether both are outer products with the very same inputs, as rows of one pass are."""
        return False

    def remembering(self) -> Factors:
        """Return the same rows, which keep of the next Gram what the next cross-Gram can use again, until then."""
        return self

    def covariance(self) -> Array:
        """JᵀJ, shape ``(parameters, parameters)``, parameters flattened in order."""
        return self.dense().covariance()

    def diagonal(self) -> dict[str, Array]:
        """Diagonal of JᵀJ as a block vector."""
        return self.dense().diagonal()

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        """Rows of inputs and cotangents apart, for methods that treat them as independent.

        Parameters
        ----------
        sharing
            "expand": every position is a row. "reduce": the mean input and the summed cotangent of a sample are its
            row (Eschenhagen et al. 2023, arXiv 2311.00636).

        Raises
        ------
        ConfigurationError
            If rows of this kind are no products of inputs and cotangents.
        """
        raise ConfigurationError(
            f"{type(self).__name__} factors of parameters {list(self.shapes)} have no Kronecker form: "
            "use Woodbury, Dense or Diagonal for this block"
        )

    def kronecker(self, sharing: Sharing = "expand") -> KroneckerPair:
        """Kronecker factors of JᵀJ, from the rows of `kronecker_rows` or cheaper; raises where that does."""
        return self.kronecker_rows(sharing).pair()

    def kronecker_means(self) -> tuple[Array, Array, KroneckerLayout]:
        """Mean input row, sum of cotangent rows, and their layout; raises where `kronecker_rows` does.

        Returns
        -------
        tuple
            Shape ``(groups, d_in)``, without the 1 of a bias; shape ``(groups, d_out)``; how they relate to parameters.
        """
        apart = self.kronecker_rows()
        return apart.inputs.sum(axis=1) / apart.inputs.shape[1], apart.cotangents.sum(axis=1), apart.layout

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        """Sum over rows of the squares of ``Q_Gᵀ [W, b] Q_A``: the second moments in a Kronecker eigenbasis.

        Parameters
        ----------
        inputs, cotangents
            Q_A, shape ``(groups, d, d)``, and Q_G, shape ``(groups, d_out, d_out)``.

        Returns
        -------
        Array
            Shape ``(groups, d_out, d)``.

        Raises
        ------
        ConfigurationError
            As `kronecker_rows`.
        """
        layout = self.kronecker_rows().layout
        return rotated_row_squares(layout.matrix(self.dense().values), inputs, cotangents)

    # -- routes -------------------------------------------------------------------------------------------------------

    @property
    def route(self) -> str:
        """How the Gram is formed and what would be kept, in a few words; empty where there is one way only."""
        return ""

    def planned(self, plan: BlockPlan) -> Factors:
        """Return the same rows, which will ask `plan` for their routes."""
        return self

    @property
    def exceeds(self) -> bool:
        """Whether explicit rows are more than the plan's limit on memory allows."""
        return False

    # -- new Factors from old -----------------------------------------------------------------------------------------

    def rows(self, index: Array) -> Factors:
        """Rows at the integer positions `index`, as Factors that stand for as many observations."""
        return self.dense().rows(index)

    def restricted(self, names: Collection[str]) -> Factors:
        """Columns of J that belong to the parameters `names`, at least one of the block's; all rows."""
        return self if self.shapes.keys() <= set(names) else self.dense().restricted(names)

    def scaled(self, scale: Array | float) -> Factors:
        """Rows multiplied by a number or by one weight a row, shape ``(rows,)``."""
        return self.dense().scaled(scale)

    def add(self, other: Factors) -> Factors:
        """Row-wise sum of two uses of the same parameters (tied weights, a module called twice)."""
        from curvlib.factors.combine import Sum

        return Sum((self, other), samples=self.samples)

    def cat(self, others: Sequence[Factors]) -> Factors:
        """These rows followed by those of `others`; observations add up."""
        return self.dense().cat(others)

    def compact(self) -> Factors:
        """Return the exact form that is cheapest to keep and to multiply with between refreshes."""
        return self

    def portable(self) -> Factors:
        """Return the same rows in a kind whose code is the same for the arrays of every library."""
        return self.dense()

    # -- labels -------------------------------------------------------------------------------------------------------

    def with_samples(self, samples: int) -> Self:
        """Return the same rows, standing for `samples` observations."""
        return altered(self, samples=samples)

    def renamed(self, names: Mapping[str, str]) -> Factors:
        """Return the same rows with parameters renamed."""
        return self.dense().renamed(names)

    def _require_same_block(self, other: Factors) -> None:
        if self.shapes != other.shapes:
            raise ConfigurationError(
                f"factors of different blocks cannot be combined: parameters {self.shapes} against {other.shapes}"
            )


def joint_samples(parts: Sequence[Factors]) -> int:
    """Observations that several Factors stand for together."""
    return sum(part.normalizer for part in parts)
