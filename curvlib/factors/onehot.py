"""One-hot inputs: the Jacobian of a lookup in a table, as embeddings do, never as wide as the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from curvlib.arrays import Array, Vector, contract, device, equal_pairs, index_add, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors import cost
from curvlib.factors.base import Factors, Sharing, joint_samples
from curvlib.factors.dense import Dense, spread
from curvlib.factors.kronecker import KroneckerLayout, KroneckerPair, KroneckerRows
from curvlib.factors.outer import OuterProduct
from curvlib.factors.planned import Planned, blocks, joint_pair, total, total_vector
from curvlib.factors.scaled import Scaled
from curvlib.factors.shared import SharedOuter

__all__ = ["OneHotOuter"]

Places: TypeAlias = tuple[Array, Array]
"""Positions of lookups, and for each a number that tells its entry; both of shape ``(lookups,)``."""


@dataclass(frozen=True, eq=False)
class OneHotOuter(Planned):
    """Row (sample i, column c) is ``Σ_r e(k_ir) g_icrᵀ``: position r of the sample looked up entry k_ir of a table.

    Parameters
    ----------
    indices
        k, integers in ``[0, vocabulary)``, shape ``(n, positions)``.
    cotangents
        g, shape ``(n, columns, positions, d)``; one column may leave its axis out. A position that does not count (such
        as padding) has a cotangent of zero; a position that counts by a weight has a cotangent multiplied by it.
    vocabulary
        Number of entries of the table.
    weight
        Name of the table, shape ``(vocabulary, d)``.

    Notes
    -----
    The Gram is ``Σ_rs [k_ir = k_js] ⟨g_ir, g_js⟩``: pairs of equal indices alone contribute. Only `dense`, `diagonal`,
    `rmatvec` and `kronecker_rows` make something as long as the vocabulary, unless a sample is longer than that.
    """

    indices: Array
    cotangents: Array
    vocabulary: int
    weight: str = "weight"

    def __post_init__(self) -> None:
        if self.cotangents.ndim == 3:
            object.__setattr__(self, "cotangents", self.cotangents[:, None])
        k, g = tuple(self.indices.shape), tuple(self.cotangents.shape)
        if len(k) != 2 or len(g) != 4 or k != (g[0], g[2]):
            raise ConfigurationError(
                "a one-hot outer product needs indices (n, positions) and cotangents (n, columns, positions, d); "
                f"got {k} and {g}"
            )
        if not namespace(self.indices).isdtype(self.indices.dtype, "integral"):
            raise ConfigurationError(f"indices must be integers, got {self.indices.dtype}")

    def dense(self) -> Dense:
        (n, columns), d = self.cotangents.shape[:2], self.cotangents.shape[3]
        xp = namespace(self.cotangents)
        row = xp.arange(n * columns, device=device(self.indices)).reshape(n, columns, 1)
        place = (row * self.vocabulary + self.indices[:, None, :]).reshape(-1)
        rows = index_add(n * columns * self.vocabulary, place, self.cotangents.reshape(-1, d))
        return Dense({self.weight: rows.reshape(n * columns, self.vocabulary, d)}, samples=self.samples)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.weight: (self.vocabulary, int(self.cotangents.shape[3]))}

    def __len__(self) -> int:
        return int(self.cotangents.shape[0] * self.cotangents.shape[1])

    @property
    def sizes(self) -> cost.Sizes:
        """The sizes that decide which route is cheapest."""
        n, columns, positions, d = (int(size) for size in self.cotangents.shape)
        return cost.Sizes(n, columns, positions, 1, 1, d)

    @property
    def like(self) -> Array:
        return self.cotangents

    # -- Grams --------------------------------------------------------------------------------------------------------

    def gram(self) -> Array:
        return self.cross_gram(self)

    def cross_gram(self, other: Factors) -> Array:
        self._require_same_block(other)
        if isinstance(other, OuterProduct):
            other = other.as_shared()
        if isinstance(other, Scaled) and self.limit(other.base) is not None:
            return self.cross_gram(other.base) * other.scale
        exceeds = self.exceeds_with(other)
        if isinstance(other, OneHotOuter) and (
            exceeds or not cost.table_is_cheaper_to_keep(self.sizes, self.vocabulary)
        ):
            return self.match_gram(other)
        if isinstance(other, SharedOuter) and other.inputs.shape[2] == 1:
            return self.dual_gram(other)
        if exceeds:
            return blocks(
                self.explicit_parts(self.gram_limit(other)), [other], lambda one, other: one.dense().cross_gram(other)
            )
        return self.dense().cross_gram(other)

    def match_gram(self, other: OneHotOuter) -> Array:
        """Cross-Gram with other lookups: rare entries as a list of equal pairs, frequent ones as a table of rows."""
        xp = namespace(self.cotangents)
        left, right = self._occurrences(), other._occurrences()
        keys = xp.concat([self._keys(left), other._keys(right)])
        entries, places = xp.unique_inverse(keys)
        here, there = places[: left.shape[0]], places[left.shape[0] :]
        size = int(entries.shape[0])
        pairs = index_add(size, here, xp.ones_like(here)) * index_add(size, there, xp.ones_like(there))
        frequent = pairs >= cost.pairs_worth_a_table(self.sizes, other.sizes)
        listed = self._list_gram(other, (left, here), (right, there), xp.astype(~frequent & (pairs > 0), pairs.dtype))
        # Frequent entries are numbered from 1; the others have the number 0.
        numbers = xp.cumsum(xp.astype(frequent, pairs.dtype), axis=0) * frequent
        return listed + self._table_gram(other, (left, numbers[here]), (right, numbers[there]))

    def _list_gram(self, other: OneHotOuter, left: Places, right: Places, rare: Array) -> Array:
        """Share of the entries marked in `rare`: one product for every pair of positions that looked up the same."""
        xp = namespace(self.cotangents)
        (n, columns, positions, _), (m, others, theirs, _) = self.cotangents.shape, other.cotangents.shape
        (left_at, left_keys), (right_at, right_keys) = (_where(rare[keys] != 0, at, keys) for at, keys in (left, right))
        cells = xp.zeros((n * m, columns, others), dtype=self.cotangents.dtype, device=device(self.cotangents))
        step = cost.list_chunk(self.sizes, other.sizes, self.gram_limit(other))
        for start in range(0, int(left_at.shape[0]), step):
            part = left_at[start : start + step]
            here, there = equal_pairs(left_keys[start : start + step], right_keys)
            here, there = part[here], right_at[there]
            products = contract("kcd,ked->kce", self._at(here), other._at(there))
            cells = cells + index_add(n * m, (here // positions) * m + there // theirs, products)
        return xp.permute_dims(cells.reshape(n, m, columns, others), (0, 2, 1, 3)).reshape(n * columns, m * others)

    def _table_gram(self, other: OneHotOuter, left: Places, right: Places) -> Array:
        """Share of the entries with a number above 0: explicit rows over some of them at a time."""
        xp = namespace(self.cotangents)
        result = xp.zeros((len(self), len(other)), dtype=self.cotangents.dtype, device=device(self.cotangents))
        count = int(xp.max(left[1])) if left[1].shape[0] else 0
        step = cost.table_chunk(self.sizes, other.sizes, self.gram_limit(other))
        for start in range(1, count + 1, step):
            width = min(step, count + 1 - start)
            mine = self._table(left, start, width)
            result = result + mine @ (mine if other is self else other._table(right, start, width)).T
        return result

    def _table(self, places: Places, start: int, width: int) -> Array:
        """Rows over the entries numbered from `start`, shape ``(rows, width · d)``."""
        at, number = _where((places[1] >= start) & (places[1] < start + width), *places)
        n, columns, positions, d = self.cotangents.shape
        sums = index_add(n * width, (at // positions) * width + number - start, self._at(at))
        xp = namespace(sums)
        return xp.permute_dims(sums.reshape(n, width, columns, d), (0, 2, 1, 3)).reshape(n * columns, width * d)

    def dual_gram(self, other: SharedOuter) -> Array:
        """Cross-Gram with a linear map whose weight is the table (a tied decoder): its cotangents at the indices."""
        limit, n = self.gram_limit(other), self.sizes.n
        others = other.in_parts(cost.pair_table(self.sizes, other.sizes), limit)
        step = cost.chunk(self.sizes, others[0].sizes, limit)
        parts = [self] if step >= n else [self.of_samples(slice(at, at + step)) for at in range(0, n, step)]
        return blocks(parts, others, OneHotOuter._dual_gram)

    def of_samples(self, samples: slice) -> OneHotOuter:
        return dataclasses.replace(
            self, indices=self.indices[samples], cotangents=self.cotangents[samples], samples=None
        )

    def _occurrences(self) -> Array:
        """Positions ``sample · positions + r`` that count: those with a cotangent other than zero."""
        xp = namespace(self.cotangents)
        return xp.nonzero(xp.any(self.cotangents != 0, axis=(1, 3)).reshape(-1))[0]

    def _keys(self, occurrences: Array) -> Array:
        return self.indices.reshape(-1)[occurrences]

    def _at(self, occurrences: Array) -> Array:
        """Cotangents at some positions, shape ``(occurrences, columns, d)``."""
        positions = self.indices.shape[1]
        return self.cotangents[occurrences // positions, :, occurrences % positions]

    def _dual_gram(self, other: SharedOuter) -> Array:
        inputs, cotangents = other.inputs[:, :, 0], other.cotangents[:, :, :, 0]
        products = contract("ncrd,msd->ncrms", self.cotangents, inputs)
        picked = cotangents[:, :, :, self.indices]
        rows = contract("mesnr,ncrms->ncme", picked, products)
        return rows.reshape(len(self), len(other))

    # -- products -----------------------------------------------------------------------------------------------------

    def matvec(self, vector: Vector) -> Array:
        # One lookup in the vector serves every column.
        return contract("ncrd,nrd->nc", self.cotangents, vector[self.weight][self.indices]).reshape(-1)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        (n, columns), d = self.cotangents.shape[:2], self.cotangents.shape[3]
        weighted = contract("ncrd,nc->nrd", self.cotangents, weights.reshape(n, columns))
        return {self.weight: index_add(self.vocabulary, self.indices.reshape(-1), weighted.reshape(-1, d))}

    def diagonal(self) -> dict[str, Array]:
        sizes = self.sizes
        parts = self.in_parts(sizes.positions * max(sizes.positions, sizes.columns * sizes.d_out), self.limit())
        return total_vector(part._diagonal() for part in parts)

    def _diagonal(self) -> dict[str, Array]:
        # An entry looked up several times by one sample adds up before it is squared.
        equal = namespace(self.cotangents).astype(
            self.indices[:, :, None] == self.indices[:, None, :], self.cotangents.dtype
        )
        entries = contract("nrs,ncsd->ncrd", equal, self.cotangents)
        squares = (self.cotangents * entries).sum(axis=1).reshape(-1, self.cotangents.shape[3])
        return {self.weight: index_add(self.vocabulary, self.indices.reshape(-1), squares)}

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        """Rows in the orientation of the table, whose columns are the outputs of the lookup.

        What `KroneckerRows` calls cotangents are here the one-hot rows, explicit and as long as the vocabulary, because
        a Kronecker factor over it is a dense ``(vocabulary, vocabulary)`` matrix anyway: this is for small tables. What
        it calls inputs are the cotangents g, times the root of the number of columns, because inputs are averaged.
        """
        _, columns, positions, d = self.cotangents.shape
        xp = namespace(self.cotangents)
        live = xp.any(self.cotangents != 0, axis=(1, 3))
        entries = xp.arange(self.vocabulary, dtype=self.indices.dtype, device=device(self.indices))
        chosen = (self.indices[:, :, None] == entries) & live[:, :, None]
        chosen, g = xp.astype(chosen, self.cotangents.dtype), self.cotangents * columns**0.5
        if sharing == "reduce":
            chosen, g = chosen.sum(axis=1) / max(1, positions), g.sum(axis=2)
        layout = KroneckerLayout(self.weight, None, self.shapes[self.weight])
        return KroneckerRows(g.reshape(1, -1, d), chosen.reshape(1, -1, self.vocabulary), layout)

    def kronecker(self, sharing: Sharing = "expand") -> KroneckerPair:
        parts = self.in_parts(self.sizes.positions * self.vocabulary, self.limit())
        return super().kronecker(sharing) if len(parts) == 1 else joint_pair(parts, sharing)

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        a_sample = self.vocabulary * max(self.sizes.positions, self.sizes.columns * self.sizes.d_out)
        parts = self.in_parts(a_sample, self.limit())
        return total(super(OneHotOuter, part).rotated_squares(inputs, cotangents) for part in parts)

    # -- new Factors from old -----------------------------------------------------------------------------------------

    def rows(self, index: Array) -> OneHotOuter:
        n, columns = self.cotangents.shape[:2]
        flat = self.cotangents.reshape(n * columns, 1, *self.cotangents.shape[2:])
        return dataclasses.replace(self, indices=self.indices[index // columns], cotangents=flat[index], samples=None)

    def scaled(self, scale: Array | float) -> OneHotOuter:
        return dataclasses.replace(self, cotangents=self.cotangents * spread(scale, self.cotangents.shape[:2], 4))

    def add(self, other: Factors) -> Factors:
        if (
            not isinstance(other, OneHotOuter)
            or self.shapes != other.shapes
            or self.cotangents.shape[:2] != other.cotangents.shape[:2]
        ):
            return super().add(other)
        xp = namespace(self.cotangents)
        return dataclasses.replace(
            self,
            indices=xp.concat([self.indices, other.indices], axis=1),
            cotangents=xp.concat([self.cotangents, other.cotangents], axis=2),
        )

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[OneHotOuter] = [self]
        for other in others:
            if not isinstance(other, OneHotOuter) or other.cotangents.shape[1] != self.cotangents.shape[1]:
                return super().cat(others)
            self._require_same_block(other)
            parts.append(other)
        positions = max(int(part.indices.shape[1]) for part in parts)
        parts = [part._padded(positions) for part in parts]
        xp = namespace(self.cotangents)
        return dataclasses.replace(
            self,
            indices=xp.concat([part.indices for part in parts], axis=0),
            cotangents=xp.concat([part.cotangents for part in parts], axis=0),
            samples=joint_samples(parts),
        )

    def _padded(self, positions: int) -> OneHotOuter:
        """Return the same rows with positions that do not count added up to a number."""
        n, columns, here, d = self.cotangents.shape
        if here == positions:
            return self
        xp = namespace(self.cotangents)
        where, more = device(self.cotangents), positions - here
        indices = xp.zeros((n, more), dtype=self.indices.dtype, device=where)
        cotangents = xp.zeros((n, columns, more, d), dtype=self.cotangents.dtype, device=where)
        return dataclasses.replace(
            self,
            indices=xp.concat([self.indices, indices], axis=1),
            cotangents=xp.concat([self.cotangents, cotangents], axis=2),
        )

    def compact(self) -> Factors:
        pays = cost.table_is_cheaper_to_keep(self.sizes, self.vocabulary) and not self.exceeds
        return self.dense() if pays else self

    def portable(self) -> OneHotOuter:
        return self

    def renamed(self, names: Mapping[str, str]) -> OneHotOuter:
        return dataclasses.replace(self, weight=names.get(self.weight, self.weight))


def _where(condition: Array, *arrays: Array) -> tuple[Array, ...]:
    """Elements of the arrays where the condition holds."""
    index = namespace(condition).nonzero(condition)[0]
    return tuple(array[index] for array in arrays)
