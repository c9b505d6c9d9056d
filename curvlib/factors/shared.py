"""A sum of outer products a row: convolutions, sequences, recurrent and tied weights, with groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from curvlib.arrays import Array, Vector, contract, device, namespace
from curvlib.errors import ConfigurationError
from curvlib.factors import cost
from curvlib.factors.base import Factors, Sharing, joint_samples
from curvlib.factors.dense import Dense, spread
from curvlib.factors.kronecker import KroneckerLayout, KroneckerRows
from curvlib.factors.planned import Planned, blocks, slices, total
from curvlib.factors.rotation import rotated_product_squares, rotated_row_squares
from curvlib.factors.scaled import Scaled

__all__ = ["SharedOuter"]


@dataclass(frozen=True, eq=False)
class SharedOuter(Planned):
    """Row (sample i, column c) is ``Σ_r g_icr [a_ir, 1]ᵀ``, block-diagonal over groups.

    Parameters
    ----------
    inputs
        a, shape ``(n, positions, groups, d_in)`` with d_in per group.
    cotangents
        g, shape ``(n, columns, positions, groups, d_out)`` with d_out per group; one column may leave its axis out.
    weight_shape
        Shape of the weight, ``(groups · d_out, …)`` with ``d_in`` elements behind the first axis.
    weight
        Name of the weight; None where it is frozen.
    bias
        Name of the bias, shape ``(groups · d_out,)``; None where there is none.

    Notes
    -----
    The Gram is ``Σ_rs ⟨a_ir, a_js⟩ ⟨g_ir, g_js⟩`` over *pairs* of positions. Summing positions of inputs and of
    cotangents separately gives another matrix; this kind never does that.
    """

    inputs: Array
    cotangents: Array
    weight_shape: tuple[int, ...]
    weight: str | None = "weight"
    bias: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_shape", tuple(self.weight_shape))
        if self.cotangents.ndim == 4:
            object.__setattr__(self, "cotangents", self.cotangents[:, None])
        a, g = tuple(self.inputs.shape), tuple(self.cotangents.shape)
        if len(a) != 4 or len(g) != 5 or (a[0], a[1], a[2]) != (g[0], g[2], g[3]):
            raise ConfigurationError(
                "a shared outer product needs inputs (n, positions, groups, d_in) and cotangents "
                f"(n, columns, positions, groups, d_out); got {a} and {g}"
            )
        if self.weight_shape[0] != g[3] * g[4] or prod(self.weight_shape[1:]) != a[3]:
            raise ConfigurationError(
                f"a weight of shape {self.weight_shape} does not fit inputs {a} and cotangents {g}: it needs "
                f"{g[3] * g[4]} rows of {a[3]} elements"
            )
        if self.weight is None and self.bias is None:
            raise ConfigurationError("a shared outer product needs the name of a weight, of a bias, or of both")

    def dense(self) -> Dense:
        values = {}
        if self.weight is not None:
            n, columns, positions, groups, d_out = self.cotangents.shape
            if columns == groups == 1:  # as the contraction ends up doing, which takes longer to find that out
                g, a = self.cotangents.reshape(n, positions, d_out), self.inputs.reshape(n, positions, -1)
                rows = self._product(g.swapaxes(1, 2), a)
            else:
                rows = contract("ncrgo,nrgi->ncgoi", self.cotangents, self.inputs)
            values[self.weight] = rows.reshape(n * columns, *self.weight_shape)
        if self.bias is not None:
            values[self.bias] = self.cotangents.sum(axis=2).reshape(len(self), -1)
        return Dense(values, samples=self.samples)

    def _product(self, first: Array, second: Array) -> Array:
        return first @ second if self.plan is None else self.plan.plan.buffers.product(first, second)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        weight = {} if self.weight is None else {self.weight: self.weight_shape}
        bias = {} if self.bias is None else {self.bias: self.weight_shape[:1]}
        return weight | bias

    def __len__(self) -> int:
        return int(self.cotangents.shape[0] * self.cotangents.shape[1])

    @property
    def sizes(self) -> cost.Sizes:
        """The sizes that decide which route is cheapest."""
        n, columns, positions, groups, d_out = self.cotangents.shape
        return cost.Sizes(n, columns, positions, groups, self.inputs.shape[3], d_out)

    @property
    def like(self) -> Array:
        return self.cotangents

    def gram(self) -> Array:
        return self.pair_gram(self) if self._gram_route() == "pairs" else self.row_gram()

    def _gram_route(self, foreseen: bool = False) -> str:
        default = "pairs" if cost.pairs_beat_rows(self.sizes, self.sizes) else "rows"
        if self.plan is None:
            return default
        if foreseen:
            return self.plan.foreseen("gram", self.sizes, default, self._what)
        candidates = {"pairs": lambda: self.pair_gram(self), "rows": self.row_gram}
        return self.plan.choose("gram", self.sizes, default, candidates, self._what)

    def _what(self) -> Hashable:
        """What times depend on besides sizes."""
        g = self.cotangents
        return SharedOuter, self.weight is None, self.bias is None, g.dtype, str(device(g))

    def row_gram(self) -> Array:
        """Gram from explicit rows, of a part of the parameters at a time where there is a limit on memory."""
        return self._gram_in_parts(self) if self.exceeds else self.dense().gram()

    def _gram_in_parts(self, other: SharedOuter) -> Array:
        """Cross-Gram summed over parts of the parameters, so that the explicit rows of neither exceed the limit."""
        sizes, elements = self.sizes, (self.gram_limit(other) or 1) // max(len(self), len(other))
        d_in = 1 if self.weight is None else sizes.d_in

        def product(part: tuple[slice, ...]) -> Array:
            mine = self._of_parameters(*part).dense()
            return mine.gram() if other is self else mine.cross_gram(other._of_parameters(*part).dense())

        return total(map(product, slices(elements, sizes.groups, sizes.d_out, d_in)))

    def _of_parameters(self, groups: slice, outputs: slice, inputs: slice) -> SharedOuter:
        """Columns of J that belong to a part of the weight, and to that of the bias with the first inputs."""
        a, g = self.inputs[:, :, groups, inputs], self.cotangents[:, :, :, groups, outputs]
        shape = int(g.shape[3] * g.shape[4]), int(a.shape[3])
        return SharedOuter(a, g, shape, self.weight, None if inputs.start else self.bias)

    def of_samples(self, samples: slice) -> SharedOuter:
        return dataclasses.replace(self, inputs=self.inputs[samples], cotangents=self.cotangents[samples], samples=None)

    def cross_gram(self, other: Factors) -> Array:
        from curvlib.factors.onehot import OneHotOuter

        self._require_same_block(other)
        if isinstance(other, SharedOuter) and other.sizes.groups == self.sizes.groups:
            default = "pairs" if cost.pairs_beat_rows(self.sizes, other.sizes) else "rows"
            plan = self.plan_with(other)
            if (default if plan is None else plan.choose("gram", self.sizes, default)) == "pairs":
                return self.pair_gram(other)
            if self.exceeds_with(other):
                return self._gram_in_parts(other)
        elif isinstance(other, OneHotOuter):
            return other.cross_gram(self).T
        elif isinstance(other, Scaled) and self.limit(other.base) is not None:
            return self.cross_gram(other.base) * other.scale
        elif self.exceeds_with(other):
            return blocks(
                self.explicit_parts(self.gram_limit(other)), [other], lambda one, other: one.dense().cross_gram(other)
            )
        return self.dense().cross_gram(other)

    def pair_gram(self, other: SharedOuter) -> Array:
        """Cross-Gram over pairs of positions, without explicit rows; chunked over rows to bound the temporaries."""
        xp, limit = namespace(self.inputs), self.gram_limit(other)
        others = other.in_parts(cost.pair_table(self.sizes, other.sizes), limit)
        if len(others) > 1:
            return blocks([self], others, SharedOuter.pair_gram)
        step = cost.chunk(self.sizes, other.sizes, limit)
        if step >= self.inputs.shape[0]:
            return self._pair_gram(self.inputs, self.cotangents, other)
        chunks = [
            self._pair_gram(self.inputs[start : start + step], self.cotangents[start : start + step], other)
            for start in range(0, self.inputs.shape[0], step)
        ]
        return xp.concat(chunks, axis=0)

    def _pair_gram(self, inputs: Array, cotangents: Array, other: SharedOuter) -> Array:
        result: Array = 0
        n, columns, positions, groups, _ = cotangents.shape
        m, others, there = other.cotangents.shape[:3]
        for group in range(groups):
            g = cotangents[:, :, :, group].reshape(n * columns * positions, -1)
            h = other.cotangents[:, :, :, group].reshape(m * others * there, -1)
            pairs = (g @ h.T).reshape(n, columns, positions, m, others, there)
            if self.weight is None:
                result = result + pairs.sum(axis=(2, 5))
                continue
            a = inputs[:, :, group].reshape(n * positions, -1)
            b = other.inputs[:, :, group].reshape(m * there, -1)
            products = (a @ b.T).reshape(n, positions, m, there)
            if self.bias is not None:
                products = products + 1
            result = result + contract("ncrmds,nrms->ncmd", pairs, products)
        return result.reshape(n * columns, m * others)

    def _outputs(self, vector: Vector) -> Array:
        groups = self.inputs.shape[2]
        outputs: Array = 0
        if self.weight is not None:
            weight = vector[self.weight].reshape(groups, -1, self.inputs.shape[3])
            outputs = contract("nrgi,goi->nrgo", self.inputs, weight)
        if self.bias is not None:
            outputs = outputs + vector[self.bias].reshape(groups, -1)
        return outputs

    def matvec(self, vector: Vector) -> Array:
        if self.weight is None:
            return self.dense().matvec(vector)
        outputs = self._outputs(vector)
        return (self.cotangents * outputs[:, None]).sum(axis=(2, 3, 4)).reshape(-1)

    def rmatvec(self, weights: Array) -> dict[str, Array]:
        weighted = self._weighted(weights).cotangents.sum(axis=1)
        result = {}
        if self.weight is not None:
            result[self.weight] = contract("nrgo,nrgi->goi", weighted, self.inputs).reshape(self.weight_shape)
        if self.bias is not None:
            result[self.bias] = weighted.sum(axis=(0, 1)).reshape(-1)
        return result

    def kronecker_rows(self, sharing: Sharing = "expand") -> KroneckerRows:
        groups, d_in = self.inputs.shape[2:]
        inputs, cotangents = self.inputs, self.cotangents
        if sharing == "reduce":
            inputs = inputs.sum(axis=1)[:, None] / inputs.shape[1]
            cotangents = cotangents.sum(axis=2)[:, :, None]
        xp = namespace(inputs)
        return KroneckerRows(
            xp.permute_dims(inputs, (2, 0, 1, 3)).reshape(groups, -1, d_in),
            xp.permute_dims(cotangents, (3, 0, 1, 2, 4)).reshape(groups, -1, cotangents.shape[4]),
            KroneckerLayout(self.weight, self.bias, self.weight_shape, groups),
        )

    def rotated_squares(self, inputs: Array, cotangents: Array) -> Array:
        if self.weight is None:
            summed = contract("ncgo,gop->ncgp", self.cotangents.sum(axis=2), cotangents)
            return (summed * summed).sum(axis=(0, 1))[:, :, None]
        sizes, limit = self.sizes, self.limit()
        elements = sizes.row_size if limit is None else cost.rotated_sample(sizes, int(inputs.shape[1]))
        step = cost.sample_chunk(elements, limit)
        parts = (slice(start, start + step) for start in range(0, sizes.n, step))
        return total(self._rotated_squares(self.inputs[p], self.cotangents[p], inputs, cotangents) for p in parts)

    def _rotated_squares(self, a: Array, g: Array, inputs: Array, cotangents: Array) -> Array:
        """`rotated_squares` of some samples: each basis is applied to positions or to rows, whichever are fewer."""
        xp, groups = namespace(a), self.inputs.shape[2]
        positions_first = cost.rotates_positions(self.sizes)
        if positions_first.cotangents:
            g = contract("ncrgo,gop->ncrgp", g, cotangents)
        then = None if positions_first.cotangents else cotangents
        if positions_first.inputs:
            apart = dataclasses.replace(self, inputs=a, cotangents=g).kronecker_rows()
            rotated = apart.project_inputs(inputs).reshape(groups, *a.shape[:2], -1)
            rotated = xp.permute_dims(rotated, (1, 0, 2, 3))
            return rotated_product_squares(xp.permute_dims(g, (0, 1, 3, 4, 2)), rotated, then)
        rows = contract("ncrgo,nrgi->ncgoi", g, a)
        rows = rows.reshape(-1, groups, *rows.shape[3:])
        if self.bias is not None:
            rows = xp.concat([rows, g.sum(axis=2).reshape(*rows.shape[:3], 1)], axis=3)
        return rotated_row_squares(rows, inputs, then)

    def rows(self, index: Array) -> SharedOuter:
        flat = self.cotangents.reshape(len(self), 1, *self.cotangents.shape[2:])
        return dataclasses.replace(
            self, inputs=self.inputs[index // self.cotangents.shape[1]], cotangents=flat[index], samples=None
        )

    def restricted(self, names: Collection[str]) -> SharedOuter:
        weight, bias = (name if name in names else None for name in (self.weight, self.bias))
        return dataclasses.replace(self, weight=weight, bias=bias)

    def scaled(self, scale: Array | float) -> Factors:
        if isinstance(scale, float | int) and self.cotangents.shape[2] > 1:
            return Scaled(self, float(scale), samples=self.samples)
        return self._weighted(scale)

    def _weighted(self, scale: Array | float) -> SharedOuter:
        return dataclasses.replace(self, cotangents=self.cotangents * spread(scale, self.cotangents.shape[:2], 5))

    def add(self, other: Factors) -> Factors:
        from curvlib.factors.outer import OuterProduct

        if isinstance(other, OuterProduct):
            other = other.as_shared()
        if (
            not isinstance(other, SharedOuter)
            or self.shapes != other.shapes
            or self.inputs.shape[2] != other.inputs.shape[2]
            or self.cotangents.shape[:2] != other.cotangents.shape[:2]
        ):
            return super().add(other)
        xp = namespace(self.inputs)
        return dataclasses.replace(
            self,
            inputs=xp.concat([self.inputs, other.inputs], axis=1),
            cotangents=xp.concat([self.cotangents, other.cotangents], axis=2),
        )

    def cat(self, others: Sequence[Factors]) -> Factors:
        parts: list[SharedOuter] = [self]
        for other in others:
            if not isinstance(other, SharedOuter) or other.cotangents.shape[1:] != self.cotangents.shape[1:]:
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

    def compact(self) -> Factors:
        return self.dense() if self._keeps() == "rows" else self

    def _keeps(self) -> str:
        default = "rows" if cost.rows_are_cheaper_to_keep(self.sizes) else "factored"
        if self.plan is None:
            return default
        return "factored" if self.exceeds else self.plan.choose("keep", self.sizes, default)

    @property
    def route(self) -> str:
        return f"Gram over {self._gram_route(foreseen=True)}, keeps {self._keeps()}"

    def portable(self) -> SharedOuter:
        return self

    def renamed(self, names: Mapping[str, str]) -> SharedOuter:
        return dataclasses.replace(self, weight=rename(self.weight, names), bias=rename(self.bias, names))


def rename(name: str | None, names: Mapping[str, str]) -> str | None:
    """New name of a parameter that may be absent."""
    return None if name is None else names.get(name, name)
