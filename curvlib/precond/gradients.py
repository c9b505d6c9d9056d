"""The gradient of a block as a solver takes it: explicit, as fresh rows, or both added up."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from curvlib.capture import GradientRows, Taken
from curvlib.errors import ConfigurationError
from curvlib.factors import Factors
from curvlib.fisher import Fisher
from curvlib.layers import Block
from curvlib.precond.refresh import Refresh
from curvlib.precond.transforms import Transform
from curvlib.solvers import Solver

__all__ = [
    "BlockGradient",
    "always",
    "block_gradients",
    "check_fused",
    "gaining",
    "inverted_at_once",
    "remembering",
    "scaled_rows",
    "turned",
]


@dataclass(frozen=True, eq=False)
class BlockGradient:
    """Gradient of one block.

    Parameters
    ----------
    parameters
        The block's parameters by name.
    own
        Autograd's gradients by name, where there are some; a missing one counts as zero.
    rows
        The rest of the gradient as fresh rows, where the block hands its gradient over.
    """

    parameters: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    rows: GradientRows | None = None

    @cached_property
    def vector(self) -> dict[str, Tensor]:
        """The whole gradient, explicitly, in the parameters' dtypes."""
        whole = {name: self.own.get(name) for name in self.parameters}
        if self.rows is not None:
            factors = self.rows.factors
            made = factors.rmatvec(factors.row_weights(self.rows.scale / factors.normalizer))
            for name, value in made.items():
                before = whole[name]
                value = value.to(self.parameters[name].dtype)
                whole[name] = value if before is None else before + value
        zeros = {name: p.new_zeros(p.shape) for name, p in self.parameters.items() if whole[name] is None}
        return {name: zeros[name] if value is None else value for name, value in whole.items()}


def scaled_rows(taken: Taken) -> dict[str, GradientRows]:
    """Gradients as rows, those of the loss alone scaled beforehand: cotangents are smaller than a natural gradient.

    Rows that are the curvature's too stay the very object, as a solver recognises its own rows in a gradient.
    """
    return {
        name: rows
        if rows.factors is taken.factors.get(name) or rows.scale == 1
        else GradientRows(rows.factors.scaled(rows.scale), 1.0)
        for name, rows in taken.gradients.items()
    }


def remembering(factors: Mapping[str, Factors], gradients: Mapping[str, GradientRows]) -> dict[str, Factors]:
    """Rows of the curvature, told to keep something where other rows of the same pass will be multiplied with them."""
    return {
        name: rows.remembering() if name in gradients and gradients[name].factors is not rows else rows
        for name, rows in factors.items()
    }


def turned(
    factors: Mapping[str, Factors], gradients: Mapping[str, GradientRows], names: Collection[str], fisher: Fisher
) -> tuple[dict[str, Factors], dict[str, GradientRows]]:
    """Rows of the negative loss for the blocks that climb.

    Only the loss's own rows have a sign that anyone can see; curvature itself has none.

    Parameters
    ----------
    factors, gradients
        From the capture, and `scaled_rows` of them.
    names
        Blocks that maximise.
    fisher
        Whose rows they are.
    """
    rows, given = dict(factors), dict(gradients)
    for name in names:
        before, gradient = factors.get(name), gradients.get(name)
        if before is not None and fisher.needs_backward:
            rows[name] = before.scaled(-1.0)
        if gradient is not None and gradient.factors is before and fisher.needs_backward:
            given[name] = replace(gradient, factors=rows[name])
        elif gradient is not None:
            given[name] = replace(gradient, scale=-gradient.scale)
    return rows, given


def block_gradients(
    blocks: Sequence[Block], own: Mapping[int, Tensor], rows: Mapping[str, GradientRows]
) -> dict[str, BlockGradient]:
    """Gradients of the blocks that have one.

    Parameters
    ----------
    blocks
        All blocks.
    own
        Autograd's gradients, by the parameters' ids.
    rows
        Gradients as rows, by block.
    """
    result = {}
    for block in blocks:
        given = {name: own[id(p)] for name, p in block.parameters.items() if id(p) in own} if own else {}
        if given or block.name in rows:
            result[block.name] = BlockGradient(block.parameters, given, rows.get(block.name))
    return result


_LOOKED_AHEAD = 64
"""Steps by which a schedule is judged."""


def inverted_at_once(refresh: Refresh) -> bool:
    """Whether a step that takes curvature solves with it."""
    together = all(refresh.inverse_due(step) for step in range(_LOOKED_AHEAD) if refresh.due(step))
    return together and refresh.tolerance is None


def always(refresh: Refresh) -> bool:
    """Whether every step solves with curvature of its own."""
    return inverted_at_once(refresh) and all(refresh.due(step) for step in range(_LOOKED_AHEAD))


def gaining(
    blocks: Sequence[Block],
    solvers: Mapping[str, Solver],
    factors: Mapping[str, Factors],
    same: bool,
    together: bool,
) -> list[str]:
    """Names of blocks whose solver gains from the gradient as rows.

    Parameters
    ----------
    blocks
        Which to look at.
    solvers, factors
        Their solvers, and their rows as they come.
    same
        Whether the gradient's rows are those of the inverse.
    together
        Whether they are of the same passes.
    """
    return [block.name for block in blocks if solvers[block.name].gains_from_rows(factors[block.name], same, together)]


def check_fused(transforms: Sequence[Transform]) -> None:
    """Refuse transforms that cannot be served without explicit gradients.

    Raises
    ------
    ConfigurationError
        Naming the transform.
    """
    for transform in transforms:
        if transform.on_gradient:
            raise ConfigurationError(
                f"{transform} changes the gradient before the curvature, and with fused=True there is no gradient: "
                "leave out fused=True"
            )
